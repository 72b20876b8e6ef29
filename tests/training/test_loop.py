import functools
import gc
import json
from pathlib import Path

import pytest
import torch

from mtrain.config.logging import LoggingConfig
from mtrain.config.training import TrainingConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.platform.device import device_info
from mtrain.training.evaluate import evaluate
from mtrain.training.flops import ModelShape
from mtrain.training.loop import (
    LoopPlan,
    Surroundings,
    _garbage_collection,
    epoch_ends,
    every,
    train,
)
from mtrain.training.metrics import Meter, RunSize
from mtrain.training.writers import open_run_log
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, rows

TOTAL = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("loop") / "qwen3", "qwen3")


def run(
    state: ParallelState,
    folder: Path,
    output: Path,
    available: int,
    settings: TrainingConfig,
    asked_at: int | None = None,
) -> tuple[int, list[tuple[int, torch.Tensor]], set[bool], list[str]]:
    rig = make_rig(state, folder)
    mine = [rows([document]) for document in documents(4)[state.rank :: state.layout.world_size]]
    saved: list[tuple[int, torch.Tensor]] = []
    collecting: set[bool] = set()
    completed: list[str] = []

    def save(step: int) -> None:
        weight = next(rig.chunks[0].parameters())
        saved.append((step, weight.detach().clone()))
        collecting.add(gc.isenabled())

    size = RunSize(
        total_steps=TOTAL,
        samples_per_epoch=8,
        shape=ModelShape.from_config(rig.chunks[0].config, vocab_size=131),
        num_routers=0,
    )
    log = None
    if state.is_first_rank:
        log = open_run_log(
            LoggingConfig(report_to=("none",)), folder=output, total_steps=TOTAL, arguments={}
        )
    meter = Meter(state=state, device=device_info(), size=size)
    stopped_by = train(
        chunks=rig.chunks,
        optimizer=rig.optimizer,
        scheduler=rig.scheduler,
        steps=iter([mine] * available),
        plan=LoopPlan(
            total_steps=TOTAL,
            logging_steps=3,
            checkpoints=every(4, TOTAL),
            evaluations=every(5, TOTAL),
        ),
        settings=settings,
        state=state,
        around=Surroundings(
            meter=meter,
            log=log,
            evaluate=lambda: evaluate(rig.chunks, [mine], state=state),
            save=save,
            saves=NO_SAVES,
            stop=SignalAt(asked_at if state.rank == 1 else None),
            completed=completed.append,
            started=lambda: completed.append("the start"),
        ),
    )
    return stopped_by, saved, collecting, completed


class SignalAt:
    """A stop request that comes while the loop looks for it the nth time."""

    def __init__(self, nth: int | None) -> None:
        self._remaining = nth

    @property
    def requested(self) -> int:
        if self._remaining is not None:
            self._remaining -= 1
        return 15 if self._remaining is not None and self._remaining <= 0 else 0


class NoSaves:
    """Saves that are complete when they begin."""

    is_pending = is_working = False

    def advance(self) -> None:
        raise AssertionError("nothing is pending")

    def wait(self) -> None:
        """Nothing to wait for."""


NO_SAVES = NoSaves()


def test_a_run_logs_evaluates_and_saves_when_it_should(folder, tmp_path):
    settings = TrainingConfig()
    ranks = run_ranks(ParallelLayout(world_size=2), run, folder, tmp_path, TOTAL, settings)
    (stopped_by, saved, collecting, completed), (_, saved_elsewhere, _, _) = ranks
    assert stopped_by == 0
    assert [step for step, _ in saved] == [4, 7]
    # Parameters are complete when they are saved, although their gathering overlaps with forward.
    for (_, ours), (_, theirs) in zip(saved, saved_elsewhere, strict=True):
        assert torch.equal(ours, theirs)
    # Python's collector of garbage is off between steps.
    assert collecting == {False}
    lines = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 7]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5, 7]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == sorted(losses, reverse=True)
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    # An evaluation after step 5 sees the weights that step 6 starts from.
    assert losses[2] > evaluations[0] > evaluations[1]
    assert [line["epoch"] for line in lines if "loss" in line][-1] == TOTAL * 4 / 8
    assert completed[:3] == ["step 1", "the start", "step 2"]
    assert completed[4:8] == [
        *("step 4", "the save of step 4", "step 5", "the evaluation after step 5"),
    ]


def test_a_rank_that_is_asked_to_stop_stops_all_after_a_save(folder, tmp_path):
    """T30: asked at the start of step 3, on one rank only."""
    ranks = run_ranks(
        ParallelLayout(world_size=2), run, folder, tmp_path, TOTAL, TrainingConfig(), 3
    )
    for stopped_by, saved, _, completed in ranks:
        assert stopped_by == 15
        assert [step for step, _ in saved] == [3]
        assert completed[-1] == "the save of step 3"


def test_a_request_in_the_last_step_finds_the_run_complete(folder, tmp_path):
    ranks = run_ranks(ParallelLayout(), run, folder, tmp_path, TOTAL, TrainingConfig(), TOTAL)
    assert [(stopped_by, saved[-1][0]) for stopped_by, saved, _, _ in ranks] == [(0, TOTAL)]


def test_the_last_line_has_the_fields_that_people_plot(folder, tmp_path):
    run_ranks(ParallelLayout(), run, folder, tmp_path, TOTAL, TrainingConfig())
    line = json.loads((tmp_path / "logging.jsonl").read_text().splitlines()[0])
    assert set(line) == {
        "step",
        "total_steps",
        "epoch",
        "loss",
        "token_accuracy",
        "grad_norm",
        "learning_rate",
        "consumed_samples",
        "consumed_tokens",
        "tokens_per_second_per_gpu",
        "padded_tokens_per_second_per_gpu",
        "tflops_per_gpu",
        "memory_gib",
        "seconds_per_step",
        "data_share",
        "padding_ratio",
        "eta_seconds",
        "skipped_steps",
    }


def test_garbage_may_be_left_to_pythons_collector(folder, tmp_path):
    settings = TrainingConfig(manual_gc=False)
    [(_, _, collecting, _)] = run_ranks(ParallelLayout(), run, folder, tmp_path, TOTAL, settings)
    assert collecting == {True}


@pytest.mark.parametrize("others_froze", [False, True])
def test_what_is_there_before_training_is_not_looked_through(monkeypatch, others_froze):
    calls = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: int(others_froze))
    for name in ("freeze", "unfreeze", "collect"):
        monkeypatch.setattr(gc, name, functools.partial(calls.append, name))
    with _garbage_collection(TrainingConfig(manual_gc_steps=2)) as collect:
        for step in (1, 2, 3):
            collect(step, evaluated=False)
    assert calls == ["freeze", "collect", *([] if others_froze else ["unfreeze"])]
    assert gc.isenabled()


def run_short(state: ParallelState, folder: Path, output: Path) -> str:
    with pytest.raises(ValueError) as caught:
        run(state, folder, output, 2, TrainingConfig())
    return str(caught.value)


def test_data_that_ends_too_early_is_an_error(folder, tmp_path):
    assert run_ranks(ParallelLayout(), run_short, folder, tmp_path) == [
        f"the data ends after 2 of {TOTAL} steps"
    ]


def test_intervals_always_include_the_last_step():
    assert every(3, 7) == {3, 6, 7}
    assert every(500, 7) == {7}


def test_an_epoch_ends_in_the_step_that_uses_its_last_sample():
    # Ten samples an epoch, four a step.
    assert epoch_ends(lambda step: step * 4 / 10, 8) == {3, 5, 8}
