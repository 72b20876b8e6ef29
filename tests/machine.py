"""Runs `megatron` as a user does, in processes of its own, on a tiny model of our own words.

The one thing to know: `megatron` and `sft` fork a process that has imported everything already
(`tests/warm_start.py`), `megatron_afresh` starts what a user starts, which takes ten seconds longer
on two ranks. Afresh is for what depends on the start: what is said meanwhile, the environment that
imports read, how ranks begin and end.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mtrain.cli import demo
from mtrain.data.storage import TokenizedDataset
from tests.warm_start import run_warm

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 120
WORDS = ("--dataset", "swift/self-cognition#60", "--model_name", "mtrain", "--model_author", "us")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Runs the command with a home folder of its own, so that no earlier cache is found."""

    home: Path
    model: Path

    def sft(self, *words: str, num_ranks: int = 1, **environ: str) -> Done:
        return self.megatron("sft", *words, num_ranks=num_ranks, **environ)

    def megatron(self, *words: str, num_ranks: int = 1, **environ: str) -> Done:
        started = time.monotonic()
        environ = {"NPROC_PER_NODE": str(num_ranks), **environ}
        code, stderr = run_warm(words, self.environ | environ, timeout_seconds=TIMEOUT_SECONDS)
        return Done(code, stderr, time.monotonic() - started)

    def megatron_afresh(self, *words: str, num_ranks: int = 1, **environ: str) -> Done:
        return self.run("-m", "mtrain.cli.main", *words, NPROC_PER_NODE=str(num_ranks), **environ)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            # Commands of several ranks, and what they say, are those of a CPU on any machine.
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *words: str, **environ: str) -> Done:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stderr, time.monotonic() - started)


def make_machine(home: Path) -> Machine:
    """A home folder with a model in it."""
    demo.run(["--output_dir", str(home / "model"), "--hidden_size", "64", "--num_layers", "4"])
    return Machine(home, home / "model")


def copy_model(machine: Machine, folder: Path) -> dict[str, torch.Tensor]:
    """Copies the model but for its weights, which are returned."""
    folder.mkdir()
    for path in machine.model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return load_file(machine.model / "model.safetensors")


def loss_of(model: torch.nn.Module, dataset: TokenizedDataset) -> float:
    """Loss a labelled token of a Hugging Face model on prepared data."""
    total, num_labels = 0.0, 0
    for index in range(len(dataset)):
        sample = dataset[index]
        labels = torch.from_numpy(sample.labels.astype("int64"))
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids.astype("int64"))[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        num_labels += int((labels != -100).sum())
    return total / num_labels


def logged(folder: Path, name: str) -> list[float]:
    """A number of all lines of a run's log that have it."""
    lines = (folder / "logging.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]
