import pytest
import torch
import torch.nn.functional as F

from mtrain.model.loss import IGNORED, vocab_parallel_loss
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

SEQ, BATCH = 5, 2


def case(vocab_size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SEQ, BATCH, vocab_size, generator=generator) * 3
    labels = torch.randint(0, vocab_size, (BATCH, SEQ), generator=generator)
    labels[0, 0] = logits[0, 0].argmax()
    labels[1, 2] = IGNORED
    return logits, labels


def local_loss(state, vocab_size, padded_size):
    logits, labels = case(vocab_size)
    # Padded words would win every softmax if they took part.
    padded = F.pad(logits, (0, padded_size - vocab_size), value=50.0)
    size = padded_size // state.layout.tp_size
    local = padded.split(size, dim=-1)[state.coordinates.tp_rank].clone().requires_grad_()
    losses, correct = vocab_parallel_loss(
        local, labels, vocab_size=vocab_size, tp_group=state.groups.tp
    )
    (losses * torch.arange(1, 6)).sum().backward()
    return losses.detach(), correct, local.grad


@pytest.mark.parametrize(
    ("vocab_size", "padded_size", "tp_size"), [(11, 11, 1), (11, 12, 2), (7, 8, 4), (3, 8, 4)]
)
def test_loss_accuracy_and_gradient_equal_torch_whatever_the_split(
    vocab_size, padded_size, tp_size
):
    logits, labels = case(vocab_size)
    logits.requires_grad_()
    expected = F.cross_entropy(
        logits.permute(1, 2, 0), labels, ignore_index=IGNORED, reduction="none"
    )
    (expected * torch.arange(1, 6)).sum().backward()
    is_right = logits.argmax(-1).t() == labels
    results = run_ranks(
        ParallelLayout(world_size=tp_size, tp_size=tp_size), local_loss, vocab_size, padded_size
    )
    for losses, correct, _ in results:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(correct, is_right)
    grad = torch.cat([grad for _, _, grad in results], dim=-1)
    torch.testing.assert_close(grad[..., :vocab_size], logits.grad, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(grad[..., vocab_size:]) == 0


def test_all_tokens_ignored_gives_zero_loss_and_gradient():
    """T34: a micro-batch without labels."""
    (result,) = run_ranks(ParallelLayout(), loss_without_labels)
    losses, correct, grad = result
    assert torch.equal(losses, torch.zeros(BATCH, SEQ))
    assert not correct.any()
    assert torch.equal(grad, torch.zeros_like(grad))


def loss_without_labels(state):
    logits, labels = case(11)
    logits.requires_grad_()
    labels = torch.full_like(labels, IGNORED)
    losses, correct = vocab_parallel_loss(logits, labels, vocab_size=11, tp_group=state.groups.tp)
    losses.sum().backward()
    return losses.detach(), correct, logits.grad
