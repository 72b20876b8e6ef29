"""What a rank does first, to train or to export: it meets the others and loads its part.

The one thing to know: everything here runs after the checks and the preparation, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mtrain.bridge.load import load_weights
from mtrain.bridge.plan import Backend
from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.launch import Placement
from mtrain.cli.model_source import ModelSource, dtype_name, parallel_layout
from mtrain.cli.rank_checks import check_attention, check_collectives
from mtrain.config import ExportConfig, ModelConfig, SftConfig, TrainingConfig
from mtrain.lora.layers.attach import attach_adapters
from mtrain.lora.weights import initialize_adapters, load_adapters
from mtrain.model.backends import choose_backend
from mtrain.model.build import build_model, transformer_config
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState, initialize_parallel


def find_backend(config: SftConfig | ExportConfig) -> Backend:
    """The backend of the layers, after checks of what it and the device can do.

    Raises:
        ValueError: A flag asks for what it cannot.
        RuntimeError: The backend that was asked for cannot be used.
    """
    check_collectives(config.parallel)
    backend = choose_backend(config.model.transformer_impl)
    check_attention(config.model, backend=backend)
    return backend


def join(config: SftConfig | ExportConfig, here: Placement, *, seed: int) -> ParallelState:
    """Meets the other ranks.

    Args:
        config: The configuration.
        here: This rank.
        seed: Seed of dropout.
    """
    return initialize_parallel(
        parallel_layout(config.parallel, world_size=here.world_size),
        rank=here.rank,
        local_rank=here.local_rank,
        seed=seed,
        timeout_seconds=config.parallel.ddp_timeout,
    )


def training_dtype(
    model: ModelConfig, hf_config: Mapping[str, Any], *, wanted: str | None = None
) -> torch.dtype:
    """What weights are computed in.

    Args:
        model: The settings, which may ask for a precision.
        hf_config: config.json, whose precision is the default.
        wanted: What is asked for otherwise, such as the adapter's own precision.

    Raises:
        ValueError: The checkpoint's is none that can be computed in.
    """
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return dtypes[wanted or dtype_name(model, hf_config)]


def load_model(
    config: SftConfig | ExportConfig,
    source: ModelSource,
    state: ParallelState,
    *,
    backend: Backend,
    training: TrainingConfig,
    dtype: torch.dtype,
) -> list[LanguageModel]:
    """Builds the chunks of this rank and fills them from the checkpoint.

    Args:
        config: The configuration.
        source: The checkpoint.
        state: This rank.
        backend: Backend of the layers.
        training: What is recomputed.
        dtype: Dtype of weights and activations.
    """
    described = source.family.megatron_config(source.hf_config)
    model_config = transformer_config(
        described,
        state.layout,
        model=config.model,
        parallel=config.parallel,
        training=training,
        moe=config.moe,
        dtype=dtype,
        backend=backend,
    )
    chunks = build_model(described, model_config, state, backend=backend)
    load_weights(
        chunks,
        source.weights,
        table=source.table,
        layout=state.layout,
        rank=state.rank,
        backend=backend,
    )
    return chunks


def load_adapter(
    chunks: Sequence[LanguageModel],
    adapter: AdapterSource,
    source: ModelSource,
    state: ParallelState,
    *,
    backend: Backend,
    dtype: torch.dtype,
    dropout: float,
    seed: int,
) -> None:
    """Attaches an adapter to loaded chunks and gives it its values.

    Args:
        chunks: Bare chunks of this rank.
        adapter: The adapter.
        source: The checkpoint of the chunks.
        state: This rank.
        backend: Backend of the layers.
        dtype: Dtype of the adapter.
        dropout: Share of its inputs that is dropped in training.
        seed: Seed of fresh values.
    """
    lora, table = adapter.lora, source.table
    attach_adapters(
        chunks, lora, table=table, state=state, backend=backend, dtype=dtype, dropout=dropout
    )
    if adapter.stored is None:
        initialize_adapters(chunks, lora, table=table, state=state, backend=backend, seed=seed)
        return
    with adapter.stored.open() as values:
        load_adapters(chunks, values, lora, table=table, state=state, backend=backend)
