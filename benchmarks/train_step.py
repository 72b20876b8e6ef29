"""Times `megatron sft` itself: training on packed text, one process, one table.

    python benchmarks/train_step.py --data FILE ... --tokenizer DIR \
        --cases qwen3-0.6b:te qwen3-0.6b:torch qwen3-8b:te:lora --steps 50

Each case makes a random checkpoint, unless the case before had the same shape, trains, and is read
off its `logging.jsonl`: the first half of the lines (one each five steps) is warm-up, of the rest
the median is shown. A case that fails has a row that says so, and the others go on.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HEADER = (
    "| case | trained | ms/step | tok/s | padded tok/s | MFU | peak GiB | first loss | last loss |"
)
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-5},
    "lora": {
        "tuner_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "lr": 1e-4,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A shape of `shapes.py`, a backend, and a key of `TUNERS`."""

    shape: str
    backend: str
    tuner: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads SHAPE:BACKEND or SHAPE:BACKEND:TUNER."""
        parts = text.split(":")
        tuner = parts[2] if len(parts) > 2 else "full"
        if len(parts) not in (2, 3) or tuner not in TUNERS:
            tuners = "|".join(TUNERS)
            raise argparse.ArgumentTypeError(f"{text}: must be SHAPE:BACKEND[:{tuners}]")
        return cls(shape=parts[0], backend=parts[1], tuner=tuner)

    def __str__(self) -> str:
        return f"{self.shape}:{self.backend}" + (f":{self.tuner}" if self.tuner != "full" else "")


def run_case(
    case: Case, arguments: argparse.Namespace, work: Path
) -> tuple[list[dict[str, Any]], str]:
    """Trains one case.

    Returns:
        Its log lines, and how many weights were trained ("?" if it did not say).
    """
    model = _checkpoint(case.shape, arguments.tokenizer, work / "models")
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
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
        # The last step is always saved; at least no other is.
        "save_steps": arguments.steps,
        "logging_steps": 5,
        "manual_gc": "true",
        **TUNERS[case.tuner],
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "mtrain.cli.main", "sft", "--dataset", *arguments.data]
    try:
        shown = _run_shown([*command, *words, *arguments.flags])
        lines = (output / "logging.jsonl").read_text().splitlines()
    finally:
        # A full-parameter case leaves a whole checkpoint.
        shutil.rmtree(output, ignore_errors=True)
    trained = re.search(r"([\d,]+) weights .*are trained", shown)
    records = [line for line in map(json.loads, lines) if "loss" in line]
    return records, trained[1] if trained else "?"


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


def _run_shown(command: list[str]) -> str:
    """Runs a command, showing its stderr while it comes; returns it."""
    lines = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            sys.stderr.write(line)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(lines)


def table_row(case: Case, lines: list[dict[str, Any]], trained: str) -> str:
    """The row of one case."""
    steady = lines[len(lines) // 2 :]

    def median(name: str) -> float:
        return statistics.median(line.get(name) or 0.0 for line in steady)

    return (
        f"| {case} | {trained} | {1000 * median('seconds_per_step'):.1f} "
        f"| {median('tokens_per_second_per_gpu'):,.0f} "
        f"| {median('padded_tokens_per_second_per_gpu'):,.0f} "
        f"| {100 * median('mfu'):.1f} % | {median('memory_gib'):.1f} "
        f"| {lines[0]['loss']:.4f} | {lines[-1]['loss']:.4f} |"
    )


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="Datasets of megatron sft.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--cases", nargs="+", required=True, type=Case.parse, help="SHAPE:BACKEND[:full|:lora]"
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--global_batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log_dir", type=Path, help="Keep the log lines of every case here.")
    parser.add_argument("flags", nargs="*", help="More flags of megatron sft, after --")
    arguments = parser.parse_args()
    if arguments.log_dir is not None:
        arguments.log_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def _keep(lines: list[dict[str, Any]], case: Case, folder: Path | None) -> None:
    if folder is not None:
        path = folder / f"{str(case).replace(':', '-')}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> int:
    """Runs the cases and prints the table; 1 if one failed."""
    arguments = read_arguments()
    rows = []
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases:
            try:
                lines, trained = run_case(case, arguments, Path(folder))
            except subprocess.CalledProcessError as error:
                num_failed += 1
                rows.append(f"| {case} | failed with exit code {error.returncode} |")
            else:
                rows.append(table_row(case, lines, trained))
                _keep(lines, case, arguments.log_dir)
            # Now too, because the cases that follow may be cut short.
            print(rows[-1], flush=True)
    print("\n".join([HEADER, "|" + "---|" * HEADER.count(" |"), *rows]))
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
