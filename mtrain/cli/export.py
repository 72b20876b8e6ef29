"""`megatron export` on one rank: a checkpoint converted, with an adapter merged or alone.

The one thing to know: conversion builds no model. Whatever is read gives Hugging Face tensors by
name, whatever is written takes them, and the ranks share the work evenly; parallel sizes only
matter to the precision test, which runs the result.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrain.bridge.converted import ConvertedWeights, converted
from mtrain.bridge.file_plan import fixed_dtypes
from mtrain.bridge.fingerprint import fingerprint
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.save import DTYPE_NAMES
from mtrain.bridge.sources import StoredWeights
from mtrain.bridge.storage.composed import composed
from mtrain.bridge.storage.stored_as import StoredAs
from mtrain.checkpoint.adapter import AdapterFormat, export_adapter
from mtrain.checkpoint.convert import (
    Destination,
    ModelDescription,
    export_torch_dist_adapter,
    export_torch_dist_model,
    export_weights,
)
from mtrain.checkpoint.weights import saved_config
from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.joining import join, training_dtype
from mtrain.cli.launch import Placement
from mtrain.cli.model_source import ModelSource, base_name
from mtrain.cli.preparation import open_export_inputs
from mtrain.cli.rank_checks import check_same_inputs, gather_counts
from mtrain.config import ExportConfig, config_to_dict
from mtrain.lora.adapter_weights import adapter_weights
from mtrain.lora.merged_weights import merge_weights
from mtrain.lora.peft_config import adapter_config
from mtrain.lora.plan import adapter_table
from mtrain.parallel import World, destroy_world
from mtrain.platform.device import prepare_megatron_files


def run(config: ExportConfig, here: Placement) -> int:
    """Exports on this rank; every rank runs it.

    Args:
        config: Resolved and checked.
        here: This rank.

    Returns:
        Exit code: 1 when the precision test found a difference.

    Raises:
        ValueError: A setting does not fit the model or the adapter.
        SaveError: The result could not be written.
    """
    backend = _backend_of_test(config)
    source, adapter = open_export_inputs(config, world_size=here.world_size)
    world = join(config, here, uses_gpu=backend is not None)
    check_same_inputs(config, source, world, adapter=adapter)
    if backend is not None:
        _check_hf_weights(config, source)
    elif config.export.to_mcore:
        prepare_megatron_files(only=True)
    to = _destination(config, source, adapter, world)
    exported: StoredWeights | None = None
    if adapter is None or config.tuner.merge_lora:
        exported = _export_model(config, source, adapter, to)
        what = "the model" if adapter is None else "the merged model"
    else:
        _export_adapter(config, source, adapter, to)
        what = "the adapter"
    if world.is_first_rank:
        print(f"saved {what}: {to.folder}", file=sys.stderr)
    passed = True
    if backend is not None:
        from mtrain.cli.precision import check_conversion

        passed = check_conversion(
            config, source, adapter, world, exported=exported, folder=to.folder, backend=backend
        )
    destroy_world()
    return 0 if passed else 1


def _backend_of_test(config: ExportConfig) -> str | None:
    """The layers of the precision test, after checks of what they can do; None without a test."""
    if not config.export.test_convert_precision:
        return None
    # Here, not above: it needs Megatron-Core, and a conversion starts faster without.
    from mtrain.cli.loading import find_backend

    return find_backend(config)


def _check_hf_weights(config: ExportConfig, source: ModelSource) -> None:
    """Makes sure that the precision test will have a Hugging Face model to compare with.

    Raises:
        ValueError: transformers has no class for it, or the folder of `--model` has no weights.
    """
    # Here, not above: a conversion starts faster without transformers.
    from mtrain.verify.hf_outputs import check_class

    check_class(source.hf_config["model_type"])
    has_adapter = config.tuner.adapters or config.tuner.mcore_adapter
    if config.export.to_mcore or (has_adapter and not config.tuner.merge_lora):
        open_checkpoint(source.folder)


def _destination(
    config: ExportConfig, source: ModelSource, adapter: AdapterSource | None, world: World
) -> Destination:
    assert config.checkpoint.output_dir is not None, "resolve_export fills it"
    read = [source.folder, source.mcore_folder]
    origin = {"model": str(source.mcore_folder or source.folder)}
    if adapter is not None:
        assert adapter.stored is not None, "an export makes no new adapter"
        read.append(adapter.stored.folder)
        origin |= {"adapter": str(adapter.stored.folder), "base fingerprint": adapter.fingerprint}
    return Destination(
        folder=Path(config.checkpoint.output_dir).expanduser(),
        world=world,
        exist_ok=config.export.exist_ok,
        arguments=config_to_dict(config),
        origin=origin,
        sources=[folder for folder in read if folder is not None],
    )


def _export_model(
    config: ExportConfig, source: ModelSource, adapter: AdapterSource | None, to: Destination
) -> StoredWeights:
    """A model in the precision that is asked for, or in that of each of its tensors."""
    weights = source.weights
    if adapter is not None:
        assert adapter.stored is not None, "an export makes no new adapter"
        weights = merge_weights(weights, adapter.stored)
    wanted = _wanted_dtype(config, source)
    form = source.stored_as(keeps_fp8=config.checkpoint.fp8_export)
    dtypes = _dtypes(source, weights, form, wanted=wanted)
    result = converted(weights, dtypes)
    described = ModelDescription(folder=source.folder, hf_config=_hf_config(config, source, form))
    if config.export.to_hf:
        size = config.checkpoint.max_shard_bytes
        export_weights(composed(result, form), to, described=described, max_shard_size=size)
    else:
        is_same = adapter is None and not wanted
        own = source.fingerprint() if is_same else fingerprint(converted(weights, dtypes))
        export_torch_dist_model(
            result, to, table=source.table, described=described, fingerprint=own
        )
    _warn_of_overflows(result, to.world)
    return result


def _dtypes(
    source: ModelSource, weights: StoredWeights, form: StoredAs, *, wanted: str | None
) -> dict[str, str]:
    """Dtype of each tensor of the result; what is quantised is not rounded before."""
    holder, fixed = form.by_canonical(), fixed_dtypes(source.table)
    dtypes = {}
    for name in hf_tensors(source.table):
        stored_name = holder[name].name if name in holder else name
        if form.is_quantized(stored_name):
            dtypes[name] = weights.tensors[name].dtype
        elif wanted is None:
            dtypes[name] = source.weights.tensors[name].dtype
        else:
            dtypes[name] = fixed.get(name, wanted)
    return dtypes


def _export_adapter(
    config: ExportConfig,
    source: ModelSource,
    adapter: AdapterSource,
    to: Destination,
) -> None:
    """The adapter as it is; in Hugging Face format with its experts in the layout asked for."""
    stored = adapter.stored
    assert stored is not None, "an export makes no new adapter"
    # Wider than float32 is neither computed nor written here.
    own_dtype = "float32" if stored.dtype == "float64" else stored.dtype
    dtype = training_dtype(
        config.model, source.hf_config, wanted=config.tuner.lora_dtype or own_dtype
    )
    layout = config.tuner.lora_export_layout
    if config.export.to_hf:
        form = AdapterFormat(
            source=source.folder,
            table=source.table,
            lora=adapter.lora,
            dtype=dtype,
            base=base_name(config.model),
            fingerprint=adapter.fingerprint,
            layout=layout,
            dropout=stored.dropout,
        )
        export_adapter(
            to.folder,
            stored,
            form=form,
            arguments=to.arguments,
            world=to.world,
            exist_ok=to.exist_ok,
        )
        return
    table = adapter_table(source.table, adapter.lora)
    weights = adapter_weights(stored, table)
    result = converted(weights, dict.fromkeys(weights.tensors, DTYPE_NAMES[dtype]))
    base = base_name(config.model)
    export_torch_dist_adapter(
        result,
        to,
        table=table,
        config=adapter_config(
            adapter.lora, source.table, base=base, layout="per_expert", dropout=stored.dropout
        ),
        hf_config=source.hf_config,
        fingerprint=adapter.fingerprint,
    )
    _warn_of_overflows(result, to.world)


def _wanted_dtype(config: ExportConfig, source: ModelSource) -> str | None:
    if config.model.torch_dtype is None:
        return None
    return DTYPE_NAMES[training_dtype(config.model, source.hf_config)]


def _hf_config(config: ExportConfig, source: ModelSource, form: StoredAs) -> Mapping[str, Any]:
    dtype = None
    if config.model.torch_dtype is not None:
        dtype = training_dtype(config.model, source.hf_config)
    return saved_config(source.hf_config, dtype, stored=form)


def _warn_of_overflows(weights: ConvertedWeights, world: World) -> None:
    """Says which values the new precision could not hold."""
    counts = gather_counts(weights.overflows, world)
    if not counts or not world.is_first_rank:
        return
    names = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())[:10])
    more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
    print(
        f"warning: {sum(counts.values())} values became infinite in the new precision: "
        f"{names}{more}",
        file=sys.stderr,
    )
