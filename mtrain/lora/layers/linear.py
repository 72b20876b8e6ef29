"""Megatron's linears with an adapter: a subclass of whatever class a module has.

The one thing to know: only activations of the adapter's rank are communicated. A column-parallel
linear holds all of A and its own rows of B; a row-parallel one its own columns of A and all of B.
Factors that every rank holds are marked for Megatron-Core's gradient reduction where the ranks saw
different parts of the sequence (`mtrain.lora.layers.attach`).

Where nothing is communicated inside a linear of Megatron-Core, it and its adapter are one function
(`mtrain.lora.layers.fused`), and the forward pass of the base class is not called.

A live module takes the subclass as its class, for which Python wants a subclass with one base:
hence functions that make one, and not mixins.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP

from mtrain.lora.layers.factors import LoraFactors
from mtrain.lora.layers.fused import frozen_linear
from mtrain.lora.layers.grouped import frozen_grouped_linear
from mtrain.lora.layers.products import add_up


@cache
def adapt_column_linear(base: type) -> type:
    """A column-parallel linear with an adapter."""

    class AdaptedColumnLinear(base):
        adapter: LoraFactors

        def forward(
            self, input_: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, Any]:
            """[seq (/ tp_size), batch, in] -> [seq, batch, out / tp_size]."""
            if self.adapter.sends_nothing:
                weight = _weight(self, *args, **kwargs)
                if _is_frozen(weight, self.bias, input_):
                    return _fused(self, weight, input_, is_split=False)
            output, bias = super().forward(input_, *args, **kwargs)
            adapter = self.adapter
            lora_a, lora_b = adapter()
            is_split = adapter.is_sequence_parallel and not adapter.is_local
            low_rank = adapter.down(input_, lora_a, is_split=is_split)
            if is_split:
                low_rank = gather_from_sequence_parallel_region(
                    low_rank, tensor_parallel_output_grad=True, group=adapter.group
                )
            elif adapter.group.size() > 1 and not adapter.is_local:
                low_rank = copy_to_tensor_model_parallel_region(low_rank, group=adapter.group)
            return add_up(output, low_rank, lora_b, adapter.scaling), bias

    return AdaptedColumnLinear


def _weight(
    linear: ColumnParallelLinear,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> torch.Tensor:
    """The weight that a column-parallel linear is called with; takes the rest of its arguments."""
    return linear.weight if weight is None else weight


@cache
def adapt_row_linear(base: type) -> type:
    """A row-parallel linear with an adapter."""

    class AdaptedRowLinear(base):
        adapter: LoraFactors

        def fuses_swiglu(self, hidden: torch.Tensor) -> bool:
            """Whether `mtrain.model.linear` may apply SwiGLU: A needs the activation as well."""
            return False

        def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
            """[seq, batch, in / tp_size] -> [seq (/ tp_size), batch, out]."""
            adapter = self.adapter
            if adapter.sends_nothing and _is_frozen(self.weight, self.bias, input_):
                return _fused(self, self.weight, input_, is_split=True)
            output, bias = super().forward(input_)
            lora_a, lora_b = adapter()
            low_rank = _reduced(adapter.down(input_, lora_a, is_split=True), adapter)
            return add_up(output, low_rank, lora_b, adapter.scaling), bias

    return AdaptedRowLinear


@cache
def adapt_replicated_linear(base: type) -> type:
    """A linear that every rank holds whole and applies to its part of the sequence.

    It is `mtrain.model.replicated.ReplicatedLinear` on both backends, which has no bias.
    """

    class AdaptedReplicatedLinear(base):
        adapter: LoraFactors

        def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
            """[seq (/ tp_size), batch, in] -> [seq (/ tp_size), batch, out]."""
            adapter = self.adapter
            if not _is_frozen(self.weight, None, input_):
                output, _ = super().forward(input_)
                return _adapted(output, input_, adapter), None
            dropped = adapter.dropped(input_, is_split=adapter.is_sequence_parallel)
            scales = adapter.scaling
            output = frozen_linear(
                input_, self.weight, None, *adapter(), scales=scales, dropped=dropped
            )
            return output, None

    return AdaptedReplicatedLinear


@cache
def adapt_router(base: type) -> type:
    """A router, which every rank applies to its part of the sequence, with an adapter."""

    class AdaptedRouter(base):
        adapter: LoraFactors

        def gating(self, input: torch.Tensor) -> torch.Tensor:
            """[seq, batch, hidden] -> logits [seq, batch, experts]."""
            return _adapted(super().gating(input), input, self.adapter)

    return AdaptedRouter


@cache
def adapt_gate(base: type) -> type:
    """Shared experts whose gate has an adapter.

    The gate is no module of its own, so the adapter belongs to the shared experts.
    """

    class AdaptedGate(base):
        gate_adapter: LoraFactors

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """[seq (/ tp_size), batch, hidden] -> alike."""
            output, _ = MLP.forward(self, hidden_states)
            return output * self._score(hidden_states)

        def pre_forward_comm(self, input: torch.Tensor) -> None:
            """The first part of the forward pass where it overlaps with the token exchange."""
            super().pre_forward_comm(input)
            with torch.cuda.stream(self.stream):
                self.gate_score = self._score(input)

        def _score(self, hidden_states: torch.Tensor) -> torch.Tensor:
            # As rows, which torch multiplies alike whether the weight is frozen or not.
            rows = hidden_states.flatten(0, -2)
            logits = _adapted(F.linear(rows, self.gate_weight), rows, self.gate_adapter)
            return logits.sigmoid().view(*hidden_states.shape[:-1], 1)

    return AdaptedGate


@cache
def adapt_embedding(base: type) -> type:
    """An embedding with an adapter; as in PEFT, its input is not dropped out."""

    class AdaptedEmbedding(base):
        adapter: LoraFactors

        def forward(self, input_: torch.Tensor) -> torch.Tensor:
            """int64 [batch, seq] -> [batch, seq, hidden], or [seq / tp_size, batch, hidden]."""
            output = super().forward(input_)
            adapter = self.adapter
            outside = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            local = (input_ - self.vocab_start_index).masked_fill(outside, 0)
            lora_a, lora_b = adapter()
            columns = lora_a.to(output.dtype).t()
            low_rank = F.embedding(local, columns).masked_fill(outside.unsqueeze(-1), 0)
            if adapter.is_sequence_parallel:
                low_rank = low_rank.transpose(0, 1).contiguous()
            return add_up(output, _reduced(low_rank, adapter), lora_b, adapter.scaling)

    return AdaptedEmbedding


@cache
def adapt_grouped_linear(base: type) -> type:
    """The linear maps of all local experts with adapters.

    The token dispatcher sums the outputs of the ranks that share an expert and gives all of them
    the same tokens, so nothing is communicated here. A factor that those ranks all hold gets a part
    of its gradient on each, and is summed as it enters the forward pass.
    """

    class AdaptedGroupedLinear(base):
        adapter: LoraFactors

        def forward(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            """Rows sorted by expert [rows, in] and the end of each expert's rows -> [rows, out]."""
            adapter = self.adapter
            lora_a, lora_b = adapter()
            if tokens.shape[0] == 0:
                # Both still take part, so that their gradients are zero and not missing.
                nothing = (lora_a.sum() + lora_b.sum()) * 0
                return super().forward(tokens, ends) + nothing.to(tokens.dtype)
            if adapter.group.size() > 1:
                if self.weight.partition_dim == 2:
                    lora_b = copy_to_tensor_model_parallel_region(lora_b, group=adapter.group)
                else:
                    lora_a = copy_to_tensor_model_parallel_region(lora_a, group=adapter.group)
            assert not self.weight.requires_grad, "experts with adapters are frozen"
            dropped = adapter.dropped(tokens, is_split=True)
            scales = adapter.scaling
            return frozen_grouped_linear(
                tokens, ends, self.weight, lora_a, lora_b, scales=scales, dropped=dropped
            )

    return AdaptedGroupedLinear


def _is_frozen(weight: torch.Tensor, bias: torch.Tensor | None, input_: torch.Tensor) -> bool:
    """Whether a linear without communication inside is what `frozen_linear` computes."""
    is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not is_trained and input_.dtype == weight.dtype


def _fused(
    linear: ColumnParallelLinear | RowParallelLinear,
    weight: torch.Tensor,
    input_: torch.Tensor,
    *,
    is_split: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the linear returns, with its adapter in it."""
    adapter = linear.adapter
    output = frozen_linear(
        input_,
        weight,
        None if linear.skip_bias_add else linear.bias,
        *adapter(),
        scales=adapter.scaling,
        dropped=adapter.dropped(input_, is_split=is_split),
    )
    return output, linear.bias if linear.skip_bias_add else None


def _adapted(output: torch.Tensor, input_: torch.Tensor, adapter: LoraFactors) -> torch.Tensor:
    """Adds the adapter to an output where every rank holds both factors whole."""
    lora_a, lora_b = adapter()
    low_rank = adapter.down(input_, lora_a, is_split=adapter.is_sequence_parallel)
    return add_up(output, low_rank, lora_b, adapter.scaling)


def _reduced(low_rank: torch.Tensor, adapter: LoraFactors) -> torch.Tensor:
    """Sums over the ranks that hold parts of A; sequence-parallel: each gets its own tokens."""
    if adapter.is_local:
        return low_rank
    if adapter.is_sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(low_rank, group=adapter.group)
    if adapter.group.size() > 1:
        return reduce_from_tensor_model_parallel_region(low_rank, group=adapter.group)
    return low_rank
