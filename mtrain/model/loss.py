"""Cross-entropy and token accuracy over a vocabulary that tensor-parallel ranks share.

Unlike Megatron-Core's, it leaves the padded rows of the vocabulary out of the softmax, so the loss
does not depend on the layout, and it tells which tokens were predicted right at no extra cost.
"""

import torch
import torch.distributed as dist

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
        scores = logits.to(torch.float32, copy=True)
        # A rank may hold padding alone, yet takes part in every collective.
        scores[:, num_words:] = -torch.inf
        highest = scores.amax(dim=1)
        if group.size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        scores -= highest[:, None]
        local_labels = labels - first_id
        is_local = (local_labels >= 0) & (local_labels < num_words)
        local_labels = local_labels.clamp_(0, logits.shape[1] - 1)[:, None]
        label_scores = scores.gather(1, local_labels).squeeze(1).masked_fill_(~is_local, 0.0)
        probabilities = scores.exp_()
        sums = torch.stack([label_scores, probabilities.sum(dim=1)])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        label_scores, denominator = sums.unbind()
        probabilities /= denominator[:, None]
        correct = label_scores >= 0  # scores are shifted: the likeliest word has 0
        ctx.save_for_backward(probabilities, local_labels, is_local)
        ctx.logits_dtype = logits.dtype
        ctx.mark_non_differentiable(correct)
        return denominator.log() - label_scores, correct

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_losses: torch.Tensor,
        _grad_correct: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None, None, None, None]:
        probabilities, local_labels, is_local = ctx.saved_tensors
        # The saved probabilities become the gradient in place: they are as large as the logits.
        probabilities.scatter_add_(1, local_labels, -is_local.float()[:, None])
        grad = probabilities.mul_(grad_losses[:, None]).to(ctx.logits_dtype)
        return grad, None, None, None, None
