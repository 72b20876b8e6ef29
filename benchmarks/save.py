"""Times the saves of `megatron sft`, synchronous and not, beside the raw rate of the disk.

    python benchmarks/save.py --shape qwen3-4b --folder /dev/shm/save --modes sync async

A full-parameter run on random weights saves weights and optimizer once; a few steps after the
checkpoint has its name, the run is killed, since two checkpoints of that size may not fit. Then the
run is resumed for some steps, and their losses are shown beside those of the first run.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

LAST_STEP = 40
_RAW_BYTES = 8 * 2**30
_SAVED = re.compile(
    r"saved .*: ([\d.]+) GB in ([\d.]+) s \(([\d.]+) GB/s\), training stood still for ([\d.]+) s"
)


def raw_write_rate(folder: Path) -> float:
    """GB/s of one thread that writes a large file and flushes it."""
    block = memoryview(torch.randint(0, 256, (64 * 2**20,), dtype=torch.uint8).numpy())
    path = folder / "raw"
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(_RAW_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return _RAW_BYTES / 1e9 / seconds


def command(arguments: argparse.Namespace, model: Path, output: Path, mode: str) -> list[str]:
    """The words of the run."""
    flags: dict[str, Any] = {
        "model": model,
        "output_dir": output,
        "add_version": "false",
        "dataset": "swift/self-cognition",
        "model_name": "mtrain",
        "model_author": "us",
        "torch_dtype": "bfloat16",
        "packing": "true",
        "max_length": arguments.length,
        "global_batch_size": arguments.global_batch_size,
        "train_iters": 10**6,
        "lr_decay_style": "constant",
        # The next save must not begin before the run is killed.
        "save_steps": arguments.save_step,
        "logging_steps": 1,
        "async_save": "true" if mode == "async" else "false",
        "resume_from_checkpoint": "auto",
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "mtrain.cli.main", "sft", *words, *arguments.flags]


def run(
    words: list[str], output: Path, *, until: int, saves: bool
) -> tuple[list[dict[str, Any]], str]:
    """Runs until a step is logged and, if it saves, that is said; log lines and what it said."""
    log, lines = output / "logging.jsonl", []
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            lines.append(line)
            is_saved = not saves or any(_SAVED.search(line) for line in lines)
            if is_saved and log.exists() and _last_step(log) >= until:
                process.send_signal(signal.SIGKILL)
                break
        process.kill()
    text = "".join(lines)
    if not log.exists():
        raise SystemExit(f"the run failed:\n{text}")
    return [json.loads(line) for line in log.read_text().splitlines()], text


def _last_step(log: Path) -> int:
    lines = log.read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def measure(arguments: argparse.Namespace, model: Path, mode: str) -> str:
    """One row of the table."""
    output = arguments.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    words = command(arguments, model, output, mode)
    started = time.monotonic()
    first, said = run(words, output, until=arguments.save_step + 4, saves=True)
    saved = _SAVED.search(said)
    assert saved is not None, "the run was to say it"
    (output / "logging.jsonl").unlink()
    again = time.monotonic()
    resumed, _ = run(words, output, until=arguments.save_step + 4, saves=False)
    seconds = time.monotonic() - again
    shutil.rmtree(output)
    losses = {line["step"]: line["loss"] for line in first}
    apart = max(abs(losses[line["step"]] - line["loss"]) for line in resumed)
    slowest = max(line["seconds_per_step"] for line in first if line["step"] > arguments.save_step)
    usual = first[arguments.save_step - 2]["seconds_per_step"]
    size, total, rate, blocked = saved.groups()
    return (
        f"| {arguments.shape} {mode} | {size} | {blocked} | {total} | {rate} "
        f"| {usual:.2f} | {slowest:.2f} | {again - started:.0f} | {seconds:.0f} | {apart:.1e} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-4b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["sync", "async"])
    parser.add_argument("--save_step", type=int, default=150)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--global_batch_size", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="More flags of megatron sft, after --")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer, model = arguments.folder / "tokenizer", arguments.folder / "model"
    if not model.exists():
        make = [sys.executable, "-m", "mtrain.cli.main", "demo", "--output_dir", str(tokenizer)]
        subprocess.run(make, check=True)
        for path in tokenizer.glob("*"):
            if path.name in ("config.json", "generation_config.json", "model.safetensors"):
                path.unlink()
        writer = Path(__file__).with_name("shapes.py")
        words = [sys.executable, writer, arguments.shape, model, "--tokenizer", tokenizer]
        subprocess.run(words, check=True)
    print(f"raw write, one thread: {raw_write_rate(arguments.folder):.2f} GB/s")
    rows = []
    for mode in arguments.modes:
        rows.append(measure(arguments, model, mode))
        print(rows[-1], flush=True)
    header = (
        "| case | GB | blocked s | total s | GB/s | s/step before | slowest s/step after "
        "| s, start to end | s, resume to end | largest difference of losses |"
    )
    print("\n".join([header, "|" + "---|" * 10, *rows]))


if __name__ == "__main__":
    main()
