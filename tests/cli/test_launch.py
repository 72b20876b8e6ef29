"""Reading the environment of launchers, and real ranks that fail."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtrain.cli.launch import Launch, Placement, join_ranks, rank_exit_code, read_environment
from mtrain.platform.node_notes import NodeNotes

ROOT = Path(__file__).parents[2]

# What `megatron sft` does, with a run of the test's choice instead of training.
RANK_SCRIPT = """
import functools, os, sys, time
from mtrain.cli.errors import end_failed_rank
from pathlib import Path
from mtrain.cli.launch import (
    Launch,
    launch_ranks,
    rank_exit_code,
    read_environment,
    wait_until_prepared,
)
from mtrain.platform.signals import EndedBySignal, end_on_signals
from mtrain.platform.stop_request import StopRequest

# In one piece: ranks write to the same pipe.
say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def prepare():
    # PREPARE
    return "key"

here = read_environment()
if isinstance(here, Launch):
    try:
        sys.exit(launch_ranks(here, [__file__], prepare))
    except EndedBySignal as error:
        sys.exit(print(error, "at once" * error.at_once, file=sys.stderr) or 128 + error.signum)
report = functools.partial(
    end_failed_rank, command="sft", rank=here.rank, failure_folder=here.failure_folder
)
sys.excepthook = lambda kind, error, trace: report(error)
say(f"rank {here.rank} of {here.world_size} prepared={here.is_prepared}")
"""


def open_ranks(
    tmp_path: Path, body: str, *, num_ranks: int = 2, prepare: str = "", **variables: str
) -> subprocess.Popen[str]:
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT.replace("# PREPARE", prepare) + body)
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environ |= {"NPROC_PER_NODE": str(num_ranks), "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )


def start_ranks(
    tmp_path: Path, body: str, *, num_ranks: int = 2, prepare: str = "", **variables: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    with open_ranks(tmp_path, body, num_ranks=num_ranks, prepare=prepare, **variables) as process:
        try:
            out, err = process.communicate(timeout=90)
        finally:
            process.kill()
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return done, time.monotonic() - start


def test_a_process_without_launcher_is_the_only_rank() -> None:
    assert read_environment({}) == Placement(rank=0, local_rank=0, world_size=1)


def test_one_process_per_node_on_one_node_needs_no_launcher() -> None:
    assert read_environment({"NPROC_PER_NODE": "1"}) == Placement()
    assert read_environment({"NNODES": "1"}) == Placement()


def test_nproc_per_node_asks_for_a_launch_on_this_machine() -> None:
    # MASTER_ADDR of a cluster is of no use when all ranks are here.
    launch = read_environment({"NPROC_PER_NODE": "4", "MASTER_ADDR": "elsewhere"})
    assert launch == Launch(nproc_per_node=4)
    assert launch.world_size == 4


def test_nodes_meet_at_the_given_address() -> None:
    environ = {"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    launch = read_environment(environ)
    assert isinstance(launch, Launch)
    assert (launch.world_size, launch.node_rank) == (16, 1)
    assert (launch.master_addr, launch.master_port) == ("node0", 29500)
    assert read_environment({**environ, "MASTER_PORT": "1234"}).master_port == 1234


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NPROC_PER_NODE": "auto"}, "NPROC_PER_NODE=auto: must be a whole number from 1 on"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: must be a whole number from 1 on"),
        ({"NNODES": "2"}, "NNODES=2 needs NPROC_PER_NODE"),
        ({"NNODES": "2", "NPROC_PER_NODE": "8"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        (
            {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK=2 must be below NNODES=2",
        ),
    ],
)
def test_a_wrong_launcher_variable_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_environment(environ)


def test_a_rank_of_torchrun_is_not_launched_again() -> None:
    environ = {
        "NPROC_PER_NODE": "2",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "TORCHELASTIC_ERROR_FILE": "/tmp/x/attempt_0/1/error.json",
    }
    placement = read_environment(environ)
    assert isinstance(placement, Placement)
    assert (placement.rank, placement.local_rank, placement.world_size) == (3, 1, 4)
    assert not placement.is_prepared
    assert placement.failure_folder == Path("/tmp/x/attempt_0")


def test_rank_and_world_size_of_a_pod_do_not_make_a_rank() -> None:
    environ = {"NPROC_PER_NODE": "2", "RANK": "0", "WORLD_SIZE": "1"}
    assert read_environment(environ) == Launch(nproc_per_node=2)


SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_task_of_srun_is_a_rank() -> None:
    placement = read_environment(SRUN)
    assert isinstance(placement, Placement)
    assert (placement.rank, placement.local_rank, placement.world_size) == (5, 1, 8)
    assert placement.failure_folder is not None
    assert "123456-0" in placement.failure_folder.name


def test_a_batch_script_of_slurm_is_not_a_rank() -> None:
    assert read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Placement()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-08]", "gpu07"),
        ("gpu[3,7-8]", "gpu3"),
        ("a1,b2", "a1"),
        ("solo", "solo"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_srun_variables_become_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, nodes: str, first: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in (SRUN | {"SLURM_STEP_NODELIST": nodes}).items():
        monkeypatch.setenv(name, value)
    placement = read_environment()
    assert isinstance(placement, Placement)
    join_ranks(placement)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "1", "8", first, "23456"]


def test_launched_ranks_know_their_place_and_the_exit_code_is_zero(tmp_path: Path) -> None:
    done, _ = start_ranks(tmp_path, "assert int(os.environ['OMP_NUM_THREADS']) >= 1")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0 of 2 prepared=True",
        "rank 1 of 2 prepared=True",
    ]
    assert done.stderr == ""


# Returns when two ranks are there, so it would hang if they were started later.
UNTIL_STARTED = "while len(list(Path().glob('started-*'))) < 2: time.sleep(0.02)"
WAITING = """
Path(f"started-{here.rank}").touch()
say("got", wait_until_prepared(here).data_key)
"""


def test_ranks_start_while_data_is_prepared_and_wait_for_it(tmp_path: Path) -> None:
    done, _ = start_ranks(tmp_path, WAITING, prepare=UNTIL_STARTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("got key") == 2


def test_a_mistake_in_the_data_ends_the_ranks(tmp_path: Path) -> None:
    """They say nothing about it, and hold nothing open when the launcher has ended."""
    prepare = f"{UNTIL_STARTED}\n    raise ValueError('line 3 is no JSON')"
    done, seconds = start_ranks(tmp_path, WAITING, prepare=prepare)
    assert "got" not in done.stdout
    assert done.stderr.splitlines()[-1] == "ValueError: line 3 is no JSON"
    assert done.stderr.count("Traceback") == 1
    assert seconds < 30


def test_ranks_whose_launcher_is_gone_do_not_wait(tmp_path: Path) -> None:
    prepare = f"{UNTIL_STARTED}\n    say('prepares')\n    time.sleep(60)"
    with open_ranks(tmp_path, WAITING, prepare=prepare) as process:
        lines_until(process, "prepares", count=1)
        process.kill()
        _, err = rest_of(process)
    assert err.count("RuntimeError: the process that started the ranks is gone") == 2 or (
        err == "megatron sft: error: the process that started the ranks is gone\n"
    )


def test_a_failing_rank_ends_one_that_waits_in_a_collective(tmp_path: Path) -> None:
    """T32: everyone ends within 30 s and the first real traceback is shown exactly once."""
    body = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if here.rank == 1:
    raise KeyError("the real reason")
dist.all_reduce(torch.ones(1))
"""
    done, seconds = start_ranks(tmp_path, body)
    assert done.returncode == 1
    assert seconds < 30
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "megatron sft: rank 1 failed:" in done.stderr
    assert done.stderr.count("KeyError: 'the real reason'") == 1
    assert "ChildFailedError" not in done.stderr


def test_a_rank_that_sleeps_is_ended_too(tmp_path: Path) -> None:
    """T32."""
    body = "\nif here.rank == 0:\n    raise RuntimeError('broken')\ntime.sleep(80)\n"
    done, seconds = start_ranks(tmp_path, body, num_ranks=3)
    assert done.returncode == 1
    assert seconds < 30
    assert done.stderr.count("Traceback") == 1


def test_the_same_mistake_on_all_ranks_is_one_line(tmp_path: Path) -> None:
    """T32: a ValueError of ours has no traceback, and is not repeated by every rank."""
    body = "\nfrom mtrain.config.checkpoint import parse_byte_size\nparse_byte_size('five')\n"
    done, _ = start_ranks(tmp_path, body, num_ranks=3)
    assert done.returncode == 2
    assert done.stderr == ("megatron sft: error: five: must be a size such as 5GB or 500MB\n")


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    body = "\nif here.rank == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(80)\n"
    done, seconds = start_ranks(tmp_path, body)
    assert done.returncode == 128 + 9
    assert seconds < 30
    assert "rank 1 was ended by SIGKILL (out of memory?)" in done.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """T35."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done, _ = start_ranks(tmp_path, "", MASTER_PORT=port)
    assert done.returncode != 0
    assert f"ValueError: MASTER_PORT={port}: Address already in use" in done.stderr


# A loop that stops when asked, and saves for longer than ranks get to end.
TRAINING = """
folder = here.failure_folder
with StopRequest(folder) as stop:
    say("step", os.getpid())
    while not stop.requested:
        time.sleep(0.05)
    say("saving")
    while not os.path.exists("may_end"):
        time.sleep(0.05)
    say("saved")
sys.exit(rank_exit_code(here, 128 + stop.requested))
"""


def lines_until(process: subprocess.Popen[str], word: str, *, count: int) -> list[str]:
    """Reads what the ranks print until the word has come so often; those lines."""
    found = []
    while len(found) < count:
        line = process.stdout.readline()
        assert line, process.communicate()
        found += [line] if line.startswith(word) else []
    return found


def rest_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What is printed until the end; `communicate` forgets what was read ahead with a line."""
    process.wait(timeout=60)
    return process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_lets_all_ranks_save(
    tmp_path: Path, signum: signal.Signals
) -> None:
    """T30."""
    with open_ranks(tmp_path, TRAINING) as process:
        lines_until(process, "step", count=2)
        process.send_signal(signum)
        lines_until(process, "saving", count=2)
        (tmp_path / "may_end").touch()
        out, err = rest_of(process)
    assert process.returncode == 128 + signum
    assert out.count("saved") == 2
    assert err == (
        f"megatron: {signum.name}: saving after this step; a second signal ends at once\n"
    )


def test_a_signal_to_one_rank_is_the_exit_code_of_the_run(tmp_path: Path) -> None:
    """T30: the other rank is told by the training loop; here, by the test."""
    with open_ranks(tmp_path, TRAINING) as process:
        for line in lines_until(process, "step", count=2):
            os.kill(int(line.split()[1]), signal.SIGUSR1)
        (tmp_path / "may_end").touch()
        out, err = rest_of(process)
    assert process.returncode == 138
    assert out.count("saved") == 2
    assert err == ""


def test_a_second_signal_to_the_launcher_ends_ranks_that_save(tmp_path: Path) -> None:
    """T30."""
    with open_ranks(tmp_path, TRAINING) as process:
        pids = [int(line.split()[1]) for line in lines_until(process, "step", count=2)]
        process.send_signal(signal.SIGTERM)
        lines_until(process, "saving", count=2)
        # It counts once it is not a copy of the first any more.
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        out, err = rest_of(process)
    assert process.returncode == 143
    assert "saved" not in out
    assert err.splitlines()[-1] == "SIGTERM at once"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_signal_before_training_ends_the_ranks(tmp_path: Path) -> None:
    """T30: there is nothing to save yet, and one line about it."""
    body = """
try:
    with end_on_signals():
        say("start-up")
        while True:
            time.sleep(60)
except EndedBySignal as error:
    report(error)
"""
    with open_ranks(tmp_path, body) as process:
        lines_until(process, "start-up", count=2)
        process.send_signal(signal.SIGUSR1)
        _, err = rest_of(process)
    assert process.returncode == 138
    assert err == "SIGUSR1 \n"


def test_a_rank_of_another_launcher_ends_with_the_code_of_the_signal(tmp_path: Path) -> None:
    ours = Placement(is_prepared=True, failure_folder=tmp_path)
    other = Placement(failure_folder=tmp_path)
    assert [rank_exit_code(other, code) for code in (0, 1, 143)] == [0, 1, 143]
    assert NodeNotes(tmp_path).stopped_by() == 0
    assert [rank_exit_code(ours, code) for code in (0, 1, 143)] == [0, 1, 0]
    assert NodeNotes(tmp_path).stopped_by() == signal.SIGTERM
