"""Tokens on their way to experts and back, where all experts are on this rank.

The one thing to know: how many rows there are follows from the shapes (tokens times experts a
token), so the host never waits for the router, and both directions are gathers: from tokens to rows
by the token of each row, from rows to tokens by the rows of each token. Megatron-Core's own way,
made for exchange between ranks, asks the GPU twice how many rows there are, sorts what is sorted
and adds rows up with atomics.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import FunctionCtx, once_differentiable

from mtrain.platform.device import has_triton

__all__ = ["ExpertLayer", "LocalTokenDispatcher", "Routes", "find_routes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Who goes where; rows are sorted by expert, and by token within an expert.

    Attributes:
        experts: int64 [tokens, k], the experts of each token, ascending.
        rows: int64 [tokens, k], the row of a token for each of them.
        places: int64 [tokens * k], for each row its place in the flattened `rows`.
        num_rows_of_experts: int64 [experts].
    """

    experts: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    num_rows_of_experts: torch.Tensor


def find_routes(routing_map: torch.Tensor, experts_per_token: int) -> Routes:
    """Sorts without asking the device how much there is.

    Args:
        routing_map: bool [tokens, experts], `experts_per_token` of each row True.
        experts_per_token: k.
    """
    num_tokens, num_experts = routing_map.shape
    num_rows = num_tokens * experts_per_token
    by_expert = routing_map.t().reshape(-1)
    row_of_pair = by_expert.cumsum(0).view(num_experts, num_tokens) - 1
    pairs = torch.nonzero_static(routing_map, size=num_rows)
    rows = row_of_pair[pairs[:, 1], pairs[:, 0]]
    places = torch.empty_like(rows)
    places[rows] = torch.arange(num_rows, device=rows.device)
    return Routes(
        experts=pairs[:, 1].view(num_tokens, experts_per_token),
        rows=rows.view(num_tokens, experts_per_token),
        places=places,
        num_rows_of_experts=routing_map.sum(dim=0),
    )


class _ToRows(torch.autograd.Function):
    """Tokens [tokens, hidden] -> rows [tokens * k, hidden]."""

    @staticmethod
    def forward(ctx: FunctionCtx, tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        return _rows_of(tokens, routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grad, ctx.routes), None


class _ToTokens(torch.autograd.Function):
    """Rows [tokens * k, hidden] -> their sums [tokens, hidden]."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        return _summed(rows, routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _rows_of(grad, ctx.routes), None


def _rows_of(tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
    return tokens.index_select(0, routes.places // routes.rows.shape[1])


def _summed(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    if rows.is_cuda and has_triton():
        from mtrain.model.kernels.gather_sum import gather_sum

        return gather_sum(rows.contiguous(), routes.rows)
    gathered = rows.index_select(0, routes.rows.reshape(-1))
    return gathered.view(*routes.rows.shape, -1).sum(dim=1, dtype=torch.float32).to(rows.dtype)


class LocalTokenDispatcher(MoETokenDispatcher):
    """Gives every expert its tokens and adds up what comes back; nothing leaves the rank."""

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for the experts.

        Args:
            hidden_states: [seq, batch, hidden].
            routing_map: bool [tokens, experts].
            probs: [tokens, experts], weights of the experts; 0 for others.

        Returns:
            Rows [tokens * k, hidden] and the weight of each [tokens * k].
        """
        self.hidden_shape = hidden_states.shape
        self.routes = find_routes(routing_map, self.config.moe_router_topk)
        rows = _ToRows.apply(hidden_states.view(-1, hidden_states.shape[-1]), self.routes)
        chosen = probs.gather(1, self.routes.experts)
        return rows, chosen.reshape(-1).index_select(0, self.routes.places)

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing to send."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, rows of each expert int64 [experts], and weights."""
        return hidden_states, self.routes.num_rows_of_experts, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to sort."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to send."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows [tokens * k, hidden] -> [seq, batch, hidden]."""
        output = _ToTokens.apply(hidden_states, self.routes)
        self.routes = None
        return output.view(self.hidden_shape)


class ExpertLayer(MoELayer):
    """Megatron-Core's layer with experts, which keeps tokens that need not travel at home.

    Attributes:
        sorts_by_kernel: Whether Transformer Engine sorts tokens by expert.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        # As Megatron-Core does where none are given.
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, *args, pg_collection=groups, **kwargs)
        stays = _can_stay(config, num_ranks=groups.tp_ep.size())
        if stays:
            self.token_dispatcher = LocalTokenDispatcher(config, groups)
        self.sorts_by_kernel = config.moe_permute_fusion and not stays

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron-Core's, which sorts tokens by expert.

        Args:
            hidden_states: [seq, batch, hidden].
            probs: [tokens, experts], weights of the experts; 0 for others.
            routing_map: bool [tokens, experts].

        Returns:
            Rows and their weights, as far as they are ready to be sent.
        """
        if self.sorts_by_kernel and probs.requires_grad and not hidden_states.requires_grad:
            # Transformer Engine's kernel gives weights a gradient with that of tokens only.
            hidden_states = hidden_states.detach().requires_grad_()
        return super().preprocess(hidden_states, probs, routing_map)


def _can_stay(config: TransformerConfig, *, num_ranks: int) -> bool:
    return (
        num_ranks == 1
        and config.moe_token_dispatcher_type == "alltoall"
        # Dropped tokens would leave as many rows as only the device knows.
        and config.moe_expert_capacity_factor is None
        # Its second stream is run from within the exchange.
        and not config.moe_shared_expert_overlap
    )
