"""The gated delta net of Qwen3-Next, in the place of a layer's self-attention.

Megatron-Core's needs two packages with CUDA kernels and refuses packed documents. This one is torch
alone, keeps documents apart and names its parameters alike; rows of `in_proj.weight` on a rank are
`[query | key | value | gate | beta | decay]`, each of this rank's heads.

The one thing to know: all between the two projections is computed in float32 and computed again in
the backward pass, so that nothing of it is kept but the output of the first projection.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from mtrain.model.delta_rule import DocumentChunks, cut_into_chunks, gated_delta_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNetSubmodules:
    """The projections.

    Attributes:
        in_proj: A column-parallel linear, possibly with the norm before it.
        out_proj: A row-parallel linear.
    """

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class GatedDeltaNet(MegatronModule):
    """Linear attention by the gated delta rule, with a short convolution and a gated norm.

    Args:
        config: Model shape; `linear_*` describe the heads.
        submodules: The projections.
        layer_number: Number of the layer, from 1; unused, part of Megatron-Core's interface.
        cp_comm_type: Unused; context parallelism is not built.
        pg_collection: Its `tp` group shares the heads.

    Raises:
        ValueError: Tensor-parallel ranks cannot share the heads evenly.

    Source: `megatron.core.ssm.gated_delta_net` for names and the order of rows; transformers'
    `Qwen3NextGatedDeltaNet` for the computation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int | None = None,
        cp_comm_type: str | None = None,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1
        assert config.activation_func is F.silu
        self.rows = _local_rows(config, pg_collection.tp.size())
        self.key_head_dim = config.linear_key_head_dim
        self.value_head_dim = config.linear_value_head_dim
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sum(_rows(config)),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.conv1d = CausalConvolution(config, num_channels=sum(self.rows[:3]))
        self.A_log = _split_parameter(config, self.rows[-1])
        self.dt_bias = _split_parameter(config, self.rows[-1])
        self.out_norm = GatedNorm(config, pg_collection.tp)
        self.out_proj = build_module(
            submodules.out_proj,
            config.linear_num_value_heads * config.linear_value_head_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_of_attention: Any,
    ) -> tuple[torch.Tensor, None]:
        """Mixes tokens of the same document.

        Args:
            hidden_states: [seq, batch, hidden]; sequence-parallel: this rank's part.
            attention_mask: Must be None.
            packed_seq_params: Document boundaries of a pack, or None for rows that are right-padded
                (what is behind a token does not change it).
            **_of_attention: What Megatron-Core's layer hands to every kind of attention: rotary
                angles and what inference needs.

        Returns:
            The output, like `hidden_states`, and no bias.
        """
        assert attention_mask is None
        projected, _ = self.in_proj(hidden_states)
        packed = packed_seq_params
        chunks = cut_into_chunks(
            projected.shape[0],
            cu_seqlens=None if packed is None else packed.cu_seqlens_q,
            device=projected.device,
        )
        mixed = checkpoint(
            self._mix, projected, chunks, use_reentrant=False, preserve_rng_state=False
        )
        output, _ = self.out_proj(mixed)
        return output, None

    def _mix(self, projected: torch.Tensor, chunks: DocumentChunks) -> torch.Tensor:
        """[seq, batch, rows of in_proj] to [seq, batch, value_heads * value_dim]."""
        *mixed, gate, beta, decay = projected.split(self.rows, dim=-1)
        num_channels = sum(rows.shape[-1] for rows in mixed)
        convolved = self.conv1d(projected[..., :num_channels], chunks.positions)
        query, key, value = convolved.split(self.rows[:3], dim=-1)
        outputs = gated_delta_rule(
            query.unflatten(-1, (-1, self.key_head_dim)),
            key.unflatten(-1, (-1, self.key_head_dim)),
            value.unflatten(-1, (-1, self.value_head_dim)),
            log_decay=_log_decay(decay, self.A_log, self.dt_bias),
            beta=beta.float().sigmoid(),
            chunks=chunks,
        )
        normalised = self.out_norm(outputs, gate.unflatten(-1, (-1, self.value_head_dim)))
        return normalised.flatten(-2).to(projected.dtype)


class CausalConvolution(torch.nn.Module):
    """A channel's last few tokens of the same document, weighted and summed; then SiLU.

    Args:
        config: Gives the number of tokens and the dtype of the weight.
        num_channels: Channels on this rank.
    """

    def __init__(self, config: TransformerConfig, *, num_channels: int) -> None:
        super().__init__()
        self.weight = _split_parameter(config, num_channels, 1, config.linear_conv_kernel_dim)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[seq, batch, channels] and int64 [seq] in documents to float32 [seq, batch, channels]."""
        return _convolve(tokens, self.weight, positions)


class GatedNorm(torch.nn.Module):
    """Root-mean-square norm of each head, times the SiLU of a gate.

    Its weight is not zero-centred, also where the other norms of the model are.

    Args:
        config: Gives size and epsilon of the norm and the dtype of the weight.
        tp_group: Ranks that share the heads. Each holds the weight and has the gradient of its own
            heads. They are summed in the backward pass: what Megatron-Core sums after it, it finds
            by marks that only count under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight = torch.empty(config.linear_value_head_dim, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.epsilon = config.layernorm_epsilon
        self.tp_group = tp_group

    def forward(self, heads: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[..., head_dim] and a gate alike to float32 [..., head_dim]."""
        weight = copy_to_tensor_model_parallel_region(self.weight.float(), self.tp_group)
        return _norm_and_gate(heads, weight, gate, self.epsilon)


@jit_fuser
def _convolve(tokens: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Shifted copies and not a convolution, which would not see where documents begin."""
    seq_len, kernel_size = tokens.shape[0], weight.shape[-1]
    before = F.pad(tokens, (0, 0, 0, 0, kernel_size - 1, 0)).float()
    weight, positions = weight.squeeze(1).float(), positions[:, None, None]
    summed = tokens.float() * weight[:, -1]
    for distance in range(1, kernel_size):
        first = kernel_size - 1 - distance
        shifted = before[first : first + seq_len] * weight[:, first]
        summed = summed + torch.where(positions >= distance, shifted, 0.0)
    return F.silu(summed)


@jit_fuser
def _log_decay(decay: torch.Tensor, log_rate: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[seq, batch, heads], `A_log` and `dt_bias` [heads] to float32 [seq, batch, heads]."""
    return -log_rate.float().exp() * F.softplus(decay.float() + bias.float())


@jit_fuser
def _norm_and_gate(
    heads: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, epsilon: float
) -> torch.Tensor:
    heads = heads * torch.rsqrt(heads.square().mean(dim=-1, keepdim=True) + epsilon)
    return weight * heads * F.silu(gate.float())


def _split_parameter(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    """A parameter of which tensor-parallel ranks hold parts, and count it in the gradient norm."""
    device = torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
    return parameter


def _rows(config: TransformerConfig) -> tuple[int, ...]:
    """Rows of in_proj for query, key, value, gate, beta and decay."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return (keys, keys, values, values, *[config.linear_num_value_heads] * 2)


def _local_rows(config: TransformerConfig, tp_size: int) -> tuple[int, ...]:
    """The same on one rank."""
    num_key_heads, num_value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    if num_key_heads % tp_size or num_value_heads % num_key_heads:
        raise ValueError(
            f"--tensor_model_parallel_size {tp_size} cannot share {num_key_heads} key heads and "
            f"{num_value_heads} value heads of linear attention evenly; use a divisor of both"
        )
    return tuple(rows // tp_size for rows in _rows(config))
