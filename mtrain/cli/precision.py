"""The precision test of an export: which two models are compared, and what is said of them.

The one thing to know: one side is always read by transformers, the other by Megatron-Core, and what
was written is on one of the sides. Both start from the same stored values, so that what is found is
a mistake in the conversion and not its rounding.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.sources import StoredWeights
from mtrain.bridge.storage.quantization import fp8_blocks
from mtrain.bridge.storage.view import arranged
from mtrain.checkpoint.folder import write_atomically
from mtrain.checkpoint.torch_dist.folder import open_torch_dist_model, read_torch_dist_adapter
from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.loading import load_adapter, load_model, start_parallel
from mtrain.cli.model_source import ModelSource
from mtrain.config import ExportConfig, TrainingConfig
from mtrain.lora.peft_config import next_tokens_problem
from mtrain.parallel import World, destroy_parallel
from mtrain.verify.precision_run import run_precision_test
from mtrain.verify.report import PrecisionReport

REPORT_FILE = "precision.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """What is compared.

    Attributes:
        weights: Weights of the Megatron model.
        adapter: Its adapter; None for none.
        hf_folder: Folder of the Hugging Face model.
        peft_folder: Folder of its adapter; None for none.
        stored_dtype: Precision that the Hugging Face model is rounded to first; None for its own.
    """

    weights: StoredWeights
    adapter: AdapterSource | None
    hf_folder: Path
    peft_folder: Path | None
    stored_dtype: torch.dtype | None


def check_conversion(
    config: ExportConfig,
    source: ModelSource,
    adapter: AdapterSource | None,
    world: World,
    *,
    exported: StoredWeights | None,
    folder: Path,
    backend: str,
) -> bool:
    """Runs both models, prints the comparison and writes it beside the result.

    Args:
        config: The configuration.
        source: What was converted.
        adapter: The adapter that was merged or converted.
        world: This rank; every rank must call this.
        exported: The weights of the model that was written; None when it was an adapter.
        folder: What was written.
        backend: Backend of the layers.

    Returns:
        Whether the two agree.

    Raises:
        ValueError: A model cannot be loaded.
    """
    sides = _sides(config, source, adapter, exported=exported, folder=folder)
    dtype = getattr(torch, config.export.test_convert_dtype)
    source = dataclasses.replace(source, weights=sides.weights)
    if dtype == torch.float32 and config.model.transformer_impl == "auto":
        # Transformer Engine's fast attention knows half precision alone.
        backend = "torch"
    state = start_parallel(config, world, seed=0)
    chunks = load_model(
        config, source, state, backend=backend, training=TrainingConfig(), dtype=dtype
    )
    if sides.adapter is not None:
        load_adapter(chunks, sides.adapter, source, state, dtype=dtype, dropout=0.0, seed=0)
    report = run_precision_test(
        chunks,
        state=state,
        hf_folder=sides.hf_folder,
        adapter_folder=sides.peft_folder,
        tokenizer_folder=source.folder,
        vocab_size=source.hf_config["vocab_size"],
        dtype=dtype,
        stored_dtype=sides.stored_dtype,
        # With multi-token prediction left out they name it all: no class has it.
        left_out=[one.pattern for one in source.family.weight_table(source.hf_config).ignored],
        adapts_next_tokens=sides.adapter is not None
        and next_tokens_problem(sides.adapter.lora) is not None,
    )
    destroy_parallel()
    if world.is_first_rank:
        _publish(report, folder)
    return report.passed


def _publish(report: PrecisionReport, folder: Path) -> None:
    print("\n".join(report.table()))
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    write_atomically(folder / REPORT_FILE, text + "\n")


def _sides(
    config: ExportConfig,
    source: ModelSource,
    adapter: AdapterSource | None,
    *,
    exported: StoredWeights | None,
    folder: Path,
) -> _Sides:
    # What was quantised is rounded to bfloat16, here and there.
    decoded = torch.bfloat16 if source.files and source.files.decoded.codes else None
    stored_dtype = None
    peft_folder: Path | None = None
    weights = source.weights if exported is None else exported
    if config.export.to_mcore:
        hf_folder = source.folder
        if exported is not None:
            weights, adapter = open_torch_dist_model(folder, source.table), None
            wanted = config.model.torch_dtype
            stored_dtype = decoded or (None if wanted is None else getattr(torch, wanted))
        else:
            assert adapter is not None, "an export has weights or an adapter"
            peft_folder, stored_dtype = Path(config.tuner.adapters[0]).expanduser(), decoded
            stored = read_torch_dist_adapter(folder, source.table)
            adapter = dataclasses.replace(adapter, stored=stored)
    elif exported is not None:
        hf_folder, adapter = folder, None
        if config.checkpoint.fp8_export:
            # It is rounded to 8 bits, and has to be read as that.
            blocks = fp8_blocks(source.hf_config)
            weights = arranged(open_checkpoint(folder), source.table, blocks=blocks)
            stored_dtype = decoded
    else:
        hf_folder, peft_folder, stored_dtype = source.folder, folder, decoded
    return _Sides(
        weights=weights,
        adapter=adapter,
        hf_folder=hf_folder,
        peft_folder=peft_folder,
        stored_dtype=stored_dtype,
    )
