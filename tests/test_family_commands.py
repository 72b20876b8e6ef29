"""Every family through the commands: trained, saved in its own form, converted there and back.

The judge is transformers, which loads what was saved and computes the loss that was logged.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtrain.data.storage import TokenizedDataset
from tests.machine import WORDS, Machine, logged, loss_of, make_machine
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.tiny import make_checkpoint

# One name a family that transformers has a class for.
NAMES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "qwen2_moe",
    "qwen3_next_moe",
    "deepseek_v2",
    "deepseek_v3_groups",
    "glm4",
    "glm4_moe",
    "gpt_oss_moe",
    "gemma3",
    "phi3",
    "gpt2",
)
CONVERTED = ("qwen3_next_moe", "deepseek_v3_groups", "gpt_oss_moe", "gemma3", "gpt2")
TRAINING = (
    *("--packing", "true", "--max_length", "96", "--global_batch_size", "4", "--lr", "1e-2"),
    *("--train_iters", "3", "--logging_steps", "1", "--eval_steps", "3"),
    *("--split_dataset_ratio", "0.1", "--no_save_optim", "true", "--add_version", "false"),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("home"))


def add_tokenizer(machine: Machine, folder: Path) -> Path:
    """Makes a model one that can be trained on text; ids are below 131 in the demo's tokenizer."""
    for path in machine.model.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder


def model_of(machine: Machine, folder: Path, name: str) -> Path:
    vocabulary = load_file(machine.model / "model.safetensors")["model.embed_tokens.weight"]
    return add_tokenizer(machine, make_checkpoint(folder, name, vocab_size=len(vocabulary)))


def train(machine: Machine, model: Path, output: Path, *words: str, num_ranks: int = 1) -> Path:
    done = machine.megatron(
        *("sft", "--model", str(model), *WORDS, *TRAINING, "--output_dir", str(output), *words),
        num_ranks=num_ranks,
    )
    assert done.code == 0, done.stderr
    return output / "checkpoint-3"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.shows("full")
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_family_loads_in_transformers_with_the_loss_that_was_logged(
    name, machine, tmp_path
):
    """T45."""
    model = model_of(machine, tmp_path / "model", name)
    saved = train(machine, model, tmp_path / "out")
    before, after = tensors_in(model), tensors_in(saved)
    assert after.keys() == before.keys()
    assert all(after[key].dtype == before[key].dtype for key in after)
    trained, found = AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    losses = logged(tmp_path / "out", "eval_loss")
    prepared = machine.home.glob(".cache/mtrain/prepared/*/validation")
    validation = max(prepared, key=lambda path: path.stat().st_mtime)
    expected = loss_of(trained, TokenizedDataset(validation))
    assert losses[-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.shows("precision")
@pytest.mark.parametrize("name", CONVERTED)
def test_a_family_converted_to_torch_dist_and_back_is_the_same(name, machine, tmp_path):
    """Also T46: what Megatron computes from the converted files is what transformers computes."""
    model = model_of(machine, tmp_path / "model", name)
    for words in (
        ("--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")),
        (
            *("--model", str(model), "--mcore_model", str(tmp_path / "mcore")),
            *("--to_hf", "true", "--output_dir", str(tmp_path / "hf")),
        ),
    ):
        done = machine.megatron("export", *words, "--test_convert_precision", "true")
        assert done.code == 0, done.stderr
    before, after = tensors_in(model), tensors_in(tmp_path / "hf")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)


@pytest.fixture
def with_next_tokens(machine, tmp_path) -> Path:
    """A DeepSeek-V3 whose layer of multi-token prediction has copies of embedding and head."""
    folder, _ = make_checkpoint_with_next_tokens(
        tmp_path / "model",
        "deepseek_v3",
        vocab_size=len(tensors_in(machine.model)["model.embed_tokens.weight"]),
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return add_tokenizer(machine, folder)


def next_token_keys(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in tensors if key.startswith("model.layers.4.")}


def test_multi_token_prediction_that_is_left_out_is_saved_as_it_was(
    with_next_tokens, machine, tmp_path
):
    before = tensors_in(with_next_tokens)
    after = tensors_in(train(machine, with_next_tokens, tmp_path / "out"))
    assert after.keys() == before.keys()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    for key in next_token_keys(before):
        assert torch.equal(after[key], before[key]), key
    assert not logged(tmp_path / "out", "mtp_loss")


def test_multi_token_prediction_is_trained_and_its_copies_follow(
    with_next_tokens, machine, tmp_path
):
    before = tensors_in(with_next_tokens)
    words = ("--mtp_num_layers", "1", "--pipeline_model_parallel_size", "2")
    saved = train(machine, with_next_tokens, tmp_path / "out", *words, num_ranks=2)
    after = tensors_in(saved)
    assert after.keys() == before.keys()
    for key in next_token_keys(before):
        if "e_score_correction_bias" not in key:
            assert not torch.equal(after[key], before[key]), key
    assert torch.equal(
        after["model.layers.4.embed_tokens.weight"], after["model.embed_tokens.weight"]
    )
    assert torch.equal(after["model.layers.4.shared_head.head.weight"], after["lm_head.weight"])
    losses = logged(tmp_path / "out", "mtp_loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_conversion_keeps_multi_token_prediction(with_next_tokens, machine, tmp_path):
    for words in (
        ("--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")),
        (
            *("--mcore_model", str(tmp_path / "mcore")),
            *("--to_hf", "true", "--output_dir", str(tmp_path / "hf")),
        ),
    ):
        done = machine.megatron(
            *("export", "--model", str(with_next_tokens), *words),
            *("--test_convert_precision", "true"),
        )
        assert done.code == 0, done.stderr
    before, after = tensors_in(with_next_tokens), tensors_in(tmp_path / "hf")
    assert all(torch.equal(after[key], before[key]) for key in after)
    # torch_dist has nothing twice.
    copies = {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"}
    assert before.keys() - after.keys() <= copies


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction_takes_part_in_the_precision_test(name, machine, tmp_path):
    """T46: there and back; on the way there on two stages, of which the last one has the layer."""
    model, _ = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    there = ("--to_mcore", "true", "--output_dir", str(tmp_path / "mcore"))
    back = ("--mcore_model", str(tmp_path / "mcore"), "--to_hf", "true")
    back = (*back, "--output_dir", str(tmp_path / "hf"))
    for words, num_stages in ((there, 2), (back, 1)):
        done = machine.megatron(
            *("export", "--model", str(model), *words, "--test_convert_precision", "true"),
            *("--pipeline_model_parallel_size", str(num_stages)),
            num_ranks=num_stages,
        )
        assert done.code == 0, done.stderr
        report = json.loads((Path(words[-1]) / "precision.json").read_text())
        names = [row["name"] for row in report["rows"] if not row["with_loss_mask"]]
        assert names[-3:] == [
            "logits",
            "multi-token prediction layer 0",
            "multi-token prediction logits 0",
        ]
        assert report["passed"]
        assert report["not_compared"] == []
        assert max(row["max_relative"] for row in report["rows"]) < 1e-5


def test_multi_token_prediction_of_a_model_without_a_class_is_refused_in_one_line(
    machine, tmp_path
):
    """Before anything is converted; without the test it is."""
    model, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "mimo")
    output = tmp_path / "mcore"
    words = ("export", "--model", str(model), "--to_mcore", "true", "--output_dir", str(output))
    done = machine.megatron(*words, "--test_convert_precision", "true")
    assert done.code != 0
    (line,) = [line for line in done.stderr.splitlines() if "mimo" in line and "class" in line]
    assert "neither its layers nor its multi-token prediction can be compared" in line
    assert not output.exists()
    assert machine.megatron(*words).code == 0
