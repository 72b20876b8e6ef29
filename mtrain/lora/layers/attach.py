"""Attaches adapters to a loaded model and freezes the rest.

A linear keeps its object, its name and its weight; its class becomes a subclass with the adapter in
its forward pass, and the factors become a child module (as torch's parametrizations do it). Base
parameters stop to require gradients, so data parallelism and the optimizer allocate nothing for
them. Call it before the chunks are wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from mtrain.bridge.plan import Plan, plan_rank
from mtrain.bridge.rules import Rule, WeightTable
from mtrain.lora.layers.factors import LoraFactors
from mtrain.lora.layers.linear import (
    adapt_column_linear,
    adapt_embedding,
    adapt_gate,
    adapt_grouped_linear,
    adapt_replicated_linear,
    adapt_router,
    adapt_row_linear,
)
from mtrain.lora.plan import AdaptedLinear, LoraPlan, adapter_table
from mtrain.parallel import ParallelState

_ADAPT = {
    "column": adapt_column_linear,
    "row": adapt_row_linear,
    "replicated": adapt_replicated_linear,
    "router": adapt_router,
    "gate": adapt_gate,
    "embedding": adapt_embedding,
    "experts": adapt_grouped_linear,
}


def attach_adapters(
    chunks: Sequence[torch.nn.Module],
    lora: LoraPlan,
    *,
    table: WeightTable,
    state: ParallelState,
    dtype: torch.dtype,
    dropout: float,
) -> None:
    """Gives the linears of a plan their adapters; the factors are allocated, not filled.

    Afterwards exactly the factors and the parameters of modules to save require gradients.

    Args:
        chunks: Bare model chunks of this rank, with their weights loaded.
        lora: The adapters.
        table: Weights of the model.
        state: This rank.
        dtype: Dtype of the factors.
        dropout: Probability that an input of A is dropped in training.

    Raises:
        ValueError: The run would change weights that an adapter leaves alone.
    """
    config = chunks[0].config
    if config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate:
        raise ValueError(
            f"--moe_router_bias_update_rate {config.moe_router_bias_update_rate} changes weights "
            "of the model, which LoRA leaves alone; use 0"
        )
    _check_copies(lora, table, state)
    _freeze_all_but(lora.modules_to_save, chunks, table, state)
    for linear in lora.linears:
        scales = _scales(linear, state)
        is_expert = linear.kind == "experts"
        is_local = config.moe_shared_expert_overlap and ".shared_experts." in linear.rule.megatron
        for place in _places(linear, table, state):
            module = chunks[place.chunk].get_submodule(place.module)
            adapter = LoraFactors(
                linear,
                a_shape=place.a_shape,
                b_shape=place.b_shape,
                scales=scales,
                dtype=dtype,
                device=state.device,
                dropout=dropout,
                group=state.groups.etp if is_expert else state.groups.tp,
                is_sequence_parallel=config.sequence_parallel and not is_expert,
                is_local=is_local and linear.kind != "gate",
            )
            module.add_module(place.child, adapter)
            _mark_factors(adapter, linear, state)
            module.__class__ = _ADAPT[linear.kind](type(module))


def _check_copies(lora: LoraPlan, table: WeightTable, state: ParallelState) -> None:
    """Refuses to train an embedding of which multi-token prediction has a copy elsewhere."""
    copied = {
        t for rule in table.rules if rule.place == "mtp" and rule.is_duplicate for t in rule.hf
    }
    trained = [*(linear.rule for linear in lora.linears), *lora.modules_to_save]
    if state.layout.pp_size > 1 and any(copied.intersection(rule.hf) for rule in trained):
        raise ValueError(
            "an embedding that LoRA trains must be on one pipeline stage, and multi-token "
            "prediction has a copy on the last one: leave out the embedding, or use "
            "--mtp_num_layers 0 or --pipeline_model_parallel_size 1"
        )


def _freeze_all_but(
    saved: tuple[Rule, ...],
    chunks: Sequence[torch.nn.Module],
    table: WeightTable,
    state: ParallelState,
) -> None:
    for chunk in chunks:
        chunk.requires_grad_(False)
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    for planned in _plan(LoraPlan(linears=(), modules_to_save=saved), table, state):
        # Not among them: the biases that choose experts, which are buffers. No gradient trains
        # them, but they are saved with their module.
        if planned.name in parameters[planned.chunk]:
            parameters[planned.chunk][planned.name].requires_grad_(True)


def _plan(lora: LoraPlan, table: WeightTable, state: ParallelState) -> Plan:
    """Where the tensors of an adapter are on this rank."""
    factors = adapter_table(table, lora)
    return plan_rank(factors, layout=state.layout, rank=state.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A linear of this rank.

    Attributes:
        chunk: Its model chunk.
        module: Name of the module that gets the factors.
        child: Name of the factors in it.
        a_shape: Local shape of A.
        b_shape: Local shape of B.
    """

    chunk: int
    module: str
    child: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


def _places(linear: AdaptedLinear, table: WeightTable, state: ParallelState) -> Iterator[_Place]:
    """Every such linear on this rank."""
    plan = _plan(LoraPlan(linears=(linear,)), table, state)
    shapes = {(parameter.chunk, parameter.name): parameter.shape for parameter in plan}
    for (chunk, name), a_shape in shapes.items():
        path, _, factor = name.rpartition(".")
        if factor == "lora_a":
            module, _, child = path.rpartition(".")
            yield _Place(
                chunk=chunk,
                module=module,
                child=child,
                a_shape=a_shape,
                b_shape=shapes[chunk, f"{path}.lora_b"],
            )


def _scales(linear: AdaptedLinear, state: ParallelState) -> torch.Tensor | float:
    """The scale of each projection at its rows of B; see `LoraFactors`."""
    rule, at = linear.rule, state.coordinates
    if len(rule.hf) == 1:
        (adapter,) = linear.adapters
        assert adapter is not None
        return adapter.scale
    is_expert = linear.kind == "experts"
    num_rows, rows = rule.layout.shard(
        tuple(tensor.shape[0] for tensor in rule.hf),
        num_shards=state.layout.etp_size if is_expert else state.layout.tp_size,
        index=at.etp_rank if is_expert else at.tp_rank,
    )
    scales = torch.zeros(num_rows, len(linear.sources))
    for part in rows:
        adapter, span = linear.adapters[part.source], part.local
        if adapter is not None:
            starts = torch.arange(span.count) * span.step + span.start
            positions = (starts[:, None] + torch.arange(span.size)).flatten()
            scales[positions, linear.sources.index(part.source)] = adapter.scale
    return scales


def _mark_factors(adapter: LoraFactors, linear: AdaptedLinear, state: ParallelState) -> None:
    """Tells Megatron-Core how the ranks share the factors: for gradients and their norm."""
    split_a = linear.rule.split == "columns" or linear.kind == "embedding"
    split_b = linear.rule.split == "rows" and linear.kind != "embedding"
    for factor, is_split, axis in ((adapter.lora_a, split_a, -1), (adapter.lora_b, split_b, -2)):
        if linear.kind == "experts":
            _mark_expert_factor(factor, is_split=is_split, state=state)
        elif is_split:
            set_tensor_model_parallel_attributes(
                factor, is_parallel=True, dim=factor.dim() + axis, stride=1
            )
        elif adapter.is_sequence_parallel:
            # Every rank has all of it, but saw only its part of the sequence: Megatron-Core sums
            # the gradients over the tensor-parallel group.
            factor.sequence_parallel = True


def _mark_expert_factor(
    factor: torch.nn.Parameter, *, is_split: bool, state: ParallelState
) -> None:
    # Reduced over the expert data-parallel group.
    factor.allreduce = False
    if is_split or state.coordinates.etp_rank == 0:
        # Every rank counts it in the gradient norm; see `GroupedLinear`.
        factor.tensor_model_parallel = True
        factor.partition_dim = -1
        factor.partition_stride = 1
    else:
        # A copy of what another rank counts.
        factor.shared = True
