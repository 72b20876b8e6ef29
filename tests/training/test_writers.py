import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtrain.config.logging import LoggingConfig
from mtrain.training.writers import JsonLines, RunLog, open_run_log

VALUES = {"step": 5, "total_steps": 10, "loss": 1.25, "consumed_tokens": 300}


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]


def test_lines_are_on_disk_at_once(tmp_path):
    writer = JsonLines(tmp_path / "logging.jsonl", total_steps=10)
    writer.write({"loss": 1.25}, step=5, kind="train")
    assert read_lines(tmp_path) == [{"step": 5, "total_steps": 10, "loss": 1.25}]
    writer.write({"loss": 1.5}, step=5, kind="eval")
    assert read_lines(tmp_path)[1] == {"step": 5, "total_steps": 10, "eval_loss": 1.5}


def test_lines_stay_valid_json_when_a_number_is_not_finite(tmp_path):
    JsonLines(tmp_path / "logging.jsonl", total_steps=1).write(
        {"loss": float("nan")}, step=1, kind="eval"
    )
    assert "NaN" not in (tmp_path / "logging.jsonl").read_text()
    assert read_lines(tmp_path)[0]["eval_loss"] is None


def test_a_run_writes_jsonl_tensorboard_and_console(tmp_path, capsys):
    settings = LoggingConfig(report_to=("tensorboard",))
    with open_run_log(settings, folder=tmp_path, total_steps=10, arguments={}) as log:
        log.advance()
        log.write(VALUES, step=5, kind="train")
        log.write({"loss": 2.0}, step=5, kind="eval")
    assert [line["step"] for line in read_lines(tmp_path)] == [5, 5]
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.25]
    assert [event.value for event in events.Scalars("eval/loss")] == [2.0]
    assert [event.step for event in events.Scalars("train/consumed_tokens")] == [5]
    captured = capsys.readouterr()
    assert captured.out == ""


def test_the_console_shows_every_number_on_one_line():
    stream = io.StringIO()
    with RunLog([], total_steps=10, stream=stream) as log:
        log.write(VALUES, step=5, kind="train")
    assert stream.getvalue() == "train 5/10 | loss 1.2500 | 300 tokens\n"


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_trackers_get_the_configuration_and_every_number(tmp_path, monkeypatch, tracker):
    logged: list[tuple[dict, int]] = []
    started: dict = {}
    run = SimpleNamespace(
        log=lambda values, step: logged.append((values, step)),
        finish=lambda: logged.append(({}, -1)),
    )

    def init(**arguments):
        started.update(arguments)
        return run

    monkeypatch.setitem(sys.modules, tracker, SimpleNamespace(init=init))
    settings = LoggingConfig(report_to=(tracker,))
    with open_run_log(settings, folder=tmp_path, total_steps=10, arguments={"lr": 1}) as log:
        log.write(VALUES, step=5, kind="train")
    assert started["project"] == "mtrain"
    assert started["config"] == {"lr": 1}
    assert logged == [({"train/loss": 1.25, "train/consumed_tokens": 300}, 5), ({}, -1)]
