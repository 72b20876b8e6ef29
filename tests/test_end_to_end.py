"""`megatron sft` as users run it: real processes, from a folder and words to a folder.

The judges are transformers, which loads what was saved, and the run on one rank, whose losses every
layout has to repeat.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.cli import demo
from mtrain.cli.parser import parse_config
from mtrain.config import SftConfig, config_to_dict, resolve_sft
from mtrain.data.storage import TokenizedDataset
from tests.machine import (
    ROOT,
    WORDS,
    Done,
    Machine,
    copy_model,
    logged,
    loss_of,
    make_machine,
)

REAL_DATA = ROOT.parent / "shared" / "data"
LOGGED = {
    *("step", "total_steps", "epoch", "loss", "token_accuracy", "grad_norm", "learning_rate"),
    *("consumed_samples", "consumed_tokens", "tokens_per_second_per_gpu", "memory_gib"),
    *("padded_tokens_per_second_per_gpu", "seconds_per_step", "data_share", "padding_ratio"),
    *("eta_seconds", "skipped_steps", "tflops_per_gpu"),
}
# In the order of the line on the console.
START_PHASES = [
    f"start_{phase}_seconds"
    for phase in ("checks", "data", "imports", "ranks", "model", "weights", "optimizer")
]
START_PHASES.append("start_first_step_seconds")


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("home"))


def run_folder(output_dir: Path) -> Path:
    (folder,) = output_dir.iterdir()
    return folder


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]


def hf_loss(checkpoint: Path, dataset: TokenizedDataset) -> float:
    """Loss a labelled token by the Hugging Face class, which must find all its weights."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return loss_of(model, dataset)


@pytest.fixture(scope="module")
def trained(machine, tmp_path_factory) -> tuple[Path, Done]:
    """The run on one rank that the others are compared with, and what it said."""
    output_dir = tmp_path_factory.mktemp("one_rank") / "out"
    done = machine.megatron_afresh(
        *("sft", "--model", str(machine.model), *WORDS, "--split_dataset_ratio", "0.1"),
        *("--packing", "true", "--max_length", "96", "--global_batch_size", "4"),
        *("--train_iters", "10", "--lr", "1e-2", "--save_steps", "4", "--save_total_limit", "2"),
        *("--eval_steps", "5", "--logging_steps", "2", "--output_dir", str(output_dir)),
        *("--max_shard_size", "500KB"),
    )
    assert done.code == 0, done.stderr
    return run_folder(output_dir), done


def test_a_run_leaves_its_checkpoints_log_and_settings(trained) -> None:
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        *("args.json", "logging.jsonl", "runs", "latest_checkpointed_iteration.txt"),
        *("checkpoint-8", "checkpoint-10"),
    }
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "10\n"
    assert list((folder / "runs").glob("events.out.tfevents.*"))
    files = {path.name for path in (folder / "checkpoint-10").iterdir()}
    assert files >= {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors.index.json", "args.json"),
    }


def test_the_console_says_what_happens_and_nothing_else(trained) -> None:
    """Warnings of libraries about what they lack are not for users."""
    _, done = trained
    starts = ("train data: ", "val data: ", "Qwen3: ", "first step ", "train ", "eval ", "saved ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(starts)] == []


def test_the_phases_of_the_start_are_told_once_and_sum_up(trained) -> None:
    folder, done = trained
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("first step after"))
    total, *told = map(float, re.findall(r"\d+\.\d", line))
    first = read_log(folder)[0]
    seconds = [first[name] for name in START_PHASES]
    assert told == [round(value, 1) for value in seconds]
    assert sum(seconds) == pytest.approx(first["seconds_to_first_step"], abs=1e-6)
    assert total == round(first["seconds_to_first_step"], 1) < done.seconds


def test_log_lines_have_all_logged(trained) -> None:
    folder, _ = trained
    log = read_log(folder)
    train = [line for line in log if "loss" in line]
    assert [line["step"] for line in train] == [1, 2, 4, 6, 8, 10]
    assert all(line.keys() == LOGGED for line in train[1:])
    assert train[0].keys() == LOGGED | {"seconds_to_first_step", *START_PHASES}
    assert [line["step"] for line in log if "eval_loss" in line] == [5, 10]
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]


def test_transformers_computes_the_loss_that_was_logged(trained, machine) -> None:
    """T45: no key is missing or left over, and the validation loss is the same."""
    folder, _ = trained
    (validation,) = machine.home.glob(".cache/mtrain/prepared/*/validation")
    expected = hf_loss(folder / "checkpoint-10", TokenizedDataset(validation))
    assert logged(folder, "eval_loss")[-1] == pytest.approx(expected, rel=1e-5)


def test_saved_settings_are_a_config_file(trained) -> None:
    folder, _ = trained
    config = resolve_sft(parse_config(SftConfig, ["--config", str(folder / "args.json")]))
    assert json.loads(json.dumps(config_to_dict(config))) == json.loads(
        (folder / "args.json").read_text()
    )


@pytest.mark.parametrize(
    "sizes",
    [
        (),
        ("--tensor_model_parallel_size", "2"),
        ("--pipeline_model_parallel_size", "2"),
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_two_ranks_repeat_the_run_of_one(trained, machine, tmp_path, sizes) -> None:
    """T40 from the command line; the settings come from args.json, the data from the cache."""
    expected, _ = trained
    output_dir = tmp_path / "out"
    done = machine.sft(
        *("--config", str(expected / "args.json"), "--output_dir", str(output_dir), *sizes),
        num_ranks=2,
    )
    assert done.code == 0, done.stderr
    assert "(prepared earlier)" in done.stderr
    folder = run_folder(output_dir)
    for name in ("loss", "eval_loss", "consumed_tokens", "consumed_samples"):
        assert logged(folder, name) == pytest.approx(logged(expected, name), rel=1e-4)
    ours, theirs = (
        {
            k: v
            for file in run.glob("checkpoint-10/*.safetensors")
            for k, v in load_file(file).items()
        }
        for run in (folder, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-3)


def test_frozen_weights_stay_as_they_were_and_epochs_end_with_a_checkpoint(
    machine, tmp_path
) -> None:
    """Names of both worlds, bfloat16 on a CPU, rows that are padded one by one."""
    done = machine.sft(
        *("--model", str(machine.model), *WORDS, "--num_train_epochs", "2"),
        *("--save_strategy", "epoch", "--torch_dtype", "bfloat16", "--padding_free", "false"),
        *("--micro_batch_size", "4", "--global_batch_size", "8", "--lr", "1e-2"),
        *("--freeze_parameters_regex", ".", "--report_to", "none", "--add_version", "false"),
        *("--trainable_parameters", "model.layers.1.self_attn.", "decoder.final_layernorm"),
        *("--output_dir", str(tmp_path)),
    )
    assert done.code == 0, done.stderr
    # 60 rows by 8 a step are 7.5 steps an epoch.
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-8",
        "checkpoint-15",
    }
    assert not (tmp_path / "runs").exists()
    before = load_file(machine.model / "model.safetensors")
    after = load_file(tmp_path / "checkpoint-15" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n].to(torch.bfloat16), after[n])}
    assert changed == {
        "model.norm.weight",
        *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.1.self_attn.{name}_norm.weight" for name in "qk"),
    }
    saved = json.loads((tmp_path / "checkpoint-15" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"


def test_a_loss_that_is_not_finite_ends_the_run_with_the_samples(machine, tmp_path) -> None:
    """T33."""
    weights = copy_model(machine, tmp_path / "model")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors")
    done = machine.sft(
        *("--model", str(tmp_path / "model"), *WORDS, "--train_iters", "3"),
        *("--global_batch_size", "2", "--output_dir", str(tmp_path / "out")),
    )
    assert done.code == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "megatron sft: error: step 1: the loss is not finite, no update was made"
    )
    assert len(last.rpartition(": ")[2].split(", ")) == 2


BREAK_RANK_1 = """
import os
if os.environ.get("LOCAL_RANK") == "1":
    import mtrain.training.step as step
    def broken(*args):
        raise KeyError("the real reason")
    step.to_device = broken
"""


def test_a_rank_that_fails_ends_the_run_with_one_traceback(machine, tmp_path) -> None:
    """T32."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_RANK_1)
    done = machine.megatron_afresh(
        *("sft", "--model", str(machine.model), *WORDS, "--train_iters", "3"),
        *("--global_batch_size", "2", "--output_dir", str(tmp_path / "out")),
        num_ranks=2,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert done.code == 1
    assert done.seconds < 60, "start-up included"
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "megatron sft: rank 1 failed:" in done.stderr
    assert done.stderr.count("KeyError: 'the real reason'") == 1


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real data is not beside this checkout")
def test_real_data_in_two_languages(machine, tmp_path) -> None:
    """The behaviour itself is covered above; here with Qwen3's real template and odd vocabulary."""
    model = tmp_path / "model"
    model.mkdir()
    config = demo.demo_config(hidden_size=64, num_layers=2)
    config |= {"vocab_size": 8037, "tie_word_embeddings": False}
    demo.write_model(model, config)
    for path in (REAL_DATA / "qwen3_tokenizer").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    data = [f"{REAL_DATA / f'alpaca_{language}_demo.json'}#120" for language in ("en", "zh")]
    done = machine.sft(
        *("--model", str(model), "--dataset", *data, "--split_dataset_ratio", "0.1"),
        *("--packing", "true", "--max_length", "512", "--truncation_strategy", "right"),
        *("--train_iters", "10", "--global_batch_size", "4", "--lr", "1e-2"),
        *("--output_dir", str(tmp_path / "out"), "--tensor_model_parallel_size", "2"),
        num_ranks=2,
        HOME=str(tmp_path),
    )
    assert done.code == 0, done.stderr
    folder = run_folder(tmp_path / "out")
    losses = logged(folder, "loss")
    assert losses[-1] < losses[0] - 0.5
    (validation,) = tmp_path.glob(".cache/mtrain/prepared/*/validation")
    expected = hf_loss(folder / "checkpoint-10", TokenizedDataset(validation))
    assert logged(folder, "eval_loss") == pytest.approx([expected], rel=1e-5)
