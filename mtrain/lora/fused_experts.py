"""The fused layout of experts: how PEFT stores their adapters with transformers 5.

There a projection of all experts is one parameter, and gate and up are one: `gate_up_proj`
[num_experts, 2 * width, hidden] and `down_proj`. PEFT adapts a parameter as a whole:

- A is [num_experts * rank, in]: rows of an expert one after the other.
- B is [out, rank * num_experts]: column `rank_index * num_experts + expert`.
- Parameters of one module are wrapped inside out in the order of the module, so with both adapted
  gate_up_proj has the key `experts.base_layer.lora_A.weight` and down_proj `experts.lora_A.weight`;
  with one adapted, that one has the latter.

Where the Hugging Face class has matrices as [in, out], A and B are the same all the same: they
belong to the map. Only the order of gate and up rows in B is that of the parameter.

The one thing to know: gate and up have one A there. Two adapters become [A_gate; A_up] and a
block-diagonal B. Whoever reads that back has to take the blocks apart again, or the rank would
double each time; whether B is block-diagonal is seen from its zeros.

Source: `ParamWrapper` and `transformers_weight_conversion` of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtrain.bridge.rules import Rule, WeightTable, filled
from mtrain.bridge.storage.forms import RowOrder, StorageForm
from mtrain.lora.plan import PEFT_PREFIX, AdaptedLinear, LoraPlan, factor_names, kind_of

if TYPE_CHECKING:
    import torch

ExpertLayout = Literal["per_expert", "fused"]

_WRAPPED = ".base_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedParameter:
    """A parameter of transformers 5 that stacks one or two projections of all experts.

    Attributes:
        rule: Rule of its weights, one an expert.
        container: Module that holds it, with `{layer}` open.
        name: Its name there.
        order: How the rows of its projections follow each other.
        has_linears: Whether files of the model have experts one by one, so that PEFT knows how to
            fuse adapters of them.
    """

    rule: Rule
    container: str
    name: str
    order: RowOrder
    has_linears: bool

    @property
    def num_experts(self) -> int:
        """Experts in a layer."""
        assert self.rule.num_experts is not None
        return self.rule.num_experts

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Output size of each projection."""
        return tuple(tensor.shape[0] for tensor in self.rule.hf)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B."""
        stacked = rank * self.num_experts
        return (stacked, self.rule.hf[0].shape[1]), (sum(self.num_rows), stacked)

    def rows(self, lora_b: torch.Tensor, source: int) -> torch.Tensor:
        """A view of the rows of B that belong to a projection."""
        if self.order == "interleaved":
            return lora_b[source :: len(self.num_rows)]
        return lora_b.split(self.num_rows)[source]

    def lookup_name(self, layer: int) -> str:
        """The name under which PEFT looks it up in its patterns."""
        return filled(f"{self.container}.{self.name}", layer=layer)


def fused_parameters(table: WeightTable) -> tuple[FusedParameter, ...]:
    """The fused parameters of a model, in the order of their module.

    Layers of multi-token prediction have none: no class of transformers has those layers.
    """
    forms = {form.parts: form for form in reversed(table.forms) if form.has_experts}
    return tuple(
        _fused_parameter(rule, forms[tuple(tensor.name for tensor in rule.hf)])
        for rule in table.rules
        if rule.place == "layers" and kind_of(rule) == "experts"
    )


def _fused_parameter(rule: Rule, form: StorageForm) -> FusedParameter:
    container, _, name = form.stored.rpartition(".")
    return FusedParameter(
        rule=rule,
        container=container,
        name=name,
        order=form.order,
        has_linears=not form.is_native,
    )


def fused_names(container: str, layer: int, *, depth: int) -> tuple[str, str]:
    """PEFT's names of A and B.

    Args:
        container: Module that holds the parameter, with `{layer}` open.
        layer: The layer.
        depth: How many later parameters of the module are adapted too.
    """
    module = PEFT_PREFIX + filled(container, layer=layer) + _WRAPPED * depth
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedFactors:
    """The two stored factors of a fused parameter in one layer.

    Attributes:
        parameter: The parameter.
        layer: The layer.
        depth: See `fused_names`.
        rank: Rank of an expert.
        spans: Which of those ranks each projection uses; None for no adapter.
    """

    parameter: FusedParameter
    layer: int
    depth: int
    rank: int
    spans: tuple[range | None, ...]

    @property
    def names(self) -> tuple[str, str]:
        """PEFT's names of A and B."""
        return fused_names(self.parameter.container, self.layer, depth=self.depth)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B."""
        return self.parameter.factor_shapes(self.rank)

    def members(self) -> Iterator[tuple[str, str, int, int]]:
        """(name of A, name of B, expert, projection) of every adapter in it, one an expert."""
        for expert in range(self.parameter.num_experts):
            for source, tensor in enumerate(self.parameter.rule.hf):
                if self.spans[source] is not None:
                    a_name, b_name = (
                        filled(name, layer=self.layer, expert=expert)
                        for name in factor_names(tensor)
                    )
                    yield a_name, b_name, expert, source

    def take_a(self, fused: torch.Tensor, expert: int, source: int) -> torch.Tensor:
        """A of one expert's projection, [rank, in], from the stored one."""
        span = self._span(source)
        return fused[expert * self.rank + span.start : expert * self.rank + span.stop]

    def take_b(self, fused: torch.Tensor, expert: int, source: int) -> torch.Tensor:
        """B of one expert's projection, [out, rank], from the stored one."""
        span = self._span(source)
        rows = self.parameter.rows(fused, source)
        return rows.unflatten(1, (self.rank, -1))[:, span.start : span.stop, expert]

    def fuse(self, get: Callable[[str], torch.Tensor], *, which: int) -> torch.Tensor:
        """Puts a stored factor together.

        Args:
            get: Gives the factors of single experts by name.
            which: 0 for A, 1 for B.
        """
        take = (self.take_a, self.take_b)[which]
        fused = None
        for *names, expert, source in self.members():
            factor = get(names[which])
            if fused is None:
                # What no projection fills is the zeros between the blocks.
                fused = factor.new_zeros(self.shapes[which])
            take(fused, expert, source).copy_(factor)
        assert fused is not None
        return fused

    def _span(self, source: int) -> range:
        span = self.spans[source]
        assert span is not None, f"projection {source} has no adapter"
        return span


def fused_factors(lora: LoraPlan, table: WeightTable) -> tuple[FusedFactors, ...]:
    """The factors that adapters of experts become when they are fused.

    Args:
        lora: The adapters.
        table: Weights of the model.
    """
    of_layer: dict[tuple[str, int], list[tuple[FusedParameter, AdaptedLinear]]] = {}
    for parameter in fused_parameters(table):
        for linear in lora.linears:
            if linear.rule.megatron == parameter.rule.megatron:
                for layer in linear.layers:
                    of_layer.setdefault((parameter.container, layer), []).append(
                        (parameter, linear)
                    )
    found = []
    for (_, layer), adapted in of_layer.items():
        for index, (parameter, linear) in enumerate(adapted):
            spans, end = [], 0
            for adapter in linear.adapters:
                rank = adapter.rank if adapter else 0
                spans.append(range(end, end + rank) if rank else None)
                end += rank
            found.append(
                FusedFactors(
                    parameter=parameter,
                    layer=layer,
                    depth=len(adapted) - 1 - index,
                    rank=end,
                    spans=tuple(spans),
                )
            )
    return tuple(found)


def used_ranks(lora_b: torch.Tensor, parameter: FusedParameter, rank: int) -> tuple[int, int]:
    """How far the blocks of a stored B of two projections reach.

    Args:
        lora_b: [out, rank * num_experts].
        parameter: Its parameter.
        rank: Rank of an expert.

    Returns:
        Ranks from 0 that the first projection uses in any expert, and the first rank that the
        second one uses. The blocks are apart if the latter is not smaller.
    """
    in_first, in_second = (
        (parameter.rows(lora_b, source) != 0)
        .any(dim=0)
        .view(rank, -1)
        .any(dim=1)
        .nonzero()
        .flatten()
        .tolist()
        for source in (0, 1)
    )
    return max(in_first, default=-1) + 1, min(in_second, default=rank)


def split_ranks(used: Sequence[tuple[int, int]], rank: int) -> tuple[range | None, range | None]:
    """Which ranks gate and up use, from `used_ranks` of all layers.

    Blocks of the same size where the zeros allow it, which is what mtrain and PEFT write. All ranks
    for both where B is not block-diagonal, or is all zero with a rank that has no half.
    """
    end = max(first for first, _ in used)
    begin = min(second for _, second in used)
    is_zero = end == 0 and begin == rank
    if end > begin or (is_zero and rank % 2):
        return range(rank), range(rank)
    middle = min(max(rank // 2, end), begin)
    return range(middle) or None, range(middle, rank) or None
