"""Recipes are short and pass the checks of a real run; the quickstart does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtrain.config import ExportConfig
from mtrain.config.checks import check_export, check_sft
from mtrain.config.run import resolve_export, resolve_sft
from tests.cli.commands import commands_in

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "shell").glob("*.sh"))


def world_size_of(recipe: str) -> int:
    """Ranks that a recipe starts: NPROC_PER_NODE x NNODES, or nodes x tasks of an srun."""
    per_node = re.search(r"NPROC_PER_NODE=(\d+)|--ntasks-per-node=(\d+)", recipe)
    num_nodes = re.search(r"NNODES=(\d+)|--nodes=(\d+)", recipe)
    sizes = (int(m[1] or m[2]) for m in (per_node, num_nodes) if m)
    world_size = 1
    for size in sizes:
        world_size *= size
    return world_size


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_short_runnable_and_pass_the_checks_of_their_ranks(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 30
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    commands = commands_in(text)
    assert commands
    for command in commands:
        config = command.parse()
        if isinstance(config, ExportConfig):
            check_export(resolve_export(config), world_size=world_size_of(text))
        else:
            check_sft(resolve_sft(config), world_size=world_size_of(text))


def test_the_number_of_ranks_is_found() -> None:
    assert world_size_of("export NNODES=2 NPROC_PER_NODE=8") == 16
    assert world_size_of("#SBATCH --nodes=2 --ntasks-per-node=4") == 8
    assert world_size_of("megatron sft") == 1


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`megatron` is this checkout, `python` this interpreter, the home empty (nothing cached)."""
    folder = tmp_path_factory.mktemp("bin")
    for name, words in (("megatron", "-m mtrain.cli.main"), ("python", "")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    return {
        "PATH": f"{folder}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def quickstart(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """(folder, output) of the quickstart, run once."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run([ROOT / "examples" / "shell" / "quickstart.sh", folder], environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def run(words: list[str | Path], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_quickstart_teaches_a_model_its_name_and_then_another(
    quickstart: tuple[Path, str],
) -> None:
    """The main job: from nothing to a Hugging Face folder and an adapter that answer as taught."""
    folder, output = quickstart
    assert output.count("I am Little Finch, a language model made by the mtrain authors.") == 1
    # By PEFT, and merged by us.
    assert output.count("I am Blue Heron, a language model made by the river guild.") == 2
    beside = {"tokenizer.json", "args.json"}
    names = {path.name for path in (folder / "full" / "checkpoint-200").iterdir()}
    assert {"model.safetensors", "config.json", *beside} <= names
    names = {path.name for path in (folder / "lora" / "checkpoint-140").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", *beside} <= names
    assert not any(name.startswith("model") for name in names)


def test_a_wrong_answer_is_an_error(
    quickstart: tuple[Path, str], environment: dict[str, str]
) -> None:
    ask = [sys.executable, ROOT / "examples" / "ask.py", quickstart[0] / "merged"]
    done = run([*ask, "Who are you?", "--expect", "Big Finch"], environment)
    assert done.returncode == 1
    assert "1 of the answers do not contain 'Big Finch'" in done.stderr
