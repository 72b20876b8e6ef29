"""`megatron sft` as users run it: real processes, from a folder and words to a folder.

The judges are transformers, which loads what was saved, and the run on one rank, whose losses every
layout has to repeat.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.cli import demo
from mtrain.cli.parser import parse_config
from mtrain.config import SftConfig, config_to_dict, resolve_sft
from mtrain.data.storage import TokenizedDataset

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
WORDS = ("--dataset", "swift/self-cognition#60", "--model_name", "mtrain", "--model_author", "us")
LOGGED = {
    *("step", "total_steps", "epoch", "loss", "token_accuracy", "grad_norm", "learning_rate"),
    *("consumed_samples", "consumed_tokens", "tokens_per_second_per_gpu", "memory_gib"),
    *("padded_tokens_per_second_per_gpu", "seconds_per_step", "data_share", "padding_ratio"),
    *("eta_seconds", "skipped_steps"),
}


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
        return self.run(
            "-m", "mtrain.cli.main", "sft", *words, NPROC_PER_NODE=str(num_ranks), **environ
        )

    def run(self, *words: str, **environ: str) -> Done:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.home),
                "OMP_NUM_THREADS": "1",
                **environ,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Done(done.returncode, done.stderr, time.monotonic() - started)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    home = tmp_path_factory.mktemp("home")
    demo.run(["--output_dir", str(home / "model"), "--hidden_size", "64", "--num_layers", "4"])
    return Machine(home, home / "model")


def run_folder(output_dir: Path) -> Path:
    (folder,) = output_dir.iterdir()
    return folder


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]


def numbers(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_log(folder) if name in line]


def hf_loss(checkpoint: Path, dataset: TokenizedDataset) -> float:
    """Loss a labelled token by the Hugging Face class, which must find all its weights."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    total, num_labels = 0.0, 0
    for index in range(len(dataset)):
        sample = dataset[index]
        labels = torch.from_numpy(sample.labels.astype("int64"))
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids.astype("int64"))[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        num_labels += int((labels != -100).sum())
    return total / num_labels


@pytest.fixture(scope="module")
def trained(machine, tmp_path_factory) -> tuple[Path, Done]:
    """The run on one rank that the others are compared with, and what it said."""
    output_dir = tmp_path_factory.mktemp("one_rank") / "out"
    done = machine.sft(
        *("--model", str(machine.model), *WORDS, "--split_dataset_ratio", "0.1"),
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
    starts = ("train data: ", "val data: ", "Qwen3: ", "train ", "eval ", "saved ", "Tokenising ")
    lines = [part for part in done.stderr.replace("\r", "\n").splitlines() if part]
    assert [line for line in lines if not line.startswith(starts)] == []


def test_log_lines_have_all_numbers(trained) -> None:
    folder, _ = trained
    log = read_log(folder)
    train = [line for line in log if "loss" in line]
    assert [line["step"] for line in train] == [1, 2, 4, 6, 8, 10]
    assert all(line.keys() == LOGGED for line in train)
    assert [line["step"] for line in log if "eval_loss" in line] == [5, 10]
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]


def test_transformers_computes_the_loss_that_was_logged(trained, machine) -> None:
    """T45: no key is missing or left over, and the validation loss is the same."""
    folder, _ = trained
    (validation,) = machine.home.glob(".cache/mtrain/prepared/*/validation")
    expected = hf_loss(folder / "checkpoint-10", TokenizedDataset(validation))
    assert numbers(folder, "eval_loss")[-1] == pytest.approx(expected, rel=1e-5)


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
    assert "Tokenising" not in done.stderr
    folder = run_folder(output_dir)
    for name in ("loss", "eval_loss", "consumed_tokens", "consumed_samples"):
        assert numbers(folder, name) == pytest.approx(numbers(expected, name), rel=1e-4)
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


def copy_model(machine: Machine, folder: Path) -> dict[str, torch.Tensor]:
    """Copies the model but for its weights, which are returned."""
    folder.mkdir()
    for path in machine.model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return load_file(machine.model / "model.safetensors")


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
    done = machine.sft(
        *("--model", str(machine.model), *WORDS, "--train_iters", "3"),
        *("--global_batch_size", "2", "--output_dir", str(tmp_path / "out")),
        num_ranks=2,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert done.code == 1
    assert done.seconds < 60, "start-up included"
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "megatron sft: rank 1 failed:" in done.stderr
    assert done.stderr.count("KeyError: 'the real reason'") == 1


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
    losses = numbers(folder, "loss")
    assert losses[-1] < losses[0] - 0.5
    (validation,) = tmp_path.glob(".cache/mtrain/prepared/*/validation")
    expected = hf_loss(folder / "checkpoint-10", TokenizedDataset(validation))
    assert numbers(folder, "eval_loss") == pytest.approx([expected], rel=1e-5)
