"""LoRA as users run it: trained on two ranks, loaded by PEFT, continued, merged.

The judges are PEFT and transformers, which compute the validation loss that was logged.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtrain.data.storage import TokenizedDataset
from tests.lora.peft_folders import load_with_peft
from tests.machine import WORDS, Done, Machine, copy_model, logged, loss_of, make_machine
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def data_words() -> tuple[str, ...]:
    return (*WORDS, "--split_dataset_ratio", "0.1", "--packing", "true", "--max_length", "96")


@pytest.fixture(scope="module")
def trained(machine, data_words, tmp_path_factory) -> tuple[Path, Done]:
    """An adapter that was trained on two tensor-parallel ranks, and what was said."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    done = machine.megatron_afresh(
        *("sft", "--model", str(machine.model), *data_words, "--global_batch_size", "4"),
        *("--tuner_type", "lora", "--lora_rank", "4", "--tensor_model_parallel_size", "2"),
        *("--train_iters", "8", "--lr", "2e-2", "--save_steps", "4", "--logging_steps", "2"),
        *("--output_dir", str(output_dir), "--add_version", "false"),
        num_ranks=2,
    )
    assert done.code == 0, done.stderr
    return output_dir, done


@pytest.fixture(scope="module")
def merged(machine, trained, tmp_path_factory) -> Path:
    """The adapter merged on two ranks."""
    output_dir = tmp_path_factory.mktemp("merged") / "out"
    done = machine.megatron_afresh(
        *("export", "--model", str(machine.model), "--adapters", str(trained[0] / "checkpoint-8")),
        *("--merge_lora", "true", "--to_hf", "true", "--output_dir", str(output_dir)),
        *("--tensor_model_parallel_size", "2"),
        num_ranks=2,
    )
    assert done.code == 0, done.stderr
    assert done.stderr == f"saved the merged model: {output_dir}\n"
    return output_dir


@pytest.fixture(scope="module")
def validation(machine, trained) -> TokenizedDataset:
    (folder,) = machine.home.glob(".cache/mtrain/prepared/*/validation")
    return TokenizedDataset(folder)


def test_a_run_saves_adapters_and_says_what_it_trains(trained, machine) -> None:
    folder, done = trained
    for step in (4, 8):
        names = {path.name for path in (folder / f"checkpoint-{step}").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "args.json"} < names
        assert not any(name.startswith(("model", ".", "adapter_part")) for name in names)
    adapter = load_with_peft(machine.model, folder / "checkpoint-8")
    num_weights = sum(p.numel() for n, p in adapter.named_parameters() if "lora_" in n)
    said = f"Qwen3: {num_weights:,} weights of an adapter (rank 4) are trained on cpu (TP 2, torch"
    assert said in done.stderr
    losses = logged(folder, "loss")
    assert losses[-1] < losses[0] - 0.1
    starts = ("train data: ", "val data: ", "Qwen3: ", "first step ", "train ", "eval ", "saved ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(starts)] == []


def test_peft_computes_the_loss_that_was_logged(trained, machine, validation) -> None:
    """T44: nothing is missing or unexpected, and the adapter has an effect."""
    folder, _ = trained
    expected = logged(folder, "eval_loss")
    for step, loss in zip((4, 8), expected, strict=True):
        model = load_with_peft(machine.model, folder / f"checkpoint-{step}")
        assert loss_of(model, validation) == pytest.approx(loss, rel=1e-5)
    assert expected[1] < expected[0]


def test_transformers_computes_it_from_the_merged_folder(trained, merged, validation) -> None:
    """T44, T45."""
    model, found = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    expected = logged(trained[0], "eval_loss")[-1]
    assert loss_of(model, validation) == pytest.approx(expected, rel=1e-5)


def test_one_rank_exports_the_same_bytes_under_a_name_of_its_own(trained, machine, merged) -> None:
    adapter = trained[0] / "checkpoint-8"
    done = machine.megatron(
        "export", "--model", str(machine.model), "--adapters", f"{adapter}/", "--to_hf", "true"
    )
    assert done.code == 0, done.stderr
    output_dir = adapter.with_name("checkpoint-8-hf")
    assert {path.name for path in output_dir.iterdir()} == {p.name for p in merged.iterdir()}
    for path in merged.iterdir():
        if path.name not in ("args.json", "manifest.json"):
            assert (output_dir / path.name).read_bytes() == path.read_bytes(), path.name


def test_training_goes_on_from_an_adapter(trained, machine, data_words, merged, tmp_path) -> None:
    """Without a learning rate what comes out is what went in; here it is saved merged."""
    folder, _ = trained
    done = machine.sft(
        *("--model", str(machine.model), *data_words, "--global_batch_size", "4"),
        *("--tuner_type", "lora", "--adapters", str(folder / "checkpoint-8")),
        *("--lora_rank", "16", "--lr", "0", "--train_iters", "1", "--merge_lora", "true"),
        *("--output_dir", str(tmp_path), "--add_version", "false", "--report_to", "none"),
    )
    assert done.code == 0, done.stderr
    assert "weights of an adapter (rank 4)" in done.stderr
    assert logged(tmp_path, "eval_loss") == pytest.approx(
        logged(folder, "eval_loss")[-1:], rel=1e-5
    )
    ours = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    expected = load_file(merged / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_training_starts_from_megatrons_format_too(
    trained, machine, data_words, merged, tmp_path
) -> None:
    """Model and adapter as torch_dist, without a learning rate: what comes out is what went in."""
    folder, _ = trained
    model, adapter = tmp_path / "model-mcore", tmp_path / "adapter-mcore"
    sources = {
        model: ("--model", str(machine.model)),
        adapter: (
            *("--model", str(machine.model), "--adapters", str(folder / "checkpoint-8")),
            *("--merge_lora", "false"),
        ),
    }
    for output, words in sources.items():
        done = machine.megatron("export", *words, "--to_mcore", "true", "--output_dir", str(output))
        assert done.code == 0, done.stderr
    done = machine.sft(
        *("--mcore_model", str(model), *data_words, "--global_batch_size", "4"),
        *("--tuner_type", "lora", "--mcore_adapter", str(adapter)),
        *("--lr", "0", "--train_iters", "1", "--merge_lora", "true", "--report_to", "none"),
        *("--tensor_model_parallel_size", "2"),
        *("--output_dir", str(tmp_path / "out"), "--add_version", "false"),
        num_ranks=2,
    )
    assert done.code == 0, done.stderr
    assert logged(tmp_path / "out", "eval_loss") == pytest.approx(
        logged(folder, "eval_loss")[-1:], rel=1e-5
    )
    ours = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    expected = load_file(merged / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


# What is trained and how it is saved.
FAMILIES = {
    "deepseek_v3": ("--modules_to_save", "mlp.gate"),
    "gpt_oss_moe": (
        "--target_modules",
        "all-linear",
        "all-router",
        "--lora_export_layout",
        "fused",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_train_on_two_ranks_load_in_peft_and_merge(
    name, machine, data_words, tmp_path
) -> None:
    model, output, merged = (tmp_path / part for part in ("model", "out", "merged"))
    copy_model(machine, model)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    make_checkpoint(model, name, vocab_size=vocab_size, num_hidden_layers=2)
    done = machine.sft(
        *("--model", str(model), *data_words, "--global_batch_size", "4"),
        *("--tuner_type", "lora", "--lora_rank", "4", "--tensor_model_parallel_size", "2"),
        *("--train_iters", "2", "--lr", "2e-2", "--save_steps", "2", *FAMILIES[name]),
        *("--output_dir", str(output), "--add_version", "false", "--report_to", "none"),
        num_ranks=2,
    )
    assert done.code == 0, done.stderr
    (folder,) = output.glob("checkpoint-2")
    prepared = machine.home.glob(".cache/mtrain/prepared/*/validation")
    expected = logged(output, "eval_loss")[-1]
    judge = load_with_peft(model, folder)
    found = [loss_of(judge, TokenizedDataset(validation)) for validation in prepared]
    assert pytest.approx(expected, rel=1e-5) in found
    done = machine.megatron(
        *("export", "--model", str(model), "--adapters", str(folder), "--to_hf", "true"),
        *("--output_dir", str(merged)),
    )
    assert done.code == 0, done.stderr
    whole, report = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            whole(ids).logits, judge.eval()(ids).logits, rtol=1e-4, atol=1e-4
        )
