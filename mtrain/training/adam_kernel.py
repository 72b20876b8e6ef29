"""One kernel for the update of many parameters on a GPU.

The one thing to know: it is bound by memory, so every number is read once and written once: the
gradient is clipped, the moments move, and the main parameter is put together, changed and taken
apart again in registers. Parameters are found by a table of addresses in GPU memory, so that a
hundred small norms cost the host one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["Table", "Update", "make_table", "update"]

_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Everything of one parameter, contiguous and of the same size.

    Attributes:
        parameter: What the model computes with.
        rest: int16, the lower bits of the float32 main parameter whose upper ones `parameter` is;
            or the float32 main parameter; or `parameter` itself, in float32.
        gradient: In any floating dtype.
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
    """

    parameter: torch.Tensor
    rest: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where they are."""
        every = (self.parameter, self.rest, self.gradient, self.exp_avg, self.exp_avg_sq)
        return tuple(tensor.data_ptr() for tensor in every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Which parameters are updated, in GPU memory.

    Attributes:
        key: Addresses and size of each parameter.
        rows: int64 [parameters, 6], the same.
        programs: int32 [programs, 2]: row of each program, and which of its blocks.
    """

    key: tuple[tuple[int, ...], ...]
    rows: torch.Tensor
    programs: torch.Tensor


def make_table(updates: Sequence[Update], last: Table | None) -> Table:
    """The table of some parameters; that of the step before where nothing has moved.

    Args:
        updates: Parameters, of the same dtypes.
        last: The table of the step before.
    """
    key = tuple((*one.addresses, one.parameter.numel()) for one in updates)
    if last is not None and last.key == key:
        return last
    device = updates[0].parameter.device
    rows = torch.tensor(key, dtype=torch.int64)
    num_blocks = -(-rows[:, -1] // _BLOCK)
    row_of_program = torch.arange(len(rows)).repeat_interleave(num_blocks)
    first_program = (num_blocks.cumsum(0) - num_blocks)[row_of_program]
    block = torch.arange(len(row_of_program)) - first_program
    return Table(
        key=key,
        rows=rows.to(device),
        programs=torch.stack([row_of_program, block], dim=1).int().to(device),
    )


def update(
    table: Table,
    like: Update,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    gradient_factor: torch.Tensor | None,
) -> None:
    """One step of AdamW.

    Args:
        table: The parameters.
        like: One of them, for its dtypes.
        lr: Learning rate.
        weight_decay: Share of the main parameter that is taken off, times the learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        step: Number of the step, from 1, for the correction of the bias of the moments.
        gradient_factor: float32 scalar on the device; None for 1.
    """
    if not len(table.programs):
        return
    _update_kernel[(len(table.programs),)](
        *(table.rows, table.programs),
        table.rows if gradient_factor is None else gradient_factor,
        *(1.0 - lr * weight_decay, lr / (1.0 - betas[0] ** step)),
        *(betas[0], betas[1], (1.0 - betas[1] ** step) ** 0.5, eps),
        # The halves of a main parameter are bits, not numbers.
        PARAMETER=_pointed_at(like.rest if like.rest.dtype == torch.int16 else like.parameter),
        REST=_pointed_at(like.rest),
        GRADIENT=_pointed_at(like.gradient),
        EXP_AVG=_pointed_at(like.exp_avg),
        EXP_AVG_SQ=_pointed_at(like.exp_avg_sq),
        HAS_FACTOR=gradient_factor is not None,
        BLOCK=_BLOCK,
        # Threads with less to read keep more of it on its way.
        num_warps=4 if like.exp_avg.dtype == torch.float32 else 8,
    )


def _pointed_at(tensor: torch.Tensor) -> Any:
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.int16: tl.int16,
    }[tensor.dtype]


# fmt: off
@triton.jit
def _update_kernel(
    rows, programs, factor, kept_share, step_size, beta1, beta2, root_of_correction, eps,
    PARAMETER: tl.constexpr, REST: tl.constexpr, GRADIENT: tl.constexpr,
    EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of one parameter."""
    program = tl.program_id(0).to(tl.int64)
    row = rows + 6 * tl.load(programs + 2 * program)
    start = tl.load(programs + 2 * program + 1).to(tl.int64) * BLOCK
    parameter = _pointer(row, PARAMETER)
    rest = _pointer(row + 1, REST)
    gradient = _pointer(row + 2, GRADIENT)
    exp_avg = _pointer(row + 3, EXP_AVG)
    exp_avg_sq = _pointer(row + 4, EXP_AVG_SQ)
    size = tl.load(row + 5)
    factor_of_gradients = tl.load(factor).to(tl.float32) if HAS_FACTOR else 1.0
    at = start + tl.arange(0, BLOCK)
    # Without a mask loads are wide; only the end of a parameter has one.
    if start + BLOCK <= size:
        _update_block(
            parameter + at, rest + at, gradient + at, exp_avg + at, exp_avg_sq + at, None,
            factor_of_gradients, kept_share, step_size, beta1, beta2, root_of_correction, eps)
    else:
        _update_block(
            parameter + at, rest + at, gradient + at, exp_avg + at, exp_avg_sq + at, at < size,
            factor_of_gradients, kept_share, step_size, beta1, beta2, root_of_correction, eps)


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    return tl.load(address).to(tl.pointer_type(dtype))


@triton.jit
def _update_block(
    parameter, rest, gradient, exp_avg, exp_avg_sq, mask,
    factor, kept_share, step_size, beta1, beta2, root_of_correction, eps,
):
    """Elements, all or those of the mask."""
    slope = tl.load(gradient, mask=mask).to(tl.float32) * factor
    if rest.dtype.element_ty == tl.int16:
        lower = tl.load(rest, mask=mask).to(tl.int32)
        upper = tl.load(parameter, mask=mask).to(tl.int32) - (lower < 0).to(tl.int32)
        main = ((upper << 16) | (lower & 0xFFFF)).to(tl.float32, bitcast=True)
    else:
        main = tl.load(rest, mask=mask)
    first = tl.load(exp_avg, mask=mask).to(tl.float32)
    second = tl.load(exp_avg_sq, mask=mask).to(tl.float32)
    first += (1.0 - beta1) * (slope - first)
    second = beta2 * second + (1.0 - beta2) * slope * slope
    main = main * kept_share - step_size * first / (tl.sqrt(second) / root_of_correction + eps)
    tl.store(exp_avg, first, mask=mask)
    tl.store(exp_avg_sq, second, mask=mask)
    if rest.dtype.element_ty == tl.int16:
        bits = main.to(tl.int32, bitcast=True)
        lower_bits = bits.to(tl.int16)
        tl.store(rest, lower_bits, mask=mask)
        tl.store(parameter, ((bits >> 16) + (lower_bits < 0).to(tl.int32)).to(tl.int16), mask=mask)
    else:
        tl.store(parameter, main, mask=mask)
        tl.store(rest, main, mask=mask)
