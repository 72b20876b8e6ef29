"""What a rank with a model does first: it takes its place in the layout and loads its part.

The one thing to know: everything here runs after the checks and the preparation, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mtrain.bridge.load import load_weights
from mtrain.bridge.sources import StoredWeights
from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.model_source import ModelSource, parallel_layout
from mtrain.cli.rank_checks import check_attention, check_collectives
from mtrain.config import ExportConfig, SftConfig, TrainingConfig
from mtrain.lora.layers.attach import attach_adapters
from mtrain.lora.weights import initialize_adapters, load_adapters
from mtrain.model.backends import choose_backend
from mtrain.model.build import build_model, transformer_config
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState, World, initialize_parallel


def find_backend(config: SftConfig | ExportConfig) -> str:
    """The backend of the layers, after checks of what it and the device can do.

    Raises:
        ValueError: A flag asks for what it cannot.
        RuntimeError: The backend that was asked for cannot be used.
    """
    check_collectives(config.parallel)
    backend = choose_backend(config.model.transformer_impl)
    check_attention(config.model, backend=backend)
    return backend


def start_parallel(config: SftConfig | ExportConfig, world: World, *, seed: int) -> ParallelState:
    """Takes this rank's place in the layout that the flags ask for.

    Args:
        config: The configuration.
        world: The ranks.
        seed: Seed of dropout.
    """
    layout = parallel_layout(config.parallel, world_size=world.size)
    return initialize_parallel(layout, world, seed=seed)


def load_model(
    config: SftConfig | ExportConfig,
    source: ModelSource,
    state: ParallelState,
    *,
    backend: str,
    training: TrainingConfig,
    dtype: torch.dtype,
    built: Callable[[], None] | None = None,
) -> list[LanguageModel]:
    """Builds the chunks of this rank and fills them from the checkpoint.

    Args:
        config: The configuration.
        source: The checkpoint.
        state: This rank.
        backend: Backend of the layers.
        training: What is recomputed.
        dtype: Dtype of weights and activations.
        built: Called when they are built and not filled yet.
    """
    described = source.family.megatron_config(source.hf_config, source.num_next_tokens)
    model_config = transformer_config(
        described,
        state.layout,
        model=config.model,
        parallel=config.parallel,
        training=training,
        moe=config.moe,
        dtype=dtype,
    )
    chunks = build_model(
        described,
        model_config,
        state,
        backend=backend,
        fuses_rope=config.model.apply_rope_fusion,
    )
    if built is not None:
        built()
    load_weights(
        chunks,
        source.weights,
        table=source.table,
        layout=state.layout,
        rank=state.rank,
    )
    return chunks


def load_adapter(
    chunks: Sequence[LanguageModel],
    adapter: AdapterSource,
    source: ModelSource,
    state: ParallelState,
    *,
    dtype: torch.dtype,
    dropout: float,
    seed: int,
    resumed: StoredWeights | None = None,
) -> None:
    """Attaches an adapter to loaded chunks and gives it its values.

    Args:
        chunks: Bare chunks of this rank.
        adapter: The adapter.
        source: The checkpoint of the chunks.
        state: This rank.
        dtype: Dtype of the adapter.
        dropout: Share of its inputs that is dropped in training.
        seed: Seed of fresh values.
        resumed: Values of a run that goes on, where its checkpoint has them merged.
    """
    lora, table = adapter.lora, source.table
    attach_adapters(chunks, lora, table=table, state=state, dtype=dtype, dropout=dropout)
    stored = resumed or adapter.stored
    if stored is None:
        initialize_adapters(chunks, lora, table=table, state=state, seed=seed)
        return
    with stored.open() as values:
        load_adapters(chunks, values, lora, table=table, state=state)
