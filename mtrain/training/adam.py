"""AdamW over the parameters themselves, which keeps what they lack for float32 beside them.

The one thing to know: a bfloat16 number is the upper half of a float32 one. So the float32 main
parameter is the parameter and 16 bits more, and no second copy of it has to be kept, read and
copied back. Gradients are clipped while they are read. On a GPU one kernel updates all parameters
of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adamw import adamw

from mtrain.platform.device import has_triton

if TYPE_CHECKING:
    from mtrain.training.adam_kernel import Table, Update

    # Groups with the parameters to update, and where they are if kernels do it.
    _Work = list[tuple[dict[str, Any], list[torch.Tensor], list[tuple[Table, Update]]]]

__all__ = ["MAIN", "AdamW", "join_halves", "split_halves"]

# Name of the float32 main parameter among what is remembered.
MAIN = "param"
_REMAINDER = "remainder"


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Gradients are read from `decoupled_grad`, in any dtype, or from `grad` where there is none, as
    Megatron-Core's distributed optimizer leaves them. Updates are computed in float32. Parameters
    of float16, which is no half of float32, have a main parameter of their own.

    Args:
        groups: Parameter groups with `params`, `lr` and `weight_decay`; each counts its `step`s.
        betas: Decay of the moments.
        eps: Added to the denominator.
        exp_avg_dtype: What the first moment is kept in.
        exp_avg_sq_dtype: What the second moment is kept in.

    Attributes:
        gradient_factor: Scalar on the device that the next step multiplies gradients with, or None.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"step": 0})
        self.betas = betas
        self.eps = eps
        self.gradient_factor: torch.Tensor | None = None
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self._tables: dict[Any, Table] = {}
        self._work: _Work | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes a group as it is; torch refuses views, as those of shared-out parameters are."""
        for name, default in self.defaults.items():
            param_group.setdefault(name, default)
        self.param_groups.append(param_group)

    def locate(self) -> None:
        """Looks up where everything is, which the next `step` then need not do.

        For a hundred parameters that takes a slow host milliseconds; call it while the device is
        busy with gradients.
        """
        self._work = self._find_work()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient."""
        assert closure is None
        work = self._find_work() if self._work is None else self._work
        self._work = None
        for group, parameters, tables in work:
            group["step"] += 1
            if tables:
                self._update_in_kernels(group, tables)
            elif parameters:
                self._update_in_torch(group, parameters)

    def _find_work(self) -> _Work:
        work = []
        for number, group in enumerate(self.param_groups):
            updated = [one for one in group["params"] if self._gradient(one) is not None]
            for parameter in updated:
                self._initialize(parameter)
            uses_kernels = bool(updated) and updated[0].is_cuda and has_triton()
            tables = self._find_tables(number, updated) if uses_kernels else []
            work.append((group, updated, tables))
        return work

    def read(self, parameter: torch.Tensor, kind: str) -> torch.Tensor:
        """What is remembered of a parameter: float32 [elements], a copy if it is kept otherwise.

        Args:
            parameter: Of a group.
            kind: `MAIN`, "exp_avg" or "exp_avg_sq".
        """
        state = self._initialize(parameter)
        if kind in state:
            return state[kind].view(-1).float()
        assert kind == MAIN, kind
        if _REMAINDER in state:
            return join_halves(parameter.detach(), state[_REMAINDER]).view(-1)
        return parameter.detach().view(-1)

    @torch.no_grad()
    def write(self, parameter: torch.Tensor, kind: str, values: torch.Tensor) -> None:
        """Sets it, rounded to what it is kept in.

        Nothing is left to do for what `read` returned, was not a copy, and was filled in place.
        """
        state = self._initialize(parameter)
        values = values.view_as(parameter)
        targets = [state[kind]] if kind in state else []
        if kind == MAIN and _REMAINDER in state:
            split_halves(values, upper=parameter, lower=state[_REMAINDER])
        elif kind == MAIN:
            targets.append(parameter)
        for target in targets:
            if target.data_ptr() != values.data_ptr():
                target.copy_(values)

    @staticmethod
    def _gradient(parameter: torch.Tensor) -> torch.Tensor | None:
        gradient = getattr(parameter, "decoupled_grad", None)
        return parameter.grad if gradient is None else gradient

    def _initialize(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            for kind, dtype in self._dtypes.items():
                state[kind] = torch.zeros_like(parameter, dtype=dtype)
            if parameter.dtype == torch.bfloat16:
                state[_REMAINDER] = torch.zeros_like(parameter, dtype=torch.int16)
            elif parameter.dtype != torch.float32:
                state[MAIN] = parameter.detach().float()
        return state

    def _find_tables(
        self, number: int, parameters: list[torch.Tensor]
    ) -> list[tuple[Table, Update]]:
        """A table for each combination of dtypes, and one parameter of each."""
        from mtrain.training import adam_kernel

        kinds: dict[tuple[torch.dtype, torch.dtype], list[Update]] = {}
        for parameter in parameters:
            state, gradient = self.state[parameter], self._gradient(parameter)
            update = adam_kernel.Update(
                parameter=parameter,
                # A float32 parameter has no more of itself.
                rest=state.get(_REMAINDER, state.get(MAIN, parameter)),
                gradient=gradient,
                exp_avg=state["exp_avg"],
                exp_avg_sq=state["exp_avg_sq"],
            )
            kinds.setdefault((parameter.dtype, gradient.dtype), []).append(update)
        found = []
        for kind, updates in kinds.items():
            key = (number, kind)
            self._tables[key] = table = adam_kernel.make_table(updates, self._tables.get(key))
            found.append((table, updates[0]))
        return found

    def _update_in_kernels(self, group: dict[str, Any], tables: list[tuple[Table, Update]]) -> None:
        from mtrain.training import adam_kernel

        for table, like in tables:
            adam_kernel.update(
                table,
                like,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                betas=self.betas,
                eps=self.eps,
                step=group["step"],
                gradient_factor=self.gradient_factor,
            )

    def _update_in_torch(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        gradients = [self._gradient(parameter).float() for parameter in parameters]
        if self.gradient_factor is not None:
            torch._foreach_mul_(gradients, self.gradient_factor)
        remembered = {
            kind: [self._in_float32(parameter, kind) for parameter in parameters]
            for kind in (MAIN, *self._dtypes)
        }
        adamw(
            remembered[MAIN],
            [gradient.view_as(one) for gradient, one in zip(gradients, parameters, strict=True)],
            remembered["exp_avg"],
            remembered["exp_avg_sq"],
            [],
            # The function counts up.
            list(torch.full((len(parameters),), float(group["step"] - 1)).unbind()),
            foreach=False,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
        )
        for kind, values in remembered.items():
            for parameter, value in zip(parameters, values, strict=True):
                if value is not self._kept(parameter, kind):
                    self.write(parameter, kind, value)

    def _in_float32(self, parameter: torch.Tensor, kind: str) -> torch.Tensor:
        """What is remembered, shaped as the parameter: itself if it is kept in float32."""
        kept = self._kept(parameter, kind)
        if kept.dtype == torch.float32:
            return kept
        return self.read(parameter, kind).view_as(parameter)

    def _kept(self, parameter: torch.Tensor, kind: str) -> torch.Tensor:
        return parameter if kind == MAIN else self.state[parameter][kind]


def join_halves(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of which bfloat16 ones are rounded, from their lower 16 bits.

    Args:
        upper: bfloat16, rounded to nearest, ties away from zero.
        lower: int16, likewise shaped.

    Source: Transformer Engine's `AdamFunctorMasterParamRemainder` splits them the same way. Where
    the lower bits are at least half of a step, and so negative, the upper ones had been rounded up.
    """
    bits = upper.view(torch.int16).to(torch.int32) - (lower < 0).to(torch.int32)
    return ((bits << 16) | (lower.to(torch.int32) & 0xFFFF)).view(torch.float32)


def split_halves(values: torch.Tensor, *, upper: torch.Tensor, lower: torch.Tensor) -> None:
    """Writes float32 numbers as `join_halves` reads them.

    Args:
        values: float32.
        upper: bfloat16, filled.
        lower: int16, filled.
    """
    bits = values.view(torch.int32)
    lower.copy_(bits & 0xFFFF)
    upper.view(torch.int16).copy_((bits >> 16) + (lower < 0).to(torch.int32))
