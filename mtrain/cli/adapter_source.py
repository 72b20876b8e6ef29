"""The adapter that LoRA trains, or that export merges: planned before anything starts.

The one thing to know: of an adapter that is loaded its own config counts (targets, rank, alpha),
not the `--lora_*` flags. Reads headers and JSON only.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.rules import WeightTable
from mtrain.cli.model_source import ModelSource, dtype_name
from mtrain.config import ExportConfig, SftConfig, TunerConfig
from mtrain.lora.base_model import check_base_model
from mtrain.lora.peft_config import adapter_config, next_tokens_problem, per_expert_problem
from mtrain.lora.peft_format import StoredAdapter, read_adapter
from mtrain.lora.plan import LoraPlan, adapter_table, check_mergeable
from mtrain.lora.targets import choose_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """An adapter that fits its model.

    Attributes:
        lora: What it consists of.
        stored: The files that its values come from; None for values made at the start.
        fingerprint: Of the model that it belongs to; empty where nobody needs it.
    """

    lora: LoraPlan
    stored: StoredAdapter | None
    fingerprint: str

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


def open_adapter(
    config: SftConfig | ExportConfig, source: ModelSource, *, is_check: bool = False
) -> AdapterSource | None:
    """Plans the adapter of a run; None when all weights are trained.

    Args:
        config: The configuration.
        source: The model.
        is_check: Whether errors are all that is asked for; nothing will be saved then.

    Raises:
        ValueError: With the reason, in one line.
    """
    tuner = config.tuner
    if isinstance(config, SftConfig):
        if tuner.tuner_type == "full":
            return None
        _check_precision(config, source)
    elif not (tuner.adapters or tuner.mcore_adapter):
        return None
    stored = _read_stored(tuner, source.table)
    lora = choose_targets(source.table, tuner) if stored is None else stored.lora
    if tuner.merge_lora:
        check_mergeable(source.table, lora)
    else:
        # What PEFT could not load is refused now, and not at the first save.
        layout = tuner.lora_export_layout
        adapter_config(lora, source.table, base=None, layout=layout, dropout=0.0)
    # Last, because reading weights imports torch, which takes longer than all checks.
    own = "" if is_check and stored is None else source.fingerprint()
    if stored is not None:
        check_base_model(stored.folder, own, named=stored.base)
    return AdapterSource(lora=lora, stored=stored, fingerprint=own)


def _read_stored(tuner: TunerConfig, table: WeightTable) -> StoredAdapter | None:
    """The adapter that is given, in either format; None for a new one."""
    if tuner.mcore_adapter is not None:
        # Here, not above: it imports torch, which the process that starts ranks does without.
        from mtrain.checkpoint.torch_dist.folder import read_torch_dist_adapter

        return read_torch_dist_adapter(Path(tuner.mcore_adapter).expanduser(), table)
    if tuner.adapters:
        (folder,) = tuner.adapters
        return read_adapter(Path(folder).expanduser(), table)
    return None


def saving_notice(
    tuner: TunerConfig, adapter: AdapterSource | None, source: ModelSource
) -> str | None:
    """What the user should know about the files that will be saved; mostly nothing."""
    if adapter is None or tuner.merge_lora:
        return None
    problems = [next_tokens_problem(adapter.lora)]
    if tuner.lora_export_layout != "fused":
        model_type = source.hf_config["model_type"]
        problem = per_expert_problem(adapter.lora, source.table, model_type=model_type)
        problems.append(problem and f"{problem}; --lora_export_layout fused has no such limit")
    return "; ".join(filter(None, problems)) or None


def _check_precision(config: SftConfig, source: ModelSource) -> None:
    """Refuses precisions of an adapter that the optimizer cannot work with."""
    wanted, training = config.tuner.lora_dtype, dtype_name(config.model, source.hf_config)
    if wanted in (None, training, "float32"):
        return
    if wanted == "float16":
        # Without a loss scale their gradients would vanish.
        raise ValueError(
            f"--lora_dtype float16 does not work in {training} training; use {training}, or "
            "--torch_dtype float16"
        )
    if training == "float32" and not config.parallel.use_distributed_optimizer:
        # Megatron-Core keeps float32 copies of them only there or in half-precision training.
        raise ValueError(
            f"--lora_dtype {wanted} in float32 training needs --use_distributed_optimizer true; "
            "or use float32"
        )
