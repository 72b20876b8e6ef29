"""Experts with stacked weights and torch's grouped matrix product, for both backends.

Megatron-Core offers one module an expert (slow), Transformer Engine's grouped linear (one weight an
expert; slower than torch's at one-GPU sizes) or the legacy GroupedMLP (bf16 only, an extra
package). Here all local experts of a projection are one parameter `[experts, out, in]`, which
`torch.nn.functional.grouped_mm` multiplies in one call on CPU and GPU.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import grouped_mm

from mtrain.model.activation import gated, is_swiglu, swiglu
from mtrain.model.expert_bias import add_expert_bias


class GroupedLinear(torch.nn.Module):
    """One linear map for each local expert.

    The parameters are reduced over the expert data-parallel group (`allreduce = False`), and every
    rank counts them in the gradient norm (`tensor_model_parallel = True`): no two ranks of a
    tensor-parallel group hold the same experts' slice unless they are expert-data-parallel. Only a
    bias behind split columns is the same on all ranks that share an expert; the first counts it.

    `forward` leaves the bias to the caller, as Megatron-Core's linears do.

    Args:
        num_experts: Local experts.
        in_size: Input width on this rank.
        out_size: Output width on this rank.
        partition_dim: Axis of the weight that expert tensor parallelism splits: 1 or 2.
        dtype: Dtype of weight and bias.
        has_bias: Whether there is a `bias` [experts, out_size]; else it is None.
        etp_rank: This rank among those that share an expert.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        in_size: int,
        out_size: int,
        partition_dim: int,
        dtype: torch.dtype,
        has_bias: bool,
        etp_rank: int,
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight = torch.empty(num_experts, out_size, in_size, dtype=dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        _mark_split(self.weight, partition_dim)
        self.register_parameter("bias", None)
        if has_bias:
            bias = torch.empty(num_experts, out_size, dtype=dtype, device=device)
            self.bias = torch.nn.Parameter(bias)
            _mark_split(self.bias, partition_dim if partition_dim == 1 else -1)
            # A copy of what the first rank counts.
            self.bias.shared = partition_dim == 2 and etp_rank > 0

    def forward(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Applies each expert to its rows.

        Args:
            tokens: [rows, in_size], sorted by expert.
            ends: int32 [experts], the row after the last of each expert.

        Returns:
            [rows, out_size].
        """
        if tokens.shape[0] == 0:
            # No token came here; the weight still takes part, so that its gradient is zero
            # and not missing.
            return tokens @ self.weight[0].t() + self.weight.sum() * 0
        return grouped_mm(tokens, self.weight.transpose(1, 2), offs=ends)


def _mark_split(parameter: torch.nn.Parameter, partition_dim: int) -> None:
    """What Megatron-Core asks parameters; `partition_dim` -1 for no split."""
    parameter.allreduce = False
    parameter.tensor_model_parallel = True
    parameter.partition_dim = partition_dim
    parameter.partition_stride = 1


class GroupedExperts(MegatronModule):
    """The gated MLPs of the local experts.

    With `add_bias_linear` both linears have biases: an expert's output is its router probability
    times (W2 h + b2), as in GPT-OSS.

    Args:
        num_local_experts: Experts on this rank.
        config: Model shape.
        pg_collection: Its `expt_tp` group splits the inner width of every expert.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit
        self.num_local_experts = num_local_experts
        self.etp_size = pg_collection.expt_tp.size()
        inner_size = config.moe_ffn_hidden_size // self.etp_size
        biases = {"has_bias": config.add_bias_linear, "etp_rank": pg_collection.expt_tp.rank()}
        self.linear_fc1 = GroupedLinear(
            num_experts=num_local_experts,
            in_size=config.hidden_size,
            out_size=2 * inner_size,
            partition_dim=1,
            dtype=config.params_dtype,
            **biases,
        )
        self.linear_fc2 = GroupedLinear(
            num_experts=num_local_experts,
            in_size=inner_size,
            out_size=config.hidden_size,
            partition_dim=2,
            dtype=config.params_dtype,
            **biases,
        )

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Expert outputs, weighted by the router.

        Args:
            tokens: [rows, hidden], sorted by expert.
            tokens_per_expert: [experts], rows of each.
            probs: [rows], weight of each row's expert.

        Returns:
            ([rows, hidden], None): partial sums over the expert tensor-parallel group, which the
            token dispatcher reduces; and no bias.
        """
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0).to(torch.int32)
        hidden = self.linear_fc1(tokens, ends)
        if self.linear_fc1.bias is not None:
            hidden = add_expert_bias(hidden, self.linear_fc1.bias, ends)
        output = self.linear_fc2(self._activate(hidden, probs), ends)
        if self.linear_fc2.bias is not None:
            output = add_expert_bias(
                output, self.linear_fc2.bias, ends, probs=probs, share=1 / self.etp_size
            )
        return output, None

    def _activate(self, hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Gates [rows, 2 * inner] -> [rows, inner], times the probabilities."""
        if is_swiglu(self.config):
            return swiglu(hidden, probs)
        return gated(hidden, self.config, probs)
