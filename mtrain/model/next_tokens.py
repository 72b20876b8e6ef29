"""Multi-token prediction: Megatron-Core's layers, with inputs and labels shifted on the device.

The one thing to know: a layer sees the embedding of the token after each position. Behind the last
token of a document that is a token of the next one; only that last position notices, because
attention is causal, and it has no label. So nothing has to be cut into documents on the host, as
Megatron-Core does it.
"""

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import (
    MTPLossLoggingHelper,
    MultiTokenPredictionLayer,
)
from megatron.core.utils import make_viewless_tensor

from mtrain.model.loss import IGNORED


class NextTokenLayer(MultiTokenPredictionLayer):
    """One layer of multi-token prediction."""

    def _get_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        embedding: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The ids and positions of the tokens one further on, their embeddings, hidden states."""
        input_ids, position_ids = input_ids.roll(-1, dims=-1), position_ids.roll(-1, dims=-1)
        embedded = embedding(input_ids=input_ids, position_ids=position_ids)
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        return input_ids, position_ids, embedded, hidden_states


def next_labels(labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The labels one token further on; none behind the last token of a document.

    Args:
        labels: int64 [batch, seq], -100 for no loss.
        position_ids: int64 [batch, seq], from 0 in every document.
    """
    same_document = position_ids.roll(-1, dims=-1) == position_ids + 1
    return labels.roll(-1, dims=-1).masked_fill(~same_document, IGNORED)


def note_loss(losses: torch.Tensor, labels: torch.Tensor, *, layer: int, num_layers: int) -> None:
    """Adds the mean loss of a micro-batch to Megatron-Core's tracker, in training.

    Args:
        losses: float32 [batch, seq], 0 where there is no label.
        labels: int64 [batch, seq], -100 for no loss.
        layer: Which layer of multi-token prediction.
        num_layers: How many there are.
    """
    if torch.is_grad_enabled():
        mean = losses.detach().sum() / (labels != IGNORED).sum().clamp(min=1)
        MTPLossLoggingHelper.save_loss_to_tracker(mean, layer, num_layers)
