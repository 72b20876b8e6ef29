"""`megatron export` on one rank: an adapter merged into its model, or written anew.

The one thing to know: merging loads the model as training does, on any layout; rewriting an adapter
needs no model, so the first rank does it alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mtrain.bridge.plan import Backend
from mtrain.checkpoint.adapter import AdapterFormat, export_adapter
from mtrain.checkpoint.weights import WeightsFormat, export_model
from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.launch import Placement
from mtrain.cli.loading import find_backend, join, load_adapter, load_model, training_dtype
from mtrain.cli.model_source import ModelSource, base_name, stored_dtype_name
from mtrain.cli.preparation import open_export_inputs
from mtrain.cli.rank_checks import check_same_inputs
from mtrain.config import ExportConfig, TrainingConfig, config_to_dict
from mtrain.lora.merge import merged_lookup
from mtrain.parallel import ParallelState, destroy_parallel


def run(config: ExportConfig, here: Placement) -> int:
    """Exports on this rank; every rank runs it.

    Args:
        config: Resolved and checked.
        here: This rank.

    Returns:
        Exit code.

    Raises:
        ValueError: A setting does not fit the model or the adapter.
        SaveError: The result could not be written.
    """
    backend = find_backend(config)
    source, adapter = open_export_inputs(config, world_size=here.world_size)
    state = join(config, here, seed=0)
    check_same_inputs(config, source, state, adapter=adapter)
    assert config.checkpoint.output_dir is not None, "resolve_export fills it"
    folder = Path(config.checkpoint.output_dir).expanduser()
    if config.tuner.merge_lora:
        _merge(config, source, adapter, state, folder, backend=backend)
    else:
        _rewrite(config, source, adapter, state, folder, backend=backend)
    if state.is_first_rank:
        what = "the merged model" if config.tuner.merge_lora else "the adapter"
        print(f"saved {what}: {folder}", file=sys.stderr)
    destroy_parallel()
    return 0


def _merge(
    config: ExportConfig,
    source: ModelSource,
    adapter: AdapterSource,
    state: ParallelState,
    folder: Path,
    *,
    backend: Backend,
) -> None:
    """Saves the model with the adapter merged, rounded once: to the dtype that is wanted."""
    dtype = training_dtype(config.model, source.hf_config)
    is_own = config.model.torch_dtype in (None, stored_dtype_name(source.hf_config))
    chunks = load_model(
        config,
        source,
        state,
        backend=backend,
        training=TrainingConfig(),
        dtype=dtype if is_own else torch.float32,
    )
    load_adapter(
        chunks, adapter, source, state, backend=backend, dtype=torch.float32, dropout=0.0, seed=0
    )
    merged = merged_lookup(chunks)
    export_model(
        folder,
        lambda chunk, name, expert: merged(chunk, name, expert).detach().to(dtype),
        form=WeightsFormat(
            source=source.folder,
            hf_config=source.hf_config,
            backend=backend,
            dtype=dtype,
            max_shard_size=config.checkpoint.max_shard_bytes,
        ),
        arguments=config_to_dict(config),
        state=state,
        exist_ok=config.export.exist_ok,
    )


def _rewrite(
    config: ExportConfig,
    source: ModelSource,
    adapter: AdapterSource,
    state: ParallelState,
    folder: Path,
    *,
    backend: Backend,
) -> None:
    """Saves the adapter as it is, with its experts in the layout that is asked for."""
    stored = adapter.stored
    assert stored is not None, "check_export refuses it"
    # Wider than float32 is neither computed nor written here.
    own_dtype = "float32" if stored.dtype == "float64" else stored.dtype
    wanted = config.tuner.lora_dtype or own_dtype
    export_adapter(
        folder,
        stored,
        form=AdapterFormat(
            source=source.folder,
            table=source.table,
            lora=adapter.lora,
            backend=backend,
            dtype=training_dtype(config.model, source.hf_config, wanted=wanted),
            base=base_name(config.model),
            fingerprint=adapter.fingerprint,
            layout=config.tuner.lora_export_layout,
            dropout=stored.dropout,
        ),
        arguments=config_to_dict(config),
        state=state,
        exist_ok=config.export.exist_ok,
    )
