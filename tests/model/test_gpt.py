from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mtrain.config import TrainingConfig
from mtrain.model import head
from mtrain.model.head import linear_cross_entropy
from mtrain.parallel import ParallelLayout
from tests.megatron import load_model, packed_inputs
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.tiny import TINY, make_checkpoint

LENGTHS = [7, 1, 12, 20]
VOCAB = 131


def logits_and_loss(state, folder):
    (model,) = load_model(state, folder)
    inputs = packed_inputs(LENGTHS, VOCAB)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs)
        losses, correct = model(**inputs, labels=labels)
    return logits, losses, correct


def hugging_face_logits(folder, input_ids, lengths):
    """Each document on its own through Hugging Face's class, put side by side."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits for ids in input_ids[0].split(lengths)], dim=1)


@pytest.mark.shows("load", "torch")
@pytest.mark.parametrize("name", list(TINY))
def test_logits_loss_and_accuracy_equal_hugging_face(name, tmp_path):
    """T42, and T41's packed loss against unpacked documents."""
    folder = make_checkpoint(tmp_path, name)
    ((logits, losses, correct),) = run_ranks(ParallelLayout(), logits_and_loss, folder)
    inputs = packed_inputs(LENGTHS, VOCAB)
    expected = hugging_face_logits(folder, inputs["input_ids"], LENGTHS)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    labels = inputs["labels"]
    expected_loss = F.cross_entropy(expected.transpose(1, 2), labels, ignore_index=-100)
    num_labels = (labels != -100).sum()
    torch.testing.assert_close(losses.sum() / num_labels, expected_loss, rtol=1e-5, atol=0)
    assert torch.equal(correct, expected.argmax(-1) == labels)


def test_half_precision_stays_near_hugging_face(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    (logits,) = run_ranks(ParallelLayout(), bfloat16_logits, folder)
    expected = hugging_face_logits(folder, packed_inputs(LENGTHS, VOCAB)["input_ids"], LENGTHS)
    cosine = F.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0)
    assert cosine > 0.999


def bfloat16_logits(state, folder):
    (model,) = load_model(state, folder, dtype=torch.bfloat16)
    inputs = packed_inputs(LENGTHS, VOCAB)
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs)


def gradients_of_documents(state, folder: Path, other_document: bool):
    """Logits and embedding gradients of document 1 when document 0 is one or the other."""
    (model,) = load_model(state, folder)
    inputs = packed_inputs(LENGTHS, VOCAB)
    if other_document:
        inputs["input_ids"][0, :7] = (inputs["input_ids"][0, :7] + 1) % VOCAB
    labels = inputs.pop("labels")
    labels[0, :7] = -100
    embedded = []
    model.embedding.register_forward_hook(lambda _m, _i, output: embedded.append(output))
    losses, _ = model(**inputs, labels=labels)
    (grad,) = torch.autograd.grad(losses.sum(), embedded)
    return losses.detach(), grad


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_documents_of_a_pack_do_not_leak_into_each_other(name, tmp_path):
    """T41: another first document changes nothing about the rest, forward and backward."""
    folder = make_checkpoint(tmp_path, name)
    (first,) = run_ranks(ParallelLayout(), gradients_of_documents, folder, False)
    (second,) = run_ranks(ParallelLayout(), gradients_of_documents, folder, True)
    torch.testing.assert_close(first[0][:, 7:], second[0][:, 7:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first[1][7:], second[1][7:], rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(first[1][:7]) == 0


def packed_and_padded_losses(state, folder):
    """Losses of the same documents in one row, and in a row each with padding on the right."""
    (model,) = load_model(state, folder)
    inputs = packed_inputs(LENGTHS, VOCAB)
    longest = 8 * -(-max(LENGTHS) // 8)  # a multiple that sequence parallelism can cut

    def rows(name, fill):
        documents = inputs[name][0].split(LENGTHS)
        return torch.stack([F.pad(x, (0, longest - len(x)), value=fill) for x in documents])

    with torch.no_grad():
        packed, _ = model(**inputs)
        padded, _ = model(
            rows("input_ids", 0), rows("position_ids", 0), labels=rows("labels", -100)
        )
    real = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return packed[0], padded[real]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", ["llama3_tied", "qwen3_moe"])
def test_packed_documents_have_the_losses_of_padded_rows(name, tp_size, tmp_path):
    """T41."""
    folder = make_checkpoint(tmp_path, name)
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    for packed, padded in run_ranks(layout, packed_and_padded_losses, folder):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def gradient_with(state, folder, training):
    (model,) = load_model(state, folder, training=training)
    model.train()
    losses, _ = model(**packed_inputs(LENGTHS, VOCAB))
    losses.sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    "training",
    [
        TrainingConfig(recompute_granularity="full"),
        TrainingConfig(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=2
        ),
        TrainingConfig(recompute_granularity="selective"),
        TrainingConfig(recompute_granularity="selective", recompute_modules=("mlp",)),
    ],
    ids=["full", "block", "core_attn", "mlp"],
)
def test_recomputation_does_not_change_gradients(name, training, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    (expected,) = run_ranks(ParallelLayout(), gradient_with, folder, TrainingConfig())
    (grads,) = run_ranks(ParallelLayout(), gradient_with, folder, training)
    for parameter, grad in expected.items():
        assert torch.equal(grads[parameter], grad), parameter


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_recomputed_norms_change_gradients_by_rounding_alone(name, tmp_path):
    """A norm on the CPU hands its input two gradients; recomputed, it adds them up first, so the
    sum with the residual's gradient is rounded in another order."""
    folder = make_checkpoint(tmp_path, name)
    norms = TrainingConfig(recompute_granularity="selective", recompute_modules=("layernorm",))
    (expected,) = run_ranks(ParallelLayout(), gradient_with, folder, TrainingConfig())
    (grads,) = run_ranks(ParallelLayout(), gradient_with, folder, norms)
    for parameter, grad in expected.items():
        assert (grads[parameter] - grad).abs().max() <= 2e-6 * grad.abs().max(), parameter


def gradients_of_rows(state, folder, selects, freezes_head, num_next_tokens, sequence_parallel):
    """Losses, accuracy, gradients, and how many tokens went through the head, of rows."""
    (model,) = load_model(
        state, folder, num_next_tokens=num_next_tokens, sequence_parallel=sequence_parallel
    )
    if freezes_head:
        model.output_layer.requires_grad_(False)
    model.train()
    documents = [packed_inputs([16], VOCAB, seed=seed) for seed in range(3)]
    input_ids = torch.cat([document["input_ids"] for document in documents])
    labels = torch.cat([document["labels"] for document in documents])
    # Left are the first positions of rows, the last that can have one, and a row without any.
    labels[:, 3:9] = labels[1] = -100
    positions = (labels.flatten() != -100).nonzero().squeeze(1) if selects else None
    num_tokens = []

    def counted(hidden, *arguments, **options):
        num_tokens.append(len(hidden))
        return linear_cross_entropy(hidden, *arguments, **options)

    with mock.patch.object(head, "linear_cross_entropy", counted):
        losses, correct = model(
            input_ids, torch.arange(16).repeat(3, 1), labels=labels, label_positions=positions
        )
    losses.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return losses.detach(), correct, gradients, num_tokens


def gradients_of_filled_rows(state, folder, *options):
    """As on a GPU, where products have few sizes."""
    with mock.patch.object(head, "_row_multiple", lambda _device: 8):
        return gradients_of_rows(state, folder, True, *options)


@pytest.mark.parametrize(
    ("name", "tp_size", "sequence_parallel", "freezes_head"),
    [
        ("qwen3", 1, False, False),
        ("qwen3", 1, False, True),
        ("llama3_tied", 1, False, False),
        ("qwen3", 2, False, False),
        ("qwen3", 2, True, True),
        ("llama3_tied", 2, True, False),
    ],
)
def test_positions_without_a_label_need_not_go_through_the_head(
    name, tp_size, sequence_parallel, freezes_head, tmp_path
):
    folder = make_checkpoint(tmp_path, name)
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    options = (freezes_head, 0, sequence_parallel)
    everywhere = run_ranks(layout, gradients_of_rows, folder, False, *options)
    selected = run_ranks(layout, gradients_of_rows, folder, True, *options)
    with_more = run_ranks(layout, gradients_of_filled_rows, folder, *options)
    for expected, result, filled in zip(everywhere, selected, with_more, strict=True):
        assert (expected[3], result[3], filled[3]) == ([48], [18], [24])
        assert_same_training(result, expected)
        assert_same_training(filled, expected)


def gradients_without_labels(state, folder, sequence_parallel):
    (model,) = load_model(state, folder, sequence_parallel=sequence_parallel)
    inputs = packed_inputs([16], VOCAB)
    inputs["labels"].fill_(-100)
    losses, correct = model(**inputs, label_positions=torch.empty(0, dtype=torch.int64))
    losses.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return losses.detach(), correct, [grad is not None and not grad.any() for grad in gradients]


@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["1", "tp2", "sp2"]
)
def test_without_any_label_all_gradients_are_zero(tp_size, sequence_parallel, tmp_path):
    """T34: not missing, and no rank waits for another."""
    folder = make_checkpoint(tmp_path, "qwen3")
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    for losses, correct, are_zero in run_ranks(
        layout, gradients_without_labels, folder, sequence_parallel
    ):
        assert torch.equal(losses, torch.zeros(1, 16))
        assert not correct.any()
        assert all(are_zero)


@pytest.mark.parametrize("name", ["glm4_moe", "mimo"])
def test_further_tokens_are_predicted_from_the_positions_before(name, tmp_path):
    """Those have labels there, whether they have one for the next token or not."""
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    options = (False, 1, False)
    (expected,) = run_ranks(ParallelLayout(), gradients_of_rows, folder, False, *options)
    (result,) = run_ranks(ParallelLayout(), gradients_of_rows, folder, True, *options)
    assert (expected[3], result[3]) == ([48, 48], [18, 18])
    assert_same_training(result, expected)


def assert_same_training(result, expected):
    losses, correct, gradients, _ = expected
    torch.testing.assert_close(result[0], losses, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[1], correct)
    assert result[2].keys() == gradients.keys()
    for name, grad in gradients.items():
        assert (result[2][name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
