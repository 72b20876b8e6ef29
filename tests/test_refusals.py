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
        (
            unsupported_family,
            ["'qwen3_vl'", "supported: llama, mistral, mixtral, qwen2, qwen2_moe"],
        ),
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


def adapter_with(**changes: object):
    """Makes a folder with an adapter of one projection whose config is changed."""

    def make(machine: Machine, folder: Path) -> None:
        del machine
        folder.mkdir()
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        factors = {"lora_A": torch.zeros(2, 64), "lora_B": torch.zeros(64, 2)}
        factors |= {n: changes.pop(n) for n in list(changes) if n in factors}
        named = {f"{module}.{name}.weight": tensor for name, tensor in factors.items()}
        save_file(named, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return make


def model_instead(machine: Machine, folder: Path) -> None:
    save_file(copy_model(machine, folder), folder / "model.safetensors")


SFT = ("sft", *WORDS, "--train_iters", "1", "--tuner_type", "lora")
EXPORT = ("export", "--to_hf", "true")


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (model_instead, SFT, "adapter: has no adapter_config.json, so it is no PEFT adapter"),
        (adapter_with(use_dora=True), SFT, "'use_dora' is set, which is not built"),
        (adapter_with(bias="all"), EXPORT, "'bias' is 'all': trained biases are not built"),
        (adapter_with(lora_A=torch.zeros(2, 32)), EXPORT, "has shape [2, 32], expected [rank, 64]"),
        (adapter_with(), ("sft", *SFT[1:-1], "full"), "needs --tuner_type lora; to train all wei"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_refused_at_once(
    machine, tmp_path, make, words, message
) -> None:
    """T26: one line, before torch is imported and before any process is started."""
    make(machine, tmp_path / "adapter")
    words = (*words, "--model", str(machine.model), "--adapters", str(tmp_path / "adapter"))
    words = (*words, "--output_dir", str(tmp_path / "out"))
    done = machine.run("-c", RUN_AND_TELL, *words, NPROC_PER_NODE="2")
    assert done.code == 2, done.stderr
    assert done.stderr.startswith(f"megatron {words[0]}: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--adapters missing", "--adapters missing: no such folder"),
        ("--adapters a b", "--adapters a b: give one; merge the others first"),
        (
            "--target_modules qproj",
            "--target_modules 'qproj' matches nothing; there are: embed_tokens q_proj",
        ),
        ("--target_regex [", "is not a regular expression"),
        ("--lora_bias all", "--lora_bias all: biases are not trained with an adapter; use none"),
        ("--modules_to_save lm_head", "head and embedding of this model are one weight"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused_at_once(machine, words, message) -> None:
    all_words = (*SFT, "--model", str(machine.model), *words.split())
    done = machine.run("-c", RUN_AND_TELL, *all_words, NPROC_PER_NODE="2")
    assert done.code == 2, done.stderr
    assert done.stderr.startswith("megatron sft: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_output_into_the_folder_of_the_model_is_refused(machine) -> None:
    """T05."""
    words = ("sft", "--model", str(machine.model), *WORDS, "--train_iters", "1")
    done = machine.run("-c", RUN_AND_TELL, *words, "--output_dir", f"{machine.model}/")
    assert done.code == 2
    assert done.stderr.endswith("is the folder of --model; give another folder\n")


def test_a_model_that_cannot_be_fetched_is_one_line(machine) -> None:
    done = machine.megatron_afresh(
        *("sft", "--model", "owner/name", "--use_hf", "true", *WORDS, "--train_iters", "1"),
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.code == 2
    assert done.stderr.startswith(
        "megatron sft: error: --model owner/name: no such folder, and it could not be fetched from "
        "Hugging Face: "
    )
    assert done.stderr.count("\n") == 1
