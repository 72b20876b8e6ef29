"""Times `megatron sft` itself: training on packed text, one table.

    python benchmarks/train.py --data FILE ... --tokenizer DIR \
        --cases qwen3-0.6b:te qwen3-8b:torch:lora qwen3-8b:te:full:2 --steps 50

Each case makes a random checkpoint, unless the case before had the same shape, trains, and is read
off its `logging.jsonl`: the first third of the lines (one each five steps) is warm-up, of the
rest the median is shown. A case that fails has a row that says so, and the others go on. With
`--profile` the last two steps are profiled (`kernel_times.py`).
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

HEADER = (
    "| case | trained | ms/step | tok/s a GPU | padding | TFLOP/s | MFU | HFU | peak GiB "
    "| first step after s | first loss | last loss |"
)
_LORA = {
    "tuner_type": "lora",
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0,
    "target_modules": "all-linear",
    "lr": 1e-4,
}
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-5},
    # 12 bytes a parameter: weight, its missing 16 bits and two moments of 2 each, gradient of 4.
    "precision-aware": {
        "lr": 1e-5,
        "use_precision_aware_optimizer": "true",
        "exp_avg_dtype": "bf16",
        "exp_avg_sq_dtype": "bf16",
    },
    "lora": _LORA,
    "lora-attention": {**_LORA, "target_modules": ["linear_qkv", "linear_proj"]},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A shape of `shapes.py`, a backend, a key of `TUNERS`, and the number of GPUs."""

    shape: str
    backend: str
    tuner: str = "full"
    num_gpus: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads SHAPE:BACKEND[:TUNER[:GPUS]]."""
        match = re.fullmatch(r"([^:]+):(te|torch|auto)(?::([^:]+))?(?::(\d+))?", text)
        if match is None or (match[3] or "full") not in TUNERS:
            tuners = "|".join(TUNERS)
            raise argparse.ArgumentTypeError(f"{text}: must be SHAPE:BACKEND[:{tuners}[:GPUS]]")
        return cls(
            shape=match[1],
            backend=match[2],
            tuner=match[3] or "full",
            num_gpus=int(match[4] or 1),
        )

    def __str__(self) -> str:
        gpus = f":{self.num_gpus}" if self.num_gpus > 1 else ""
        return f"{self.shape}:{self.backend}:{self.tuner}{gpus}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a case came to.

    Attributes:
        lines: Log lines with a loss.
        num_trained: How many weights were trained ("?" if it did not say).
        seconds_to_first_step: From the command to the end of the first step (likewise).
    """

    lines: list[dict[str, Any]]
    num_trained: str
    seconds_to_first_step: str


def run_case(case: Case, arguments: argparse.Namespace, work: Path) -> Outcome:
    """Trains one case."""
    model = _checkpoint(case.shape, arguments.tokenizer, work / "models")
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    command = [*_program(case, arguments), *sft_words(case, arguments, model, output)]
    try:
        shown = _run_shown(command, environment=_environment(case))
        lines = (output / "logging.jsonl").read_text().splitlines()
    finally:
        # A full-parameter case leaves a whole checkpoint.
        shutil.rmtree(output, ignore_errors=True)
    trained = re.search(r"([\d,]+) weights .*are trained", shown)
    started = re.search(r"first step after ([\d.]+) s", shown)
    return Outcome(
        lines=[line for line in map(json.loads, lines) if "loss" in line],
        num_trained=trained[1] if trained else "?",
        seconds_to_first_step=started[1] if started else "?",
    )


def sft_words(
    case: Case, arguments: argparse.Namespace, model: Path, output: Path
) -> list[str | Path]:
    """Flags of `megatron sft`."""
    flags = {
        "model": model,
        "output_dir": output,
        "add_version": "false",
        "transformer_impl": case.backend,
        "torch_dtype": "bfloat16",
        "packing": "true",
        "max_length": arguments.length,
        "micro_batch_size": 1,
        "global_batch_size": arguments.global_batch_size,
        "train_iters": arguments.steps,
        # The last step is always saved; at least no other is, and weights alone.
        "save_steps": arguments.steps,
        "no_save_optim": "true",
        "logging_steps": 5,
        **TUNERS[case.tuner],
    }
    words: list[str | Path] = ["--dataset", *arguments.data]
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else (str(value),))]
    return [*words, *arguments.flags]


def _program(case: Case, arguments: argparse.Namespace) -> list[str | Path]:
    """What is run in front of the flags."""
    if not arguments.profile:
        return [sys.executable, "-m", "mtrain.cli.main", "sft"]
    script = Path(__file__).with_name("kernel_times.py")
    output = arguments.log_dir / f"{str(case).replace(':', '-')}-kernels.json"
    steps = [str(arguments.steps - 1), str(arguments.steps)]
    return [sys.executable, script, "--steps", *steps, "--output", output, "--"]


def _environment(case: Case) -> dict[str, str]:
    if case.num_gpus == 1:
        return dict(os.environ)
    return os.environ | {"NPROC_PER_NODE": str(case.num_gpus)}


def _checkpoint(shape: str, tokenizer: Path, folder: Path) -> Path:
    """The only checkpoint in the folder: that of this shape, which may be there already."""
    model = folder / shape
    if not model.exists():
        shutil.rmtree(folder, ignore_errors=True)
        writer = Path(__file__).with_name("shapes.py")
        # Under its name only when it is complete: the next case may want it.
        unfinished = folder / "unfinished"
        command = [sys.executable, writer, shape, unfinished, "--tokenizer", tokenizer]
        subprocess.run(command, check=True)
        unfinished.rename(model)
    return model


def _run_shown(command: list[str | Path], *, environment: dict[str, str]) -> str:
    """Runs a command, showing its stderr while it comes; returns it."""
    lines = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            sys.stderr.write(line)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(lines)


def table_row(case: Case, outcome: Outcome, *, is_profiled: bool) -> str:
    """The row of one case; the line with the steps that were profiled is left out."""
    lines = outcome.lines
    steady = lines[len(lines) // 3 : -1 if is_profiled else None]

    def median(name: str) -> float:
        return statistics.median(line.get(name) or 0.0 for line in steady)

    return (
        f"| {case} | {outcome.num_trained} | {1000 * median('seconds_per_step'):.1f} "
        f"| {median('tokens_per_second_per_gpu'):,.0f} "
        f"| {100 * median('padding_ratio'):.2f} % "
        f"| {median('tflops_per_gpu'):.0f} | {100 * median('mfu'):.1f} % "
        f"| {100 * median('hfu'):.1f} % | {median('memory_gib'):.1f} "
        f"| {outcome.seconds_to_first_step} "
        f"| {lines[0]['loss']:.4f} | {lines[-1]['loss']:.4f} |"
    )


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="Datasets of megatron sft.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--cases",
        nargs="+",
        required=True,
        type=Case.parse,
        help="SHAPE:BACKEND[:TUNER[:GPUS]]",
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--global_batch_size", type=int, default=2, help="Packs of a step.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log_dir", type=Path, help="Keep the log lines of every case here.")
    parser.add_argument("--profile", action="store_true", help="Needs --log_dir and one GPU.")
    parser.add_argument("--work", type=Path, help="Where checkpoints are made, such as a RAM disk.")
    parser.add_argument("flags", nargs="*", help="More flags of megatron sft, after --")
    arguments = parser.parse_args()
    if arguments.profile and arguments.log_dir is None:
        parser.error("--profile needs --log_dir")
    if arguments.log_dir is not None:
        arguments.log_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def _keep(lines: list[dict[str, Any]], case: Case, folder: Path | None) -> None:
    if folder is not None:
        path = folder / f"{str(case).replace(':', '-')}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def versions() -> str:
    """The machine and the packages that decide the speed."""
    names = ("torch", "megatron-core", "transformer-engine", "nvidia-cudnn-cu13", "triton")
    found = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return ", ".join([f"{gpu}; Python {platform.python_version()}", *found])


def main() -> int:
    """Runs the cases and prints the table; 1 if one failed."""
    arguments = read_arguments()
    rows = []
    num_failed = 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for case in arguments.cases:
            try:
                outcome = run_case(case, arguments, Path(folder))
            except subprocess.CalledProcessError as error:
                num_failed += 1
                rows.append(f"| {case} | failed with exit code {error.returncode} |")
            else:
                rows.append(table_row(case, outcome, is_profiled=arguments.profile))
                _keep(outcome.lines, case, arguments.log_dir)
            # Now too, because the cases that follow may be cut short.
            print(rows[-1], flush=True)
    print(versions())
    print("\n".join([HEADER, "|" + "---|" * HEADER.count(" |"), *rows]))
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
