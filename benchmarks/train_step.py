"""Times `megatron sft` itself: full-parameter training on packed text, one process, one table.

    python benchmarks/train_step.py --data FILE ... --tokenizer DIR \
        --cases qwen3-0.6b:te qwen3-0.6b:torch --steps 50

Each case makes a random checkpoint, trains, and is read off its `logging.jsonl`: the first half of
the lines (one each five steps) is warm-up, of the rest the median is shown.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HEADER = "| case | ms/step | tok/s | padded tok/s | MFU | GiB | first loss | last loss |"


def run_case(case: str, arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Trains one case and returns its log lines."""
    shape, backend = case.split(":")
    model = work / shape
    if not model.exists():
        shapes = Path(__file__).with_name("shapes.py")
        command = [sys.executable, shapes, shape, model, "--tokenizer", arguments.tokenizer]
        subprocess.run(command, check=True)
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    flags = {
        "model": model,
        "output_dir": output,
        "add_version": "false",
        "transformer_impl": backend,
        "torch_dtype": "bfloat16",
        "packing": "true",
        "max_length": arguments.length,
        "micro_batch_size": 1,
        "global_batch_size": arguments.global_batch_size,
        "train_iters": arguments.steps,
        "logging_steps": 5,
        "lr": 1e-5,
        "manual_gc": "true",
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "mtrain.cli.main", "sft", "--dataset", *arguments.data]
    subprocess.run([*command, *words, *arguments.flags], check=True)
    lines = (output / "logging.jsonl").read_text().splitlines()
    shutil.rmtree(output)
    return [line for line in map(json.loads, lines) if "loss" in line]


def table_row(case: str, lines: list[dict[str, Any]]) -> str:
    """The row of one case."""
    steady = lines[len(lines) // 2 :]

    def median(name: str) -> float:
        return statistics.median(line[name] or 0.0 for line in steady)

    return (
        f"| {case} | {1000 * median('seconds_per_step'):.1f} "
        f"| {median('tokens_per_second_per_gpu'):,.0f} "
        f"| {median('padded_tokens_per_second_per_gpu'):,.0f} "
        f"| {100 * median('mfu'):.1f} % | {median('memory_gib'):.1f} "
        f"| {lines[0]['loss']:.4f} | {lines[-1]['loss']:.4f} |"
    )


def main() -> None:
    """Runs the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="Datasets of megatron sft.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True, help="shape:backend")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--global_batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log_dir", type=Path, help="Keep the log lines of every case here.")
    parser.add_argument("flags", nargs="*", help="More flags of megatron sft, after --")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases:
            lines = run_case(case, arguments, Path(folder))
            rows.append(table_row(case, lines))
            if arguments.log_dir is not None:
                path = arguments.log_dir / f"{case.replace(':', '-')}.jsonl"
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("\n".join([HEADER, "|" + "---|" * HEADER.count(" |"), *rows]))


if __name__ == "__main__":
    main()
