"""Models, places and ids that cannot work, as a user sees it: one line, at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.machine import WORDS, Machine, copy_model, make_machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("home"))


def unsupported_family(machine: Machine, folder: Path) -> None:
    save_file(copy_model(machine, folder), folder / "model.safetensors")
    text_config = json.loads((folder / "config.json").read_text())
    config = {"model_type": "qwen3_vl", "text_config": text_config}
    (folder / "config.json").write_text(json.dumps(config))


def truncated(machine: Machine, folder: Path) -> None:
    save_file(copy_model(machine, folder), folder / "model.safetensors")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def missing_key(machine: Machine, folder: Path) -> None:
    weights = copy_model(machine, folder)
    del weights["model.layers.3.self_attn.k_norm.weight"]
    save_file(weights, folder / "model.safetensors")


def surplus_key(machine: Machine, folder: Path) -> None:
    weights = copy_model(machine, folder)
    weights["model.layers.3.self_attn.k_proj.bias"] = torch.zeros(64)
    save_file(weights, folder / "model.safetensors")


def wrong_tokenizer(machine: Machine, folder: Path) -> None:
    save_file(copy_model(machine, folder), folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["id"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


RUN_AND_TELL = """
import sys
from mtrain.cli.main import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (unsupported_family, ["'qwen3_vl'", "supported: llama, mistral, qwen2, qwen3, qwen3_moe"]),
        (truncated, ["model.safetensors"]),
        (missing_key, ["model.layers.3.self_attn.k_norm.weight"]),
        (surplus_key, ["model.layers.3.self_attn.k_proj.bias"]),
        (wrong_tokenizer, ["tokenizer.json: token id 5000 has no row in the embedding"]),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_at_once(
    machine, tmp_path, spoil, messages
) -> None:
    """T20, T23: one line, before torch is imported and before any process is started."""
    spoil(machine, tmp_path / "model")
    words = ("sft", "--model", str(tmp_path / "model"), *WORDS, "--train_iters", "1")
    done = machine.run("-c", RUN_AND_TELL, *words, NPROC_PER_NODE="2")
    assert done.code == 2, done.stderr
    assert done.stderr.startswith("megatron sft: error: ")
    assert done.stderr.count("\n") == 1
    assert all(message in done.stderr for message in messages), done.stderr


def test_output_into_the_folder_of_the_model_is_refused(machine) -> None:
    """T05."""
    words = ("sft", "--model", str(machine.model), *WORDS, "--train_iters", "1")
    done = machine.run("-c", RUN_AND_TELL, *words, "--output_dir", f"{machine.model}/")
    assert done.code == 2
    assert done.stderr.endswith("is the folder of --model; give another folder\n")


def test_a_model_that_cannot_be_fetched_is_one_line(machine) -> None:
    done = machine.sft(
        *("--model", "owner/name", "--use_hf", "true", *WORDS, "--train_iters", "1"),
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.code == 2
    assert done.stderr.startswith(
        "megatron sft: error: --model owner/name: no such folder, and it could not be fetched from "
        "Hugging Face: "
    )
    assert done.stderr.count("\n") == 1
