"""Cross-entropy and token accuracy over a vocabulary that tensor-parallel ranks share.

Unlike Megatron-Core's, it leaves the padded rows of the vocabulary out of the softmax, so the loss
does not depend on the layout, and it tells which tokens were predicted right at no extra cost.
Logits stay in the dtype of the model: they are the largest tensor there is, so forward reads them
twice, backward reads them once and writes a gradient as large, and no float32 copy is ever made.
"""

import torch
import torch.distributed as dist
from megatron.core.jit import jit_fuser

IGNORED = -100


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
    first_id = tp_group.rank() * local_size
    num_words = max(0, min(local_size, vocab_size - first_id))
    flat_labels = labels.t().reshape(-1)
    losses, correct = _VocabParallelCrossEntropy.apply(
        logits.reshape(seq * batch, local_size), flat_labels, num_words, first_id, tp_group
    )
    has_label = flat_labels != IGNORED
    losses = torch.where(has_label, losses, 0.0)
    return losses.view(seq, batch).t(), (correct & has_label).view(seq, batch).t()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `[tokens, local_vocab]` logits of which the first `num_words` count."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_words: int,
        first_id: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local_labels = labels - first_id
        is_local = (local_labels >= 0) & (local_labels < num_words)
        local_labels = local_labels.clamp_(0, logits.shape[1] - 1)
        label_scores = logits.gather(1, local_labels[:, None]).squeeze(1).float()
        if num_words > 0:
            highest, denominator = _softmax_statistics(logits[:, :num_words])
        else:
            # A rank may hold padding alone, yet takes part in every collective.
            highest = torch.full_like(label_scores, -torch.inf)
            denominator = torch.zeros_like(label_scores)
        if group.size() > 1:
            local_highest = highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            denominator *= torch.exp(local_highest - highest)
        # Shifted: the likeliest word has score 0.
        label_scores = (label_scores - highest).masked_fill_(~is_local, 0.0)
        if group.size() > 1:
            sums = torch.stack([label_scores, denominator])
            dist.all_reduce(sums, group=group)
            label_scores, denominator = sums.unbind()
        correct = label_scores >= 0
        ctx.save_for_backward(logits, highest, denominator, local_labels, is_local)
        ctx.num_words = num_words
        ctx.mark_non_differentiable(correct)
        return denominator.log() - label_scores, correct

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_losses: torch.Tensor,
        _grad_correct: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None, None, None, None]:
        logits, highest, denominator, local_labels, is_local = ctx.saved_tensors
        label_or_none = torch.where(is_local, local_labels, -1)
        grad = _gradient(
            logits, highest, grad_losses / denominator, grad_losses, label_or_none, ctx.num_words
        )
        return grad, None, None, None, None


@jit_fuser
def _softmax_statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
