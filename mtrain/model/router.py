"""The router of expert layers: Megatron-Core's, whose balance no layout and no padding changes.

The one thing to know: with a padding mask, losses are means over the real tokens of the whole
sequence. Sequence-parallel ranks hold different numbers of those, or none.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class BalancedRouter(TopKRouter):
    """Top-k router. Megatron-Core's z-loss is a mean of the means of sequence-parallel ranks.

    Args:
        config: Model shape.
        pg_collection: Process groups.
        group_scores: Best scores of a group of experts whose sum decides whether the group is
            chosen from; None for Megatron-Core's `topk / group_topk`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        group_scores: int | None = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        if group_scores is not None:
            # Megatron-Core's hook to replay a choice serves to make another one.
            self.router_replay = _GroupChoice(group_scores)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice of experts, with balance losses attached to the weights.

        Args:
            logits: [seq, batch, experts], this rank's part of the sequence.
            padding_mask: bool [seq, batch], True at padding. Where all of the sequence is padding,
                nothing is balanced.
        """
        self._num_tokens: torch.Tensor | None = None
        if padding_mask is not None:
            self._num_tokens = (~padding_mask).sum()
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(self._num_tokens, group=self.tp_cp_group)
            # A mean over no tokens is NaN: for pure padding take all of them, times zero below.
            padding_mask = padding_mask & (self._num_tokens > 0)
        return super().routing(logits, padding_mask)

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attaches the z-loss to logits [tokens, experts]."""
        coefficient = self.config.moe_z_loss_coeff
        is_used = coefficient is not None and self.training and torch.is_grad_enabled()
        if padding_mask is None or not is_used:
            return super().apply_z_loss(logits, padding_mask)
        squares = logits.logsumexp(dim=-1).square() * ~padding_mask
        # This rank's summand of the mean; the gradient is summed over the ranks.
        share = squares.sum() * (self._num_tokens > 0) / self._num_tokens.clamp(min=1)
        num_layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        save_to_aux_losses_tracker(
            "z_loss", share * self.tp_cp_group.size(), self.layer_number, num_layers
        )
        return MoEAuxLossAutoScaler.apply(logits, coefficient * share)

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        """Megatron-Core's, with a loss of 0 for pure padding."""
        if self._num_tokens is not None:
            aux_loss = aux_loss * (self._num_tokens > 0)
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        """Counts the tokens of each expert; Megatron-Core's fails on a mask of tokens."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)


class _GroupChoice:
    """Chooses experts from the groups with the best sums of their `num_scores` best scores."""

    def __init__(self, num_scores: int) -> None:
        self.num_scores = num_scores

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        _default: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [tokens, experts] -> the best [tokens, topk] of the chosen groups and where."""
        assert num_groups is not None
        assert group_topk is not None
        grouped = scores.view(scores.shape[0], num_groups, -1)
        group_scores = grouped.topk(self.num_scores, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(group_topk, dim=-1, sorted=False).indices
        is_out = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        return grouped.masked_fill(is_out[:, :, None], -torch.inf).flatten(1).topk(topk, dim=1)
