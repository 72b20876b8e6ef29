"""Multi-token prediction against a reference made of Hugging Face's own layers."""

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from mtrain.model.next_tokens import next_labels
from mtrain.parallel import ParallelLayout
from tests.megatron import load_model, packed_inputs
from tests.next_tokens import NAMES, make_checkpoint_with_next_tokens
from tests.ranks import run_ranks

LENGTHS = [7, 1, 12, 20]
VOCAB = 131


def test_labels_move_one_token_on_inside_of_a_document():
    labels = torch.tensor([[10, 11, -100, 20, -100, 30, 31, -100]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    once = next_labels(labels, positions)
    assert once.tolist() == [[11, -100, -100, -100, -100, 31, -100, -100]]
    assert next_labels(once, positions).tolist() == [[-100] * 8]


def test_rows_end_where_their_padding_ends():
    labels = torch.tensor([[10, 11, 12], [20, -100, -100]])
    positions = torch.arange(3).expand(2, 3)
    assert next_labels(labels, positions).tolist() == [[11, 12, -100], [-100, -100, -100]]


def losses_and_gradients(state, folder):
    (model,) = load_model(state, folder, num_next_tokens=1)
    model.train()
    inputs = packed_inputs(LENGTHS, VOCAB)
    losses, _ = model(**inputs)
    losses.sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if (name.startswith("mtp.layers.0.") and name.count(".") == 4) or "word_emb" in name
    }
    return losses.detach(), gradients, MTPLossLoggingHelper.tracker["values"]


@pytest.mark.shows("load", "mtp", "torch")
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_equal_the_reference(name, tmp_path):
    """The loss that is returned is that of the next token; gradients are those of both."""
    folder, reference = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    ((losses, gradients, tracked),) = run_ranks(ParallelLayout(), losses_and_gradients, folder)
    inputs = packed_inputs(LENGTHS, VOCAB)
    documents = zip(
        inputs["input_ids"].split(LENGTHS, dim=1),
        inputs["labels"].split(LENGTHS, dim=1),
        strict=True,
    )
    sums = [reference.losses(*document) for document in documents]
    main, further = (sum(column) for column in zip(*sums, strict=True))
    torch.testing.assert_close(losses.sum(), main.detach(), rtol=1e-5, atol=0)
    num_further = sum(max(0, length - 2) for length in LENGTHS)
    torch.testing.assert_close(tracked[0], (further / num_further).detach(), rtol=1e-5, atol=0)
    (main + 0.1 * further).backward()
    expected = {f"mtp.layers.0.{kind}.weight": p.grad for kind, p in reference.own.items()}
    if reference.hidden_first:
        halves = expected["mtp.layers.0.eh_proj.weight"].chunk(2, dim=1)
        expected["mtp.layers.0.eh_proj.weight"] = torch.cat(halves[::-1], dim=1)
    embedding = "embedding.word_embeddings.weight"
    expected[embedding] = reference.model.model.embed_tokens.weight.grad
    assert gradients.keys() == expected.keys()
    for key, grad in gradients.items():
        largest = expected[key].abs().max()
        assert (grad - expected[key]).abs().max() <= 1e-5 * largest, key
