"""The adapter that LoRA trains, or that export merges: planned before anything starts.

The one thing to know: of an adapter that is loaded its own config counts (targets, rank, alpha),
not the `--lora_*` flags. Reads headers and JSON only.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_header import read_header
from mtrain.cli.model_source import ModelSource, dtype_name
from mtrain.config import ModelConfig, TunerConfig
from mtrain.lora.peft_format import WEIGHTS_FILE, StoredAdapter, read_adapter
from mtrain.lora.plan import LoraPlan, adapter_table
from mtrain.lora.targets import choose_targets

_PRECISIONS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """An adapter that fits its model.

    Attributes:
        lora: What it consists of.
        stored: The files that its values come from; None for values made at the start.
    """

    lora: LoraPlan
    stored: StoredAdapter | None

    def num_weights(self, table: WeightTable) -> int:
        """Weights of the whole adapter, the modules that are saved with it included.

        Args:
            table: Weights of the model.
        """
        return sum(prod(shape) for shape in hf_tensors(adapter_table(table, self.lora)).values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, smallest first."""
        found = {a.rank for linear in self.lora.linears for a in linear.adapters if a is not None}
        return tuple(sorted(found))


def stored_precision(stored: StoredAdapter) -> str:
    """Precision of an adapter in files; float32 where its tensors have several."""
    found = {tensor.dtype for tensor in read_header(stored.folder / WEIGHTS_FILE).values()}
    return _PRECISIONS.get(found.pop(), "float32") if len(found) == 1 else "float32"


def open_adapter(
    tuner: TunerConfig, source: ModelSource, *, model: ModelConfig
) -> AdapterSource | None:
    """Plans the adapter of a run; None when all weights are trained.

    Args:
        tuner: The settings.
        source: The model.
        model: Its settings, for the precision.

    Raises:
        ValueError: With the reason, in one line.
    """
    if tuner.adapters:
        (folder,) = tuner.adapters
        stored = read_adapter(Path(folder).expanduser(), source.table)
        return AdapterSource(lora=stored.lora, stored=stored)
    if tuner.tuner_type == "full":
        return None
    precision = dtype_name(model, source.hf_config)
    if tuner.lora_dtype == "float16" and precision != "float16":
        # Without a loss scale their gradients would vanish.
        raise ValueError(
            f"--lora_dtype float16 does not work in {precision} training; use {precision}, or "
            "--torch_dtype float16"
        )
    return AdapterSource(lora=choose_targets(source.table, tuner), stored=None)
