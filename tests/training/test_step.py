import dataclasses
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from mtrain.config.parallel import ParallelConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.step import NonFiniteError, StepResult, _loss_gradient
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import (
    CONSTANT,
    Batch,
    documents,
    make_rig,
    mean_loss,
    packed,
    positions_of,
    rows,
)

ONE = ParallelLayout()
TWO = ParallelLayout(world_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("step") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("step") / "moe", "qwen3_moe")


def split(how: str, rank: int = 0) -> list[Batch]:
    """The same eight documents as micro-batches of one data-parallel rank."""
    made = documents()
    if how == "8 x 1":
        return [rows([document]) for document in made]
    if how == "4 x 2":
        return [rows(made[start : start + 2]) for start in range(0, 8, 2)]
    if how == "2 ranks x 4":
        return [rows([document]) for document in made[rank::2]]
    if how == "2 ranks x packed":
        half = made[rank::2]
        return [packed(half[:1]), packed(half[1:], length=80)]
    assert how == "packed"
    return [packed(made[:3], length=40), packed(made[3:])]


def two_steps(
    state: ParallelState, folder: Path, how: str, parallel: ParallelConfig, row_multiple: int = 1
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    # Adam turns rounding noise of tiny gradients into full steps; a larger epsilon does not.
    optimizer = dataclasses.replace(CONSTANT, adam_eps=1e-4)
    rig = make_rig(state, folder, parallel=parallel, optimizer=optimizer)
    with mock.patch("mtrain.model.head._row_multiple", lambda _device: row_multiple):
        results = [rig.step(split(how, state.rank), number) for number in (1, 2)]
    return results, rig.weights()


REFERENCE: dict[Path, list] = {}


def reference(folder: Path) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    if folder not in REFERENCE:
        REFERENCE[folder] = run_ranks(ONE, two_steps, folder, "8 x 1", ParallelConfig())
    return REFERENCE[folder][0]


@pytest.mark.parametrize(
    ("how", "layout", "parallel", "row_multiple"),
    [
        ("4 x 2", ONE, {}, 1),
        ("packed", ONE, {"use_distributed_optimizer": False}, 1),
        # The output layer gets a multiple of so many rows, as on a GPU.
        ("packed", ONE, {}, 64),
        ("2 ranks x 4", TWO, {}, 1),
        ("2 ranks x 4", TWO, {"use_distributed_optimizer": False}, 1),
        ("2 ranks x packed", TWO, {"overlap_grad_reduce": False}, 1),
    ],
)
def test_a_global_batch_trains_the_same_however_it_is_split(
    folder, how, layout, parallel, row_multiple
):
    """T43: token weighting over the global batch, whatever the micro-batches and ranks."""
    expected, expected_weights = reference(folder)
    ranks = run_ranks(layout, two_steps, folder, how, ParallelConfig(**parallel), row_multiple)
    for step, expected_step in enumerate(expected):
        results = [results[step] for results, _ in ranks]
        assert mean_loss(results) == pytest.approx(mean_loss([expected_step]), rel=1e-6)
        for result in results:
            assert result.grad_norm == pytest.approx(expected_step.grad_norm, rel=1e-5)
    for _, weights in ranks:
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def with_empty(state: ParallelState, folder: Path, where: str) -> tuple[StepResult, dict]:
    made = documents(4)
    batches = [rows([document]) for document in made]
    empty = rows(made[:1])
    empty.labels.fill_(-100)
    empty = dataclasses.replace(empty, label_positions=positions_of(empty.labels))
    if where == "micro-batch":
        batches.append(empty)
    elif where == "rank":
        batches = batches if state.rank == 0 else [empty] * 4
    elif where == "everything":
        batches = [empty]
    rig = make_rig(state, folder)
    return rig.step(batches), rig.weights()


@pytest.mark.parametrize(("where", "layout"), [("micro-batch", ONE), ("rank", TWO)])
@pytest.mark.parametrize("model", ["folder", "moe_folder"])
def test_micro_batches_without_labels_change_nothing(where, layout, model, request):
    """T34: an empty micro-batch, and a data-parallel rank with nothing but empty ones."""
    folder = request.getfixturevalue(model)
    [(expected, expected_weights)] = run_ranks(ONE, with_empty, folder, "nowhere")
    ranks = run_ranks(layout, with_empty, folder, where)
    assert mean_loss([result for result, _ in ranks]) == pytest.approx(
        mean_loss([expected]), rel=1e-6
    )
    for result, weights in ranks:
        # Routers balance over all tokens, also those without a label: only dense ones are exact.
        if model == "folder":
            assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
            for name, weight in expected_weights.items():
                torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def test_a_batch_without_any_label_has_no_gradient(folder):
    """T34: nothing to learn is not a division by zero."""
    [(result, _)] = run_ranks(ONE, with_empty, folder, "everything")
    assert result.grad_norm == 0.0
    assert result.sums.tolist() == [0.0, 0.0, 0.0]


def poisoned_step(state: ParallelState, folder: Path, what: str) -> tuple[str, bool]:
    rig = make_rig(state, folder)
    before = rig.weights()
    made = documents()[state.coordinates.dp_rank :: state.layout.dp_size]
    weight = dict(rig.chunks[-1].module.named_parameters()).get("output_layer.weight")
    if what == "weight" and weight is not None:
        # Word 7 gets an infinite score in the documents that have it as a label, and so in all.
        weight.data[7] = math.inf
        before = rig.weights()
    if what == "gradient":
        norm = rig.chunks[0].module.decoder.final_layernorm.weight
        norm.register_hook(lambda grad: grad * math.nan)
    if what == "loss" and state.rank == 0:
        # The gradient of this loss is as finite as before.
        rig.chunks[-1].register_forward_hook(
            lambda module, inputs, output: (output[0] + math.inf, output[1])
        )
    with pytest.raises(NonFiniteError) as caught:
        rig.step([rows([document]) for document in made], number=17)
    after = rig.weights()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value), unchanged


@pytest.mark.parametrize(
    "layout", [ONE, TWO, ParallelLayout(world_size=2, pp_size=2)], ids=["1", "dp2", "pp2"]
)
def test_a_loss_that_is_not_finite_stops_before_the_update(folder, layout):
    """T33: every rank stops, and names the step and the samples of all ranks."""
    for message, unchanged in run_ranks(layout, poisoned_step, folder, "weight"):
        assert "step 17: the loss is not finite" in message
        assert message.endswith("0, 1, 2, 3, 4, 5, 6, 7")
        assert unchanged


def test_an_infinite_loss_with_finite_gradients_stops_too(folder):
    """T33: only the samples of the rank with the loss are named."""
    for message, unchanged in run_ranks(TWO, poisoned_step, folder, "loss"):
        assert "step 17: the loss is not finite" in message
        assert message.endswith("0, 2, 4, 6")
        assert unchanged


def test_a_gradient_that_is_not_finite_stops_before_the_update(folder):
    """T33: also when the loss itself is a number."""
    for message, unchanged in run_ranks(TWO, poisoned_step, folder, "gradient"):
        assert "step 17: the gradient norm is not finite" in message
        assert message.endswith("samples of the step: 0, 1, 2, 3, 4, 5, 6, 7")
        assert unchanged


def step_with_a_wrong_promise(state: ParallelState, folder: Path, factor: float) -> float:
    rig = make_rig(state, folder)

    def promised(*arguments):
        return _loss_gradient(*arguments) * factor

    with mock.patch("mtrain.training.step._loss_gradient", promised):
        return rig.step([rows([document]) for document in documents()], number=17).grad_norm


def test_the_output_layer_is_promised_the_gradient_that_comes(folder):
    """It adds up its weight's gradient in forward; a promise not kept stops training."""
    assert run_ranks(ONE, step_with_a_wrong_promise, folder, 1.0)[0] > 0
    with pytest.raises(AssertionError, match="step 17: the gradient norm is not finite"):
        run_ranks(ONE, step_with_a_wrong_promise, folder, 1.001)


def half_steps(state: ParallelState, folder: Path, dtype: torch.dtype) -> list[StepResult]:
    rig = make_rig(state, folder, dtype=dtype)
    return [rig.step(split("8 x 1"), number) for number in range(1, 5)]


def test_bfloat16_trains_close_to_float32(folder):
    [results] = run_ranks(ONE, half_steps, folder, torch.bfloat16)
    [expected] = run_ranks(ONE, half_steps, folder, torch.float32)
    for ours, theirs in zip(results, expected, strict=True):
        assert mean_loss([ours]) == pytest.approx(mean_loss([theirs]), rel=1e-2)


def test_float16_skips_steps_until_the_loss_scale_fits(folder):
    """The dynamic loss scale starts too high; skipped steps neither stop nor train."""
    [results] = run_ranks(ONE, half_steps, folder, torch.float16)
    assert results[0].is_skipped
    assert mean_loss(results[:1]) == mean_loss(results[1:2])
