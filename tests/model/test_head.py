from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.profiler import profile

from mtrain.model.head import linear_cross_entropy
from mtrain.model.loss import IGNORED, vocab_parallel_loss
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks

ONE = ParallelLayout()
TOKENS, HIDDEN = 13, 6
SCALE = 0.25
# Of float32 logits with a vocabulary of 12: two tokens.
TWO_TOKENS = 2 * 12 * 4


@dataclass(frozen=True, slots=True)
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor


def case(vocab_size, *, num_tokens=TOKENS, hidden_size=HIDDEN):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator)
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    # Some are the likeliest word.
    labels[1::4] = (hidden @ weight.t()).argmax(1)[1::4]
    labels[2::5] = IGNORED
    return Case(hidden, weight, labels)


def gradients_by_torch(made, grad_losses):
    hidden, weight = made.hidden.clone().requires_grad_(), made.weight.clone().requires_grad_()
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits, made.labels, ignore_index=IGNORED, reduction="none")
    losses.backward(grad_losses)
    return losses.detach(), logits.argmax(1) == made.labels, hidden.grad, weight.grad


def local_weight(weight, padded_size, state):
    # Padded words would win every softmax if they took part.
    padded = F.pad(weight, (0, 0, 0, padded_size - len(weight)), value=9.0)
    return padded.chunk(state.layout.tp_size)[state.coordinates.tp_rank].clone()


def split_over_ranks(state, vocab_size, padded_size, chunk_bytes, trains_weight, grad_losses):
    made = case(vocab_size)
    hidden = made.hidden.clone().requires_grad_()
    weight = local_weight(made.weight, padded_size, state).requires_grad_(trains_weight)
    losses, correct = linear_cross_entropy(
        hidden,
        weight,
        made.labels,
        vocab_size=vocab_size,
        tp_group=state.groups.tp,
        chunk_bytes=chunk_bytes,
    )
    losses.backward(grad_losses)
    return losses.detach(), correct, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_bytes", [1, TWO_TOKENS, 10**9])
@pytest.mark.parametrize(
    ("vocab_size", "padded_size", "tp_size"), [(11, 12, 1), (11, 12, 2), (7, 8, 4), (3, 8, 4)]
)
def test_losses_and_gradients_equal_torch_whatever_the_chunks_and_the_split(
    vocab_size, padded_size, tp_size, chunk_bytes
):
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    grad_losses = torch.full((TOKENS,), SCALE)
    expected = gradients_by_torch(case(vocab_size), grad_losses)
    ranks = run_ranks(
        layout, split_over_ranks, vocab_size, padded_size, chunk_bytes, True, grad_losses
    )
    for losses, correct, _, _ in ranks:
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(correct, expected[1])
    hidden_grad = sum(rank[2] for rank in ranks)
    torch.testing.assert_close(hidden_grad, expected[2], rtol=1e-5, atol=1e-6)
    weight_grad = torch.cat([rank[3] for rank in ranks])
    torch.testing.assert_close(weight_grad[:vocab_size], expected[3], rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(weight_grad[vocab_size:]) == 0


def test_under_a_frozen_weight_every_loss_may_have_a_gradient_of_its_own():
    grad_losses = torch.arange(TOKENS) - 3.0
    [(_, _, hidden_grad, weight_grad)] = run_ranks(
        ONE, split_over_ranks, 11, 12, TWO_TOKENS, False, grad_losses
    )
    expected = gradients_by_torch(case(11), grad_losses)
    torch.testing.assert_close(hidden_grad, expected[2], rtol=1e-5, atol=1e-6)
    assert weight_grad is None


def test_a_trained_weight_has_no_gradient_of_losses_that_count_differently():
    """Rather NaN, which stops training, than a wrong one."""
    [(_, _, _, weight_grad)] = run_ranks(
        ONE, split_over_ranks, 11, 12, TWO_TOKENS, True, torch.arange(TOKENS) - 3.0
    )
    assert weight_grad.isnan().all()


def without_tokens(state):
    made = case(11, num_tokens=0)
    hidden, weight = made.hidden.requires_grad_(), made.weight.requires_grad_()
    losses, correct = linear_cross_entropy(
        hidden, weight, made.labels, vocab_size=11, tp_group=state.groups.tp
    )
    losses.sum().backward()
    return losses.sum().item(), correct.shape, hidden.grad.shape, weight.grad


def test_without_tokens_gradients_are_zero_and_not_missing():
    [(loss, correct_shape, hidden_shape, weight_grad)] = run_ranks(ONE, without_tokens)
    assert (loss, correct_shape, hidden_shape) == (0.0, (0,), (0, HIDDEN))
    assert torch.equal(weight_grad, torch.zeros(11, HIDDEN))


def accumulated(state, dtype, promised, has_other_gradient, num_tokens):
    """What is in `main_grad`, which held ones, and what autograd got."""
    made = case(11, num_tokens=num_tokens)
    hidden = made.hidden.to(dtype).requires_grad_()
    weight = made.weight.to(dtype).requires_grad_()
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    losses, _ = linear_cross_entropy(
        hidden,
        weight,
        made.labels,
        vocab_size=11,
        tp_group=state.groups.tp,
        loss_gradient=torch.tensor(promised),
        has_other_gradient=has_other_gradient,
        chunk_bytes=TWO_TOKENS,
    )
    (losses.sum() * SCALE).backward()
    is_placeholder = weight.grad is not None
    if is_placeholder:
        assert weight.grad.data_ptr() == weight.main_grad.data_ptr(), "it took memory"
    return weight.main_grad, hidden.grad, is_placeholder, weight.grad_added_to_main_grad


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_the_gradient_of_the_weight_is_added_to_the_main_gradient(dtype, tolerance):
    [(main_grad, hidden_grad, is_placeholder, is_added)] = run_ranks(
        ONE, accumulated, dtype, SCALE, False, TOKENS
    )
    expected = gradients_by_torch(case(11), torch.full((TOKENS,), SCALE))
    assert main_grad.dtype == torch.float32
    largest = expected[3].abs().max()
    assert (main_grad - 1 - expected[3]).abs().max() <= tolerance * largest
    assert (hidden_grad - expected[2]).abs().max() <= tolerance * expected[2].abs().max()
    assert is_placeholder
    assert is_added


def test_another_gradient_of_the_same_weight_is_left_to_data_parallelism():
    [(main_grad, _, is_placeholder, is_added)] = run_ranks(
        ONE, accumulated, torch.float32, SCALE, True, TOKENS
    )
    expected = gradients_by_torch(case(11), torch.full((TOKENS,), SCALE))
    torch.testing.assert_close(main_grad - 1, expected[3], rtol=1e-5, atol=1e-6)
    assert not is_placeholder
    assert not is_added


def test_without_tokens_the_main_gradient_stays_as_it_was():
    [(main_grad, _, is_placeholder, is_added)] = run_ranks(
        ONE, accumulated, torch.float32, SCALE, False, 0
    )
    assert torch.equal(main_grad, torch.ones(11, HIDDEN))
    assert is_placeholder
    assert is_added


def test_a_gradient_that_was_not_promised_shows_as_nan():
    """Forward added to the main gradient what backward cannot take back."""
    [(main_grad, _, _, _)] = run_ranks(ONE, accumulated, torch.float32, SCALE * 1.01, False, TOKENS)
    assert main_grad.isnan().any()


def evaluated(state):
    made = case(11)
    weight = made.weight.requires_grad_()
    weight.main_grad = torch.ones(weight.shape)
    with torch.no_grad():
        linear_cross_entropy(
            made.hidden,
            weight,
            made.labels,
            vocab_size=11,
            tp_group=state.groups.tp,
            loss_gradient=torch.tensor(SCALE),
        )
    return weight.main_grad


def test_evaluation_leaves_the_main_gradient_alone():
    [main_grad] = run_ranks(ONE, evaluated)
    assert torch.equal(main_grad, torch.ones(11, HIDDEN))


def without_contents(state):
    with FakeTensorMode():
        made = case(11, num_tokens=TOKENS)
        hidden, weight = made.hidden.requires_grad_(), made.weight.requires_grad_()
        weight.main_grad = torch.zeros(weight.shape)
        losses, _ = linear_cross_entropy(
            hidden,
            weight,
            made.labels,
            vocab_size=11,
            tp_group=state.groups.tp,
            loss_gradient=torch.full((), SCALE),
            chunk_bytes=TWO_TOKENS,
        )
        losses.sum().backward()
        return tuple(hidden.grad.shape)


def test_nothing_waits_for_a_number_of_the_device():
    """Tensors without contents fail at whatever would have to wait for a GPU's."""
    assert run_ranks(ONE, without_contents) == [(TOKENS, HIDDEN)]


def peak_bytes(function):
    """The most that was allocated at a time while a function ran, beyond what was before."""
    with profile(profile_memory=True) as profiled:
        function()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def peaks(state, vocab_size, num_tokens, chunk_bytes):
    made = case(vocab_size, num_tokens=num_tokens)
    hidden, weight = made.hidden.requires_grad_(), made.weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    weight.grad_added_to_main_grad = False

    def chunked():
        losses, _ = linear_cross_entropy(
            hidden,
            weight,
            made.labels,
            vocab_size=vocab_size,
            tp_group=state.groups.tp,
            loss_gradient=torch.tensor(SCALE),
            chunk_bytes=chunk_bytes,
        )
        (losses.sum() * SCALE).backward()

    def in_full():
        logits = (hidden @ weight.t())[:, None]
        losses, _ = vocab_parallel_loss(
            logits, made.labels[None], vocab_size=vocab_size, tp_group=state.groups.tp
        )
        losses.sum().backward()

    return peak_bytes(chunked), peak_bytes(in_full)


def test_memory_is_bounded_by_the_chunk():
    """Logits of 512 tokens are 20 MB; of a chunk 1 MB, and beside it its gradient is made."""
    vocab_size, num_tokens, chunk_bytes = 10_000, 512, 2**20
    [(chunked, in_full)] = run_ranks(ONE, peaks, vocab_size, num_tokens, chunk_bytes)
    assert in_full > 2 * 4 * vocab_size * num_tokens
    # Without compiler the gradient takes some temporaries.
    assert chunked < 5 * chunk_bytes
