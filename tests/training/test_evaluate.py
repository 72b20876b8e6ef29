from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.evaluate import EvaluationResult, evaluate
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, packed, rows

TWO = ParallelLayout(world_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("evaluate") / "qwen3", "qwen3")


def evaluated(state: ParallelState, folder: Path) -> tuple[EvaluationResult, bool]:
    rig = make_rig(state, folder)
    before = rig.weights()
    mine = documents()[state.coordinates.dp_rank :: state.layout.dp_size]
    steps = [
        [packed(mine[:2], length=48), packed(mine[2:4], length=48)],
        [packed(mine[4:], length=96), packed(mine[:1], length=24)],
    ]
    steps[1][1].labels.fill_(-100)
    result = evaluate(rig.chunks, steps, state=state)
    after = rig.weights()
    is_untouched = all(torch.equal(before[name], after[name]) for name in before)
    return result, is_untouched and rig.chunks[0].training


def expected(folder: Path) -> tuple[float, float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    loss = correct = count = 0.0
    for document in documents():
        with torch.no_grad():
            logits = model(document.input_ids[None]).logits[0]
        loss += cross_entropy(logits, document.labels, reduction="sum").item()
        correct += (logits.argmax(-1) == document.labels).sum().item()
        count += (document.labels != -100).sum().item()
    return loss / count, correct / count


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        TWO,
        ParallelLayout(world_size=2, tp_size=2),
        ParallelLayout(world_size=2, pp_size=2, vpp_size=2),
    ],
    ids=["1", "dp2", "tp2", "pp2vpp2"],
)
def test_loss_and_accuracy_are_those_of_transformers_and_weights_stay(folder, layout):
    loss, accuracy = expected(folder)
    for result, is_untouched in run_ranks(layout, evaluated, folder):
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.token_accuracy == pytest.approx(accuracy)
        assert result.num_tokens == sum(int((d.labels != -100).sum()) for d in documents())
        assert is_untouched


def evaluate_nothing(state: ParallelState, folder: Path) -> str:
    rig = make_rig(state, folder)
    batch = rows(documents(2))
    batch.labels.fill_(-100)
    with pytest.raises(ValueError) as caught:
        evaluate(rig.chunks, [[batch]], state=state)
    return str(caught.value)


def test_data_without_labels_cannot_be_evaluated(folder):
    """T34: no division by zero."""
    [message] = run_ranks(ParallelLayout(), evaluate_nothing, folder)
    assert "no token to compute a loss on" in message
