"""Both backends on a GPU, in bfloat16, against Hugging Face's class. Runs where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from mtrain.parallel import (
    ParallelLayout,
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.device import has_transformer_engine
from tests.megatron import load_model, packed_inputs
from tests.tiny import MOE, TINY, make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NO_TE = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
BACKENDS = ["torch", pytest.param("te", marks=NO_TE)]
LENGTHS = [40, 7, 64, 17]
VOCAB = 131


@pytest.fixture(scope="module")
def state():
    yield initialize_parallel(ParallelLayout(), initialize_world())
    destroy_parallel()
    destroy_world()


def on_gpu(inputs):
    return {
        name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()
    }


@pytest.mark.shows("load", "backend")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(TINY))
def test_logits_and_gradients_are_near_hugging_face(name, backend, state, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path, name, hidden_size=128, moe_intermediate_size=64)
    (model,) = load_model(state, folder, dtype=torch.bfloat16, backend=backend)
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    inputs = on_gpu(packed_inputs(LENGTHS, VOCAB))
    labels = inputs.pop("labels")
    documents = inputs["input_ids"][0].split(LENGTHS)
    expected = torch.cat([judge(ids[None]).logits for ids in documents], dim=1)
    logits = model(**inputs)[..., :VOCAB].float()
    # In bfloat16 a router sends a token here and there to another expert than in float32.
    likeness = F.cosine_similarity(logits[0], expected[0], dim=-1)
    assert likeness.min() > 0.998 or name in MOE
    # Or as near as the class itself comes in bfloat16: small models of many parts differ more.
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        theirs = torch.cat([rounded(ids[None]).logits.float() for ids in documents], dim=1)
    of_class = F.cosine_similarity(theirs[0], expected[0], dim=-1)
    assert likeness.quantile(0.1) > min(0.99, 2 * of_class.quantile(0.1) - 1)
    assert likeness.median() > min(0.999, 2 * of_class.median() - 1)

    losses, _ = model(**inputs, labels=labels)
    num_labels = (labels != -100).sum()
    (losses.sum() / num_labels).backward()
    loss = F.cross_entropy(expected.transpose(1, 2), labels, ignore_index=-100)
    loss.backward()
    torch.testing.assert_close(losses.sum() / num_labels, loss, rtol=5e-3, atol=0)
    ours = model.embedding.word_embeddings.weight.grad[:VOCAB].float().flatten()
    theirs = judge.get_input_embeddings().weight.grad.flatten()
    assert F.cosine_similarity(ours, theirs, dim=0) > (0.98 if name in MOE else 0.99)
