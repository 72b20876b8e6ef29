"""Cross-entropy and token accuracy over a vocabulary that tensor-parallel ranks share.

Unlike Megatron-Core's, it leaves the padded rows of the vocabulary out of the softmax, so the loss
does not depend on the layout, and it tells which tokens were predicted right at no extra cost.
Logits stay in the dtype of the model: they are the largest tensor there is, so the loss reads them
twice, the gradient reads them once and is written as large, and no float32 copy is ever made.

Training computes both chunk by chunk beside the product that makes the logits
(`mtrain.model.head`); `vocab_parallel_loss` is for logits that exist in full.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.jit import jit_fuser

__all__ = [
    "IGNORED",
    "LocalLabels",
    "SoftmaxStatistics",
    "local_labels",
    "logits_gradient",
    "losses_and_accuracy",
    "softmax_statistics",
    "statistics_and_gradient",
    "vocab_parallel_loss",
]

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLabels:
    """Labels as one rank of those that share the vocabulary sees them.

    Attributes:
        columns: int64 [tokens], the label's column in this rank's logits; -1 where it is another
            rank's word, or there is none.
        has_label: bool [tokens].
        num_words: How many of this rank's columns are words; the others are padding.
        group: The ranks.
    """

    columns: torch.Tensor
    has_label: torch.Tensor
    num_words: int
    group: dist.ProcessGroup

    def chunk(self, tokens: slice) -> LocalLabels:
        """Those of some tokens."""
        return dataclasses.replace(
            self, columns=self.columns[tokens], has_label=self.has_label[tokens]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxStatistics:
    """What the softmax of every token comes down to, over all ranks.

    Attributes:
        highest: float32 [tokens], the largest logit.
        denominator: float32 [tokens], sum of `exp(logit - highest)`.
        label_scores: float32 [tokens], the logit of the label; -inf without a label.
    """

    highest: torch.Tensor
    denominator: torch.Tensor
    label_scores: torch.Tensor


def local_labels(
    labels: torch.Tensor, *, local_size: int, vocab_size: int, tp_group: dist.ProcessGroup
) -> LocalLabels:
    """This rank's view of labels.

    Args:
        labels: int64 [tokens]; -100 where there is no loss.
        local_size: padded_vocab / tp_size.
        vocab_size: Words without padding.
        tp_group: Ranks that share the vocabulary.
    """
    first_id = tp_group.rank() * local_size
    num_words = max(0, min(local_size, vocab_size - first_id))
    columns = labels - first_id
    is_local = (columns >= 0) & (columns < num_words)
    return LocalLabels(
        columns=torch.where(is_local, columns, -1),
        has_label=labels != IGNORED,
        num_words=num_words,
        group=tp_group,
    )


def softmax_statistics(logits: torch.Tensor, labels: LocalLabels) -> SoftmaxStatistics:
    """The statistics of every token; one collective if ranks share the vocabulary.

    Args:
        logits: [tokens, padded_vocab / tp_size], this rank's part of the vocabulary.
        labels: Of these tokens.
    """
    scores = _label_scores(logits, labels)
    if labels.num_words > 0:
        highest, denominator = _of_one_rank(logits[:, : labels.num_words])
    else:
        # A rank may hold padding alone, yet takes part in the collective.
        highest, denominator = torch.full_like(scores, -torch.inf), torch.zeros_like(scores)
    return _over_ranks(highest, denominator, scores, labels.group)


def _label_scores(logits: torch.Tensor, labels: LocalLabels) -> torch.Tensor:
    """The logit of every label in float32; -inf where it is not this rank's."""
    scores = logits.gather(1, labels.columns.clamp(min=0)[:, None]).squeeze(1).float()
    return scores.masked_fill(labels.columns < 0, -torch.inf)


def _over_ranks(
    highest: torch.Tensor,
    denominator: torch.Tensor,
    scores: torch.Tensor,
    group: dist.ProcessGroup,
) -> SoftmaxStatistics:
    if group.size() > 1:
        local = torch.stack([highest, denominator, scores])
        every = local.new_empty(group.size() * 3, local.shape[1])
        dist.all_gather_into_tensor(every, local, group=group)
        all_highest, denominators, all_scores = every.view(-1, *local.shape).unbind(1)
        highest = all_highest.amax(dim=0)
        denominator = (denominators * torch.exp(all_highest - highest)).sum(dim=0)
        scores = all_scores.amax(dim=0)
    return SoftmaxStatistics(highest=highest, denominator=denominator, label_scores=scores)


def losses_and_accuracy(
    statistics: SoftmaxStatistics, labels: LocalLabels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses float32 [tokens] and correct bool [tokens]; 0 and False without a label."""
    losses = statistics.denominator.log() - (statistics.label_scores - statistics.highest)
    correct = labels.has_label & (statistics.label_scores >= statistics.highest)
    return torch.where(labels.has_label, losses, 0.0), correct


def logits_gradient(
    logits: torch.Tensor,
    statistics: SoftmaxStatistics,
    labels: LocalLabels,
    grad_losses: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the logits, in their shape and dtype; zero for padded words.

    Args:
        logits: As given to `softmax_statistics`.
        statistics: What it returned.
        labels: Of these tokens.
        grad_losses: float32 [tokens], the gradient of each loss; 0 without a label.
    """
    return _gradient(
        logits,
        statistics.highest,
        grad_losses / statistics.denominator,
        grad_losses,
        labels.columns,
        labels.num_words,
    )


def statistics_and_gradient(
    logits: torch.Tensor, labels: LocalLabels, grad_losses: torch.Tensor
) -> tuple[SoftmaxStatistics, torch.Tensor]:
    """Both at once, of logits that nobody wants afterwards: they may be overwritten.

    Compiled for a GPU, both are few kernels. On a CPU every operation is one, so there they work in
    place, and exponentials, the dearest of them, are computed once: a fifth of the time.

    Args:
        logits: [tokens, padded_vocab / tp_size], this rank's part of the vocabulary.
        labels: Of these tokens.
        grad_losses: float32 [tokens], the gradient of each loss; 0 without a label.
    """
    if logits.is_cuda:
        statistics = softmax_statistics(logits, labels)
        return statistics, logits_gradient(logits, statistics, labels, grad_losses)
    scores = _label_scores(logits, labels)
    values = logits.float()
    words = values[:, : labels.num_words]
    highest = words.amax(dim=1) if labels.num_words else torch.full_like(scores, -torch.inf)
    words.sub_(highest[:, None]).exp_()
    statistics = _over_ranks(highest, words.sum(dim=1), scores, labels.group)
    factor = grad_losses / statistics.denominator * (highest - statistics.highest).exp()
    words.mul_(factor[:, None])
    values[:, labels.num_words :] = 0.0
    local_losses = torch.where(labels.columns < 0, 0.0, grad_losses)
    values.scatter_add_(1, labels.columns.clamp(min=0)[:, None], -local_losses[:, None])
    return statistics, values.to(logits.dtype)


def vocab_parallel_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every token, and whether its label was the likeliest word.

    Args:
        logits: [seq, batch, padded_vocab / tp_size], this rank's part of the vocabulary.
        labels: int64 [batch, seq]; -100 where there is no loss.
        vocab_size: Words without padding.
        tp_group: Ranks that share the vocabulary.

    Returns:
        losses: float32 [batch, seq], 0 where the label is -100.
        correct: bool [batch, seq], False where the label is -100.
    """
    seq, batch, local_size = logits.shape
    losses, correct = _VocabParallelCrossEntropy.apply(
        logits.reshape(seq * batch, local_size), labels.t().reshape(-1), vocab_size, tp_group
    )
    return losses.view(seq, batch).t(), correct.view(seq, batch).t()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `[tokens, local_vocab]` logits."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ours = local_labels(
            labels, local_size=logits.shape[1], vocab_size=vocab_size, tp_group=group
        )
        statistics = softmax_statistics(logits, ours)
        losses, correct = losses_and_accuracy(statistics, ours)
        ctx.save_for_backward(logits)
        ctx.statistics, ctx.labels = statistics, ours
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_losses: torch.Tensor,
        _grad_correct: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None, None, None]:
        (logits,) = ctx.saved_tensors
        grad_losses = torch.where(ctx.labels.has_label, grad_losses, 0.0)
        grad = logits_gradient(logits, ctx.statistics, ctx.labels, grad_losses)
        return grad, None, None, None


@jit_fuser
def _of_one_rank(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum, and sum of exponentials shifted by it, of each row in float32."""
    scores = logits.float()
    highest = scores.amax(dim=1)
    return highest, (scores - highest[:, None]).exp().sum(dim=1)


@jit_fuser
def _gradient(
    logits: torch.Tensor,
    highest: torch.Tensor,
    scale: torch.Tensor,
    grad_losses: torch.Tensor,
    labels: torch.Tensor,
    num_words: int,
) -> torch.Tensor:
    """Softmax minus one-hot, times the gradient of each row's loss; zero for padding."""
    words = torch.arange(logits.shape[1], device=logits.device)
    grad = (logits.float() - highest[:, None]).exp() * scale[:, None]
    grad = grad - torch.where(words == labels[:, None], grad_losses[:, None], 0.0)
    return torch.where(words < num_words, grad, 0.0).to(logits.dtype)
