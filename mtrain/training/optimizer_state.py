"""What the optimizer remembers of every trained parameter, in one form for all optimizers.

The one thing to know: Megatron-Core keeps what is trained in three different ways (float32, half
precision, shared out over data-parallel ranks), and optimizers what they remember in others. Here
each trained parameter is a run of float32 numbers under a few names: `param` (the float32 main
parameter) and the moments, such as `exp_avg`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer

from mtrain.training.adam import MAIN, AdamW
from mtrain.training.wrap import unwrap

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = [
    "MAIN",
    "OptimizerProgress",
    "ParameterState",
    "moment_names",
    "optimizer_progress",
    "parameter_states",
    "restore_progress",
    "trained_parameters",
]

_Groups = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """A trained parameter, or the part of it that this rank's optimizer updates.

    Attributes:
        chunk: Index of the model chunk on this rank.
        name: Name of the parameter in the bare chunk.
        start: First element of the flattened parameter that belongs to this rank.
        stop: The element after the last.
        owner: The optimizer that updates it.
        key: What that optimizer knows it by.
    """

    chunk: int
    name: str
    start: int
    stop: int
    owner: torch.optim.Optimizer
    key: torch.Tensor

    def read(self, kind: str) -> torch.Tensor:
        """What is remembered: float32 [stop - start], a copy where it is kept in another form.

        Zeros if it is not there yet.

        Args:
            kind: `MAIN` or the name of a moment.
        """
        if isinstance(self.owner, AdamW):
            return self.owner.read(self.key, kind)
        if kind == MAIN:
            return self.key.detach().view(-1)
        state = self.owner.state[self.key]
        if kind not in state:
            state[kind] = torch.zeros_like(self.key, dtype=torch.float32)
        return state[kind].view(-1)

    def write(self, kind: str, values: torch.Tensor) -> None:
        """Sets it, also if `values` are what `read` returned and were filled in place."""
        if isinstance(self.owner, AdamW):
            self.owner.write(self.key, kind, values)
        else:
            self.read(kind).copy_(values)


def trained_parameters(
    chunks: Sequence[DistributedDataParallel],
) -> dict[torch.Tensor, tuple[int, str]]:
    """Chunk and name, in the bare chunk, of every parameter of this rank that is trained."""
    return {
        parameter: (index, name)
        for index, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
        if parameter.requires_grad
    }


def parameter_states(
    chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer
) -> list[ParameterState]:
    """Everything that this rank's optimizer updates.

    Args:
        chunks: Wrapped chunks.
        optimizer: From `build_optimizer`.
    """
    names = trained_parameters(chunks)
    states = []
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for parameter, key, start in _updated(part):
            chunk, name = names[parameter]
            states.append(
                ParameterState(
                    chunk=chunk,
                    name=name,
                    start=start,
                    stop=start + key.numel(),
                    owner=part.optimizer,
                    key=key,
                )
            )
    return states


def _updated(
    part: MegatronOptimizer,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Parameter of the model, what the optimizer updates in its place, and where that begins."""
    if isinstance(part, DistributedOptimizer):
        pairs = _pairs(part.model_float16_groups, part.shard_float16_groups)
        pairs += _pairs(part.model_fp32_groups, part.shard_fp32_groups)
        for parameter, shard in pairs:
            yield parameter, shard, part._get_model_param_range_map(parameter)["param"].start
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = _pairs(part.float16_groups, part.fp32_from_float16_groups)
        pairs += _pairs(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups)
        for parameter, main in pairs:
            yield parameter, main, 0
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0


def _pairs(models: _Groups, mains: _Groups) -> list[tuple[torch.Tensor, torch.Tensor]]:
    groups = zip(models, mains, strict=True)
    return [pair for model, main in groups for pair in zip(model, main, strict=True)]


def moment_names(optimizer: ChainedOptimizer) -> tuple[str, ...]:
    """What the update rule remembers of a parameter."""
    config = optimizer.config
    if config.optimizer == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.sgd_momentum else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerProgress:
    """What an optimizer remembers besides tensors; the same on every rank.

    Attributes:
        num_updates: Updates made, which Adam's bias correction needs; 0 where nothing counts them.
        loss_scale: State of the dynamic loss scale; empty without one.
    """

    num_updates: int
    loss_scale: dict[str, float]


def optimizer_progress(optimizer: ChainedOptimizer) -> OptimizerProgress:
    """What the optimizer remembers besides tensors."""
    counts = {0}
    for inner in _inner_optimizers(optimizer):
        counts |= {int(group["step"]) for group in inner.param_groups if "step" in group}
    scales = [
        {name: float(value) for name, value in scaler.state_dict().items()}
        for scaler in _loss_scalers(optimizer)
    ]
    return OptimizerProgress(num_updates=max(counts), loss_scale=scales[0] if scales else {})


def restore_progress(optimizer: ChainedOptimizer, progress: OptimizerProgress) -> None:
    """Sets what the optimizer remembers besides tensors, once those are there.

    Args:
        optimizer: From `build_optimizer`, with its moments filled.
        progress: From `optimizer_progress`.
    """
    for inner in _inner_optimizers(optimizer):
        if isinstance(inner, AdamW):
            for group in inner.param_groups:
                group["step"] = progress.num_updates
    if not progress.loss_scale:
        return
    for scaler in _loss_scalers(optimizer):
        saved = progress.loss_scale
        scaler.load_state_dict(
            {
                "scale": torch.tensor([saved["scale"]], dtype=torch.float32),
                "growth_tracker": int(saved["growth_tracker"]),
                "hysteresis_tracker": int(saved["hysteresis_tracker"]),
            }
        )


def _inner_optimizers(optimizer: ChainedOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _loss_scalers(optimizer: ChainedOptimizer) -> list[MegatronGradScaler]:
    """The loss scale of each part; none outside of float16."""
    parts = (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer)
    mixed = (part for part in parts if isinstance(part, MixedPrecisionOptimizer))
    return [part.grad_scaler for part in mixed if part.grad_scaler is not None]
