"""Times a training step on the CPU beside the same model in transformers and PEFT.

    python benchmarks/cpu_step.py [--sizes 128x4 256x4] [--tuners lora full] [--threads 1]

`megatron sft` itself trains a model of `megatron demo` in float32 on one rank. Around each of its
steps `hf_step.py`, in a process of its own, trains the same weights on the same batch: forward,
loss, backward, clipping, AdamW. Steps alternate, so whatever else the machine does meets both. The
losses of all steps are compared, so both compute the same. Batches are rows of equal length; the
same rows joined, which is what `megatron sft` does by default; or a pack of documents. Transformers
gets rows as rows, and a pack as it is, with `position_ids`, or a document a row with padding. Times
are medians behind the warm-up; CPU times are those of all threads of a process.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import hf_step

from mtrain.cli.main import main as megatron
from mtrain.data.self_cognition import self_cognition_rows

HEADER = "| model | trained | batch | transformers | ours ms | theirs ms | ratio | CPU ratio |"
# What transformers is given instead of the batch of the first word.
LAYOUTS = {"rows": ("rows",), "joined": ("padded",), "pack": ("pack", "padded")}
NUM_DATA_ROWS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, what is trained of it, and its batches (a key of `LAYOUTS`)."""

    hidden_size: int
    num_layers: int
    tuner: str
    batch: str
    layout: str

    def __str__(self) -> str:
        size = f"hidden {self.hidden_size}, {self.num_layers} layers"
        return f"| {size} | {self.tuner} | {self.batch} | {self.layout} |"


class Pairs:
    """The steps of both sides, one after the other."""

    def __init__(self, theirs: ProcessPoolExecutor) -> None:
        self._theirs = theirs
        self.ours: list[hf_step.Timing] = []
        self.others: list[hf_step.Timing] = []

    def around(self, train_step: Any) -> Any:
        """A `train_step` that is timed and lets the other side train on the same batch."""

        def timed(
            chunks: Any, optimizer: Any, scheduler: Any, batches: Any, **keywords: Any
        ) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = train_step(chunks, optimizer, scheduler, batches, **keywords)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            loss, _, num_labels = result.sums.tolist()
            self.ours.append(hf_step.Timing(wall, cpu, loss / num_labels, result.grad_norm))
            same = [as_lists(batch) for batch in batches]
            self.others.append(self._theirs.submit(hf_step.step, same).result())
            return result

        return timed


def as_lists(batch: Any) -> dict[str, Any]:
    """A micro-batch for another process."""
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    values = {name: getattr(batch, name) for name in names}
    return {name: None if value is None else value.numpy() for name, value in values.items()}


def run_case(case: Case, options: argparse.Namespace, work: Path) -> Pairs:
    """Trains on both sides."""
    model, adapter = work / "model", work / "adapter"
    sizes = ["--hidden_size", case.hidden_size, "--num_layers", case.num_layers]
    call_megatron("demo", "--output_dir", model, *sizes)
    settings = hf_step.Settings(
        model=model,
        adapter=adapter if case.tuner == "lora" else None,
        layout=case.layout,
        threads=options.threads,
    )
    data = work / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in data_rows(case.batch)))
    spawned = {"mp_context": get_context("spawn"), "initializer": hf_step.start}
    with ProcessPoolExecutor(1, **spawned, initargs=(settings,)) as theirs:
        # Makes the adapter that ours starts from.
        theirs.submit(hf_step.is_ready).result()
        pairs = Pairs(theirs)
        train(case, options, pairs, settings, data)
    return pairs


def train(
    case: Case, options: argparse.Namespace, pairs: Pairs, settings: hf_step.Settings, data: Path
) -> None:
    """Runs `megatron sft` with the other side hooked in."""
    import torch

    from mtrain.platform.device import prepare_megatron

    torch.set_num_threads(options.threads)
    prepare_megatron()
    from mtrain.training import loop

    length, rows = options.length, options.rows
    flags = {
        "model": settings.model,
        "dataset": data,
        "output_dir": data.parent / "out",
        "torch_dtype": "float32",
        "train_iters": options.steps,
        "save_steps": options.steps,
        "logging_steps": options.steps,
        "no_save_optim": "true",
        **hf_step.SFT_FLAGS,
    }
    if case.batch != "pack":
        flags |= {"padding_free": str(case.batch == "joined").lower()}
        flags |= {"max_length": length, "truncation_strategy": "right"}
        flags |= {"micro_batch_size": rows, "global_batch_size": rows}
    else:
        flags |= {"packing": "true", "max_length": length * rows, "global_batch_size": 1}
    if case.tuner == "lora":
        flags |= {"tuner_type": "lora", "adapters": settings.adapter, "lora_dropout": 0}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with mock.patch.object(loop, "train_step", pairs.around(loop.train_step)):
        call_megatron("sft", *words)


def call_megatron(*words: Any) -> None:
    """Runs a command in this process."""
    if code := megatron([str(word) for word in words]):
        raise SystemExit(code)


def data_rows(batch: str) -> Iterator[dict[str, Any]]:
    """Texts longer than any row, or conversations of one to eight turns."""
    chance = random.Random(0)
    pairs = list(self_cognition_rows(names=["mtrain"], authors=["you"]))
    for _ in range(NUM_DATA_ROWS):
        if batch != "pack":
            text = " ".join(" ".join(pair.values()) for pair in chance.sample(pairs, 40))
            yield {"text": text}
            continue
        turns = chance.sample(pairs, chance.randint(1, 8))
        messages = []
        for turn in turns:
            messages.append({"role": "user", "content": turn["query"]})
            messages.append({"role": "assistant", "content": turn["response"]})
        yield {"messages": messages}


def table_row(case: Case, pairs: Pairs) -> str:
    """Compares both sides: losses and gradient norms of all steps, times of the last two thirds.

    Raises:
        AssertionError: They did not compute the same.
    """
    for step, (ours, other) in enumerate(zip(pairs.ours, pairs.others, strict=True), start=1):
        assert abs(ours.loss - other.loss) < 1e-3 * other.loss, (
            f"{case} step {step}: {ours} {other}"
        )
        difference = abs(ours.grad_norm - other.grad_norm)
        assert difference < 1e-2 * other.grad_norm, f"{case} step {step}: {ours} {other}"
    behind = len(pairs.ours) // 3
    ours, others = pairs.ours[behind:], pairs.others[behind:]

    def medians(name: str) -> tuple[float, float]:
        return tuple(
            1e3 * statistics.median(getattr(timing, name) for timing in side)
            for side in (ours, others)
        )

    (wall, other_wall), (cpu, other_cpu) = medians("wall"), medians("cpu")
    return (
        f"{case} {wall:.1f} | {other_wall:.1f} | {wall / other_wall:.2f} | {cpu / other_cpu:.2f} |"
    )


def parse_size(text: str) -> tuple[int, int]:
    """`128x4` -> hidden size and number of layers."""
    hidden_size, _, num_layers = text.partition("x")
    return int(hidden_size), int(num_layers)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(128, 4), (256, 4)])
    parser.add_argument("--tuners", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--batches", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rows", type=int, default=8, help="In a batch.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="Of torch, on either side.")
    return parser.parse_args()


def main() -> None:
    """Prints a row for every case."""
    options = read_arguments()
    rows = []
    for hidden_size, num_layers in options.sizes:
        for tuner in options.tuners:
            for batch in options.batches:
                for layout in LAYOUTS[batch]:
                    case = Case(
                        hidden_size=hidden_size,
                        num_layers=num_layers,
                        tuner=tuner,
                        batch=batch,
                        layout=layout,
                    )
                    with tempfile.TemporaryDirectory() as folder:
                        rows.append(table_row(case, run_case(case, options, Path(folder))))
                    print(rows[-1], file=sys.stderr, flush=True)
    print(HEADER, "|" + "---|" * HEADER.count(" |"), *rows, sep="\n")


if __name__ == "__main__":
    main()
