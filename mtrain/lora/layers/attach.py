"""Attaches adapters to a loaded model and freezes the rest.

A linear keeps its object, its name and its weight; its class becomes a subclass with the adapter in
its forward pass, and the factors become a child module (as torch's parametrizations do it). Base
parameters stop to require gradients, so data parallelism and the optimizer allocate nothing for
them. Call it before the chunks are wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from mtrain.bridge.plan import Backend, Plan, plan_rank
from mtrain.bridge.rules import WeightTable
from mtrain.lora.layers.factors import LoraFactors
from mtrain.lora.layers.linear import (
    adapt_column_linear,
    adapt_embedding,
    adapt_grouped_linear,
    adapt_router,
    adapt_row_linear,
)
from mtrain.lora.plan import ADAPTER_CHILD, AdaptedLinear, LoraPlan, adapter_table
from mtrain.parallel import ParallelState

_ADAPT = {
    "column": adapt_column_linear,
    "row": adapt_row_linear,
    "router": adapt_router,
    "embedding": adapt_embedding,
    "experts": adapt_grouped_linear,
}


def attach_adapters(
    chunks: Sequence[torch.nn.Module],
    lora: LoraPlan,
    *,
    table: WeightTable,
    state: ParallelState,
    backend: Backend,
    dtype: torch.dtype,
    dropout: float,
) -> None:
    """Gives the linears of a plan their adapters; the factors are allocated, not filled.

    Afterwards exactly the factors and the modules to save require gradients.

    Args:
        chunks: Bare model chunks of this rank, with their weights loaded.
        lora: The adapters.
        table: Weights of the model.
        state: This rank.
        backend: Spelling of the norms in the chunks.
        dtype: Dtype of the factors.
        dropout: Probability that an input of A is dropped in training.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
    saved = LoraPlan(linears=(), modules_to_save=lora.modules_to_save)
    for parameter in _plan(saved, table, state, backend):
        chunks[parameter.chunk].get_parameter(parameter.name).requires_grad_(True)
    is_sequence_parallel = chunks[0].config.sequence_parallel
    for linear in lora.linears:
        scales = _scales(linear, state)
        is_expert = linear.kind == "experts"
        for chunk, name, a_shape, b_shape in _places(linear, table, state, backend):
            module = chunks[chunk].get_submodule(name)
            module.adapter = LoraFactors(
                linear,
                a_shape=a_shape,
                b_shape=b_shape,
                scales=scales,
                dtype=dtype,
                device=state.device,
                dropout=dropout,
                group=state.groups.etp if is_expert else state.groups.tp,
                is_sequence_parallel=is_sequence_parallel and not is_expert,
            )
            _mark_factors(module.adapter, linear, state)
            module.__class__ = _ADAPT[linear.kind](type(module))
            _set_up_transformer_engine(module)


def _set_up_transformer_engine(module: torch.nn.Module) -> None:
    """Does nothing for other linears."""
    if hasattr(module, "return_layernorm_output"):
        # With the norm inside the linear: A takes the normalised input.
        module.return_layernorm_output = True
    if hasattr(module, "activation_dtype"):
        # At the first forward it would refuse factors of another dtype than the weight's; a dtype
        # that is set already counts as checked.
        module.activation_dtype = module.weight.dtype


def _plan(lora: LoraPlan, table: WeightTable, state: ParallelState, backend: Backend) -> Plan:
    """Where the tensors of an adapter are on this rank."""
    factors = adapter_table(table, lora)
    return plan_rank(factors, layout=state.layout, rank=state.rank, backend=backend)


def _places(
    linear: AdaptedLinear, table: WeightTable, state: ParallelState, backend: Backend
) -> Iterator[tuple[int, str, tuple[int, ...], tuple[int, ...]]]:
    """(chunk, name of the module, shape of A, shape of B) of every such linear on this rank."""
    plan = _plan(LoraPlan(linears=(linear,)), table, state, backend)
    shapes = {(parameter.chunk, parameter.name): parameter.shape for parameter in plan}
    for (chunk, name), a_shape in shapes.items():
        if name.endswith(".lora_a"):
            b_shape = shapes[chunk, name.removesuffix("a") + "b"]
            yield chunk, name.removesuffix(f".{ADAPTER_CHILD}.lora_a"), a_shape, b_shape


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
