"""Kills a run again and again, and lets it continue by itself: does it end as if nothing happened?

    python -m tests.soak --kills 200 --steps 600 --seed 0

A LoRA run with dropout and optimizer state on two ranks is killed (SIGKILL, or with --signal 15 or
10 asked to stop; a random rank at a random moment: start-up, a step, a save, synchronous or not)
and started again with the same
command, `--resume_from_checkpoint auto`. Nothing is cleaned up in between. In the end its weights,
moments and log are compared with those of a run that nobody disturbed. The last line is the count.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.machine import WORDS, Machine, make_machine
from tests.warm_start import Kill, run_warm

NUM_RANKS = 2
# Some kills come before the first step of a start, some after many.
LONGEST_SECONDS = 6.0


def command(machine: Machine, folder: Path, *, steps: int, is_async: bool) -> list[str]:
    """The words of the run."""
    return [
        *("sft", "--model", str(machine.model), *WORDS, "--output_dir", str(folder)),
        *("--tuner_type", "lora", "--lora_rank", "4", "--lora_dropout", "0.1", "--lr", "1e-3"),
        *("--micro_batch_size", "1", "--global_batch_size", "4", "--train_iters", str(steps)),
        *("--max_length", "64", "--save_steps", "3", "--save_total_limit", "2"),
        *("--logging_steps", "5", "--add_version", "false", "--resume_from_checkpoint", "auto"),
        *("--async_save", str(is_async).lower()),
    ]


def run(machine: Machine, words: list[str], *, kill: Kill | None) -> int:
    """Exit code of the command; that of a killed one is negative."""
    environ = machine.environ | {"NPROC_PER_NODE": str(NUM_RANKS)}
    code, stderr = run_warm(words, environ, timeout_seconds=3600, kill=kill)
    if code and kill is None:
        raise SystemExit(f"the command failed by itself:\n{stderr}")
    if code > 0 and "Traceback" in stderr and "gloo" not in stderr.lower():
        raise SystemExit(f"a restarted run failed:\n{stderr}")
    return code


def result(folder: Path, steps: int) -> tuple[dict[str, torch.Tensor], list[tuple]]:
    """Weights and moments of the last checkpoint, and what the log says of every line."""
    tensors = {}
    for path in sorted((folder / f"checkpoint-{steps}").rglob("*.safetensors")):
        tensors |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    lines = map(json.loads, (folder / "logging.jsonl").read_text().splitlines())
    return tensors, [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def soak(home: Path, *, kills: int, steps: int, seed: int, signum: int) -> str:
    """Does it all; returns the last line.

    Raises:
        AssertionError: The disturbed run ended with other numbers.
    """
    draw = random.Random(seed)
    machine = make_machine(home)
    run(machine, command(machine, home / "quiet", steps=steps, is_async=False), kill=None)
    disturbed, started, num_kills, num_ended = home / "disturbed", time.monotonic(), 0, 0
    while num_kills < kills:
        kill = Kill(draw.randrange(NUM_RANKS), draw.uniform(0, LONGEST_SECONDS), signum)
        is_async = draw.random() < 0.5
        code = run(machine, command(machine, disturbed, steps=steps, is_async=is_async), kill=kill)
        # Ranks that were asked to stop end with 0, as those do that are done.
        is_done = not code and (disturbed / f"checkpoint-{steps}").exists()
        num_kills += not is_done
        if is_done:
            # It was done before it could be killed; it has to get there again.
            num_ended += 1
            check(home, disturbed, steps)
            shutil.rmtree(disturbed)
        if num_kills % 10 == 0:
            minutes = (time.monotonic() - started) / 60
            sys.stderr.write(f"{num_kills} kills in {minutes:.1f} min\n")
    run(machine, command(machine, disturbed, steps=steps, is_async=False), kill=None)
    num_ended += 1
    check(home, disturbed, steps)
    return (
        f"{num_kills} kills: {num_ended} runs of {steps} steps ended, each with the weights, "
        "moments, losses and gradient norms of the undisturbed run, bit for bit"
    )


def check(home: Path, disturbed: Path, steps: int) -> None:
    """Compares a disturbed run with the quiet one."""
    expected, expected_log = result(home / "quiet", steps)
    found, log = result(disturbed, steps)
    assert log == expected_log, "another log"
    assert found.keys() == expected.keys(), "other tensors"
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"different: {different[:5]}"
    hidden = [path.name for path in disturbed.iterdir() if path.name.startswith(".")]
    assert not hidden, f"left behind: {hidden}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", type=int, default=signal.SIGKILL)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        line = soak(
            Path(name),
            kills=options.kills,
            steps=options.steps,
            seed=options.seed,
            signum=options.signal,
        )
    sys.stdout.write(line + "\n")
