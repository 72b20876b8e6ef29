"""Runs that are continued, by the command: bit for bit in one layout, and sensibly in another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.machine import WORDS, Done, Machine, make_machine

STEPS = 5
COMMON = (
    *WORDS,
    *("--micro_batch_size", "1", "--global_batch_size", "4", "--train_iters", str(STEPS)),
    *("--lr", "1e-2", "--lr_warmup_iters", "2", "--logging_steps", "2", "--save_steps", "2"),
    *("--add_version", "false"),
)
PACKED = ("--packing", "true", "--max_length", "96")
SGD = ("--optimizer", "sgd", "--use_distributed_optimizer", "false")
LORA = ("--tuner_type", "lora", "--lora_rank", "4", "--lora_dropout", "0.2")
# Few enough samples that five steps are more than an epoch.
TWO_EPOCHS = ("--dataset", "swift/self-cognition#14")

KINDS = {
    "full": (*PACKED, "--weight_decay_incr_style", "linear", "--end_weight_decay", "0.2"),
    "full, two epochs": TWO_EPOCHS,
    "bf16": (*PACKED, "--torch_dtype", "bfloat16"),
    "fp16": (*PACKED, "--torch_dtype", "float16"),
    "lora": (*LORA, "--target_modules", "all-linear", *TWO_EPOCHS),
    "lora in bf16, merged": (*LORA, *PACKED, "--torch_dtype", "bfloat16", "--merge_lora", "true"),
    "async": (*PACKED, "--async_save", "true"),
    # Communication overlaps with computation there.
    "two ranks": (*PACKED, "--torch_dtype", "bfloat16"),
}
NUM_RANKS = {"two ranks": 2}


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("home"))


STARTED: dict[tuple, Path] = {}


@pytest.fixture
def started(machine, tmp_path_factory):
    """Makes an uninterrupted run, once for each kind and number of ranks."""

    def start(*flags: str, num_ranks: int = 1) -> Path:
        key = (*flags, num_ranks)
        if key not in STARTED:
            folder = tmp_path_factory.mktemp("started") / "run"
            done = sft(machine, folder, *flags, num_ranks=num_ranks)
            assert done.code == 0, done.stderr
            STARTED[key] = folder
        return STARTED[key]

    return start


def sft(machine: Machine, folder: Path, *flags: str, num_ranks: int = 1) -> Done:
    model = () if "--model" in flags else ("--model", str(machine.model))
    return machine.sft(*model, *COMMON, *flags, "--output_dir", str(folder), num_ranks=num_ranks)


def interrupted(run: Path, folder: Path, *, step: int = 2) -> Path:
    """A run as it is when it was killed some time after a checkpoint."""
    folder.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    lines = (run / "logging.jsonl").read_text().splitlines(keepends=True)
    (folder / "logging.jsonl").write_text("".join(lines[:3]) + '{"step": 5, "lo')
    staged = folder / f".checkpoint-{step + 1}.staged-17"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"half")
    return folder


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        kind = path.name.partition("-")[0].removesuffix(".safetensors")
        if kind != "rng":
            found |= {f"{kind}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def log_of(folder: Path) -> list[dict]:
    """What does not depend on the clock."""
    varying = ("second", "eta", "memory", "share", "flops")
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not any(v in name for v in varying)
        }
        for line in (folder / "logging.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_continued_ends_bit_equal(machine, started, tmp_path, kind):
    """T10: loss, gradient norm, weights and moments, with dropout, packing and several epochs."""
    num_ranks = NUM_RANKS.get(kind, 1)
    run = started(*KINDS[kind], num_ranks=num_ranks)
    folder = interrupted(run, tmp_path / "run")
    words = (*KINDS[kind], "--resume_from_checkpoint", "auto")
    done = sft(machine, folder, *words, num_ranks=num_ranks)
    assert done.code == 0, done.stderr
    assert f"continues {folder}/checkpoint-2 after step 2 of {STEPS}" in done.stderr
    assert "changed since then" not in done.stderr
    expected, found = tensors(run / "checkpoint-5"), tensors(folder / "checkpoint-5")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The line after step 2 was written before, those of the crashed run after it are not kept.
    assert log_of(folder) == log_of(run)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((1, ()), (2, ())),
        ((2, ()), (1, ("--use_distributed_optimizer", "false"))),
        ((2, ("--tensor_model_parallel_size", "2")), (2, ("--pipeline_model_parallel_size", "2"))),
    ],
    ids=["1 to dp2", "dp2 to 1", "tp2 to pp2"],
)
def test_another_layout_goes_on_with_the_same_samples_and_losses(
    machine, started, tmp_path, saved, resumed
):
    """T11, T12: also at another data-parallel size."""
    (num_ranks, flags), (num_ranks_now, flags_now) = saved, resumed
    run = started(*PACKED, *flags, num_ranks=num_ranks)
    folder = interrupted(run, tmp_path / "run")
    done = sft(
        machine,
        folder,
        *(*PACKED, *flags_now, "--resume_from_checkpoint", "auto"),
        num_ranks=num_ranks_now,
    )
    assert done.code == 0, done.stderr
    for before, after in zip(log_of(run), log_of(folder), strict=True):
        assert after["consumed_samples"] == before["consumed_samples"]
        assert after["consumed_tokens"] == before["consumed_tokens"]
        assert after["epoch"] == before["epoch"]
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-6)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=2e-5)


def test_finetune_false_with_a_checkpoint_as_model_or_adapter_means_the_same(
    machine, started, tmp_path
):
    """As users of the reference product write it; the newest checkpoint goes on where it is."""
    for kind, flag in (("full", "--model"), ("lora", "--adapters")):
        run = started(*KINDS[kind])
        folder = interrupted(run, tmp_path / kind)
        base = () if flag == "--model" else ("--model", str(machine.model))
        words = (*KINDS[kind], *base, flag, str(folder / "checkpoint-2"), "--finetune", "false")
        done = sft(machine, folder, *words)
        assert done.code == 0, done.stderr
        expected, found = tensors(run / "checkpoint-5"), tensors(folder / "checkpoint-5")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_changed_is_listed_and_a_finished_run_says_so(machine, started, tmp_path):
    """T13: the new value is used."""
    run = started(*KINDS["full"])
    folder = interrupted(run, tmp_path / "run")
    words = (*KINDS["full"], "--resume_from_checkpoint", "auto")
    changed = ("--lr", "1e-3", "--seed", "7", "--train_iters", "3")
    done = sft(machine, folder, *words, *changed)
    assert done.code == 0, done.stderr
    assert "used as given now: --train_iters 3 (it was 5), --seed 7 (it was 42), --lr 0.001" in (
        done.stderr
    )
    assert "they are trained on from their beginning" in done.stderr
    last = log_of(folder)[-1]
    assert last["step"] == 3
    assert last["learning_rate"] <= 1e-3
    # Killed after the last checkpoint got its name, while an older one was deleted.
    (folder / ".checkpoint-2.staged-deleted").mkdir()
    done = sft(machine, folder, *words, *changed)
    assert done.code == 0, done.stderr
    assert f"the run is finished: {folder}/checkpoint-3 has 3 of 3 steps" in done.stderr
    assert not list(folder.glob(".*"))


def test_state_that_is_missing_is_an_error_and_never_made_up(machine, started, tmp_path):
    """T14."""
    folder = interrupted(started(*KINDS["full"]), tmp_path / "run")
    checkpoint = folder / "checkpoint-2"
    words = (*KINDS["full"], "--resume_from_checkpoint", str(checkpoint))
    moments = checkpoint / "state" / "optimizer_exp_avg.safetensors"
    moments.rename(tmp_path / "moments")
    done = sft(machine, folder, *words)
    assert done.code == 2
    assert "is damaged (missing: state/optimizer_exp_avg.safetensors)" in done.stderr
    (tmp_path / "moments").rename(moments)
    done = sft(machine, folder, *words, *SGD)
    assert done.code == 2
    assert "optimizer is sgd, and the state of the optimizer was saved with adam" in done.stderr
    done = sft(machine, folder, *words, "--no_load_optim", "true")
    assert done.code == 0, done.stderr
    assert "the optimizer starts afresh (--no_load_optim true)" in done.stderr
    assert log_of(folder)[-1]["step"] == STEPS
    shutil.rmtree(checkpoint / "state")
    done = sft(machine, folder, *words)
    assert done.code == 2
    assert "has no state to continue from" in done.stderr


def test_an_adapter_is_not_continued_on_another_base(machine, started, tmp_path):
    """T15."""
    other = make_machine(tmp_path / "other")
    weights = load_file(other.model / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, other.model / "model.safetensors", metadata={"format": "pt"})
    for kind in ("lora", "lora in bf16, merged"):
        folder = interrupted(started(*KINDS[kind]), tmp_path / kind)
        words = (*KINDS[kind], "--resume_from_checkpoint", "auto", "--model", str(other.model))
        done = sft(machine, folder, *words)
        assert done.code == 2, done.stderr
        assert "base" in done.stderr
