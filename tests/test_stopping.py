"""T30 with the command itself: SIGTERM while the data is prepared, SIGUSR1 while ranks train."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import ROOT, WORDS, Machine, make_machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("stopping"))


def stop_when(
    happened: Callable[[], bool], signum: int, machine: Machine, *words: str, num_ranks: int
) -> tuple[int, str]:
    """Runs a command, signals it once something happened; its exit code and stderr."""
    log = machine.home / f"stderr-{num_ranks}"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtrain.cli.main", "sft", *words],
            cwd=ROOT,
            env=machine.environ | {"NPROC_PER_NODE": str(num_ranks)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            deadline = time.monotonic() + 240
            while not happened():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            process.send_signal(signum)
            return process.wait(timeout=240), log.read_text()
        finally:
            process.kill()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_data_that_is_being_prepared_is_not_left_behind(
    machine: Machine, tmp_path: Path, num_ranks: int
) -> None:
    """Two ranks import and wait meanwhile."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 50_000)
    cache = machine.home / ".cache" / "mtrain" / "prepared"
    shutil.rmtree(cache, ignore_errors=True)

    def is_preparing() -> bool:
        return any(cache.glob("*.partial/train"))

    words = ("--model", str(machine.model), "--dataset", str(tmp_path / "data.jsonl"))
    output = ("--train_iters", "1", "--output_dir", str(tmp_path / "out"))
    code, stderr = stop_when(
        is_preparing, signal.SIGTERM, machine, *words, *output, num_ranks=num_ranks
    )
    assert code == 143
    assert stderr.splitlines()[-1] == (
        "megatron sft: ended by SIGTERM outside training; nothing was lost"
    )
    assert "Traceback" not in stderr
    assert not list(cache.glob("*/report.json"))
    assert not (tmp_path / "out").exists()


def test_ranks_that_train_save_and_end(machine: Machine, tmp_path: Path) -> None:
    log = tmp_path / "out" / "logging.jsonl"
    code, stderr = stop_when(
        lambda: log.is_file() and '"step": 2' in log.read_text(),
        signal.SIGUSR1,
        machine,
        *("--model", str(machine.model), *WORDS, "--train_iters", "100000", "--max_length", "64"),
        *("--global_batch_size", "2", "--logging_steps", "1", "--save_steps", "100000"),
        *("--output_dir", str(tmp_path / "out"), "--add_version", "false"),
        num_ranks=2,
    )
    assert code == 138, stderr
    assert "Traceback" not in stderr
    step = int((tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text())
    # It ended early, after the step of the signal.
    assert 2 <= step < 100000
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}"
    assert (checkpoint / "manifest.json").is_file()
