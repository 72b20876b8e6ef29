import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from mtrain.model.delta_rule import CHUNK_SIZE, _States, cut_into_chunks, gated_delta_rule

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 8, 12
LENGTHS = [1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE, 300]
PACKS = [
    [70, 1, 57, 128, 3],
    [64, 64, 65, 63],
    [1] * 130,
    [5, 300, 2, 140, 7],
    [200],
    [30, 0, 40, 0, 0, 100],
    [128] * 4,
    [1] * 130 + [700],
]


@pytest.fixture(autouse=True)
def eager():
    """Where a test imported Megatron-Core before mtrain did, it would compile on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def random_inputs(seq_len, *, batch=1, seed=0, dtype=torch.float32):
    """Query, key, value, log_decay, beta."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(seq_len, batch, *shape, generator=generator, dtype=dtype)

    return [
        normal(KEY_HEADS, KEY_DIM),
        normal(KEY_HEADS, KEY_DIM),
        normal(VALUE_HEADS, VALUE_DIM),
        -normal(VALUE_HEADS).exp() * 0.3,
        normal(VALUE_HEADS).sigmoid(),
    ]


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ours(inputs, cu_seqlens=None):
    query, key, value, log_decay, beta = inputs
    chunks = cut_into_chunks(query.shape[0], cu_seqlens=cu_seqlens, device=query.device)
    return gated_delta_rule(query, key, value, log_decay=log_decay, beta=beta, chunks=chunks)


def judged(inputs, lengths=None, rule=torch_recurrent_gated_delta_rule):
    """Each document alone through Hugging Face's function."""
    documents = zip(*(x.split(lengths or [x.shape[0]]) for x in inputs), strict=True)
    outputs = [
        rule(*(x.transpose(0, 1) for x in document), use_qk_l2norm_in_kernel=True)[0]
        for document in documents
        if document[0].shape[0]
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def with_gradients(function, inputs, *args):
    """The output, and gradients of a random weighting of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(leaves, *args)
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return output.detach(), *torch.autograd.grad((output * weighting).sum(), leaves)


def assert_near(results, expected, tolerance=1e-5):
    for result, judge in zip(results, expected, strict=True):
        assert result.shape == judge.shape
        torch.testing.assert_close(result, judge, rtol=0, atol=tolerance * float(judge.abs().max()))


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_equal_the_rule_token_by_token(length):
    inputs = random_inputs(length, batch=2)
    assert_near(with_gradients(ours, inputs), with_gradients(judged, inputs))


@pytest.mark.parametrize("length", [1, 64, 150])
def test_rows_equal_hugging_faces_chunks(length):
    inputs = random_inputs(length, batch=3)
    expected = with_gradients(judged, inputs, None, torch_chunk_gated_delta_rule)
    assert_near(with_gradients(ours, inputs), expected)


@pytest.mark.parametrize("lengths", PACKS)
def test_packed_documents_equal_each_document_alone(lengths):
    inputs = random_inputs(sum(lengths))
    results = with_gradients(ours, inputs, boundaries(lengths))
    assert_near(results, with_gradients(judged, inputs, lengths))


@pytest.mark.parametrize("padding", [1, 40, 200])
def test_padding_behind_the_documents_changes_none_of_them(padding):
    """Also where it is longer than any document."""
    lengths = [70, 1, 60]
    total = sum(lengths)
    inputs = random_inputs(total + padding)
    output = ours(inputs, boundaries(lengths))
    assert torch.isfinite(output).all()
    assert_near([output[:total]], [judged([x[:total] for x in inputs], lengths)])


def test_another_first_document_changes_no_bit_of_the_others():
    lengths = [100, 20, 90, 130]
    first, second = random_inputs(sum(lengths)), random_inputs(sum(lengths), seed=1)
    for mine, other in zip(first, second, strict=True):
        other[100:] = mine[100:]
    second[3][:100] *= 1000  # decays that would swallow the digits of all sums they are in
    results = [with_gradients(ours, x, boundaries(lengths)) for x in (first, second)]
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine[100:], other[100:])
        assert not torch.equal(mine[:100], other[:100])


def test_the_gradient_of_a_document_reaches_no_other():
    lengths = [100, 20, 90, 130]
    inputs = [x.requires_grad_() for x in random_inputs(sum(lengths))]
    output = ours(inputs, boundaries(lengths))
    for grad in torch.autograd.grad(output[120:210].sum(), inputs):
        assert torch.count_nonzero(grad[:120]) == 0
        assert torch.count_nonzero(grad[210:]) == 0
        assert torch.count_nonzero(grad[120:210]) > 0


def test_keys_that_are_all_alike_stay_accurate():
    """Their triangular matrix has powers of 10^18, and an inverse of small numbers."""
    inputs = random_inputs(3 * CHUNK_SIZE)
    inputs[1] = inputs[1][:1].expand_as(inputs[1]).clone()
    inputs[3], inputs[4] = inputs[3] * 1e-4, torch.full_like(inputs[4], 0.99)
    assert_near([ours(inputs)], [judged(inputs)])


@pytest.mark.parametrize("step", [1, 9])
def test_strong_decays_take_no_digits(step):
    """The function of Hugging Face's that has chunks loses three here, and more of gradients."""
    inputs = random_inputs(200)
    inputs[3][::step] *= 1000
    assert_near(with_gradients(ours, inputs), with_gradients(judged, inputs))


def test_half_precision_is_computed_in_float32():
    inputs = [x.bfloat16() for x in random_inputs(100)]
    inputs[3] = inputs[3].float()
    output = ours(inputs)
    assert output.dtype == torch.float32
    assert torch.equal(output, ours([x.float() for x in inputs]))


def test_shapes_follow_from_numbers_of_the_host():
    """Tensors without contents fail at whatever would have to wait for a GPU's."""
    with FakeTensorMode():
        inputs = random_inputs(300)
        cu_seqlens = torch.empty(6, dtype=torch.int32)
        assert with_gradients(ours, inputs, cu_seqlens)[0].shape == (300, 1, 6, 12)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 9, 12, 40])
def test_states_in_groups_equal_one_after_the_other(num_chunks):
    generator = torch.Generator().manual_seed(0)
    transition = torch.randn(num_chunks, 2, 3, 5, 5, generator=generator, dtype=torch.float64) / 4
    transition[::5] = 0
    contribution = torch.randn(num_chunks, 2, 3, 5, 4, generator=generator, dtype=torch.float64)
    states = [torch.zeros_like(contribution[0])]
    for a, b in zip(transition[:-1], contribution[:-1], strict=True):
        states.append(a @ states[-1] + b)
    torch.testing.assert_close(_States.apply(transition, contribution), torch.stack(states))
    arguments = (transition.requires_grad_(), contribution.requires_grad_())
    assert torch.autograd.gradcheck(_States.apply, arguments, fast_mode=True)


def test_positions_count_from_each_documents_beginning():
    chunks = cut_into_chunks(9, cu_seqlens=boundaries([4, 1, 2]), device=torch.device("cpu"))
    assert chunks.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 1]
