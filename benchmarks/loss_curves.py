"""Compares loss curves of `megatron sft`, with and without its fusions, and of a plain step.

    python benchmarks/loss_curves.py --data FILE ... --tokenizer DIR --shape qwen3-0.6b \
        --steps 50 --work /dev/shm --log_dir curves

Every variant trains all parameters of one random checkpoint on the same packs, in a process of its
own. The `unfused` ones switch off every fusion that has a flag, CUDA graphs and kernels of ours for
attention. Fusions without a flag (norms, loss, Adam) meet the `plain` step, which is transformers
in torch's autocast with torch's AdamW (`hf_step.py`), given the batches that `megatron sft` was
seen to train on. `plain-float32`, if asked for, is the same without autocast: how far `plain` is
from it is what rounding to bfloat16 does. Differences are those from the first variant. A GPU
trains in bfloat16, a CPU in float32, where the curves agree to about 1e-5.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import hf_step
import numpy as np
import torch
from cpu_step import as_lists
from shapes import SHAPES, write_checkpoint
from train import Case, sft_words, versions

from mtrain.cli.main import main as megatron
from mtrain.config.later import WITHOUT_EFFECT
from mtrain.config.model import ModelConfig
from mtrain.platform.device import has_gpu, has_transformer_engine

# That of experts only matters between ranks.
FUSIONS = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name.endswith("_fusion") and field.name not in WITHOUT_EFFECT
)
UNFUSED = dict.fromkeys(FUSIONS, "false") | {"cuda_graph_impl": "none"}
# Of `megatron sft`: the backend, and flags. A named kernel for attention is not one of ours.
OURS = {
    "te": ("te", {}),
    "torch": ("torch", {}),
    "te-unfused": ("te", UNFUSED | {"attention_backend": "fused"}),
    "torch-unfused": ("torch", UNFUSED | {"attention_backend": "flash"}),
}
PLAIN = ("plain", "plain-float32")
VARIANTS = (*OURS, *PLAIN)
DEFAULT_VARIANTS = (*OURS, "plain")  # a pack of 8,192 tokens in float32 takes seconds
SHOWN_STEPS = (1, 2, 5, 10, 20, 30, 40, 50)

Batches = list[dict[str, Any]]  # the micro-batches of a step, as `as_lists` makes them


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss and gradient norm (before clipping) of every step."""

    loss: list[float]
    grad_norm: list[float]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a curve is from another one: losses in nats, norms relative to the other's."""

    largest_loss: float
    mean_loss: float
    largest_norm: float

    def __str__(self) -> str:
        return f"{self.largest_loss:.1e} | {self.mean_loss:.1e} | {self.largest_norm:.1e}"


class Recorder:
    """Stands in for the training step: keeps what it is given and what comes of it."""

    def __init__(self, train_step: Any) -> None:
        self._train_step = train_step
        self.curve = Curve([], [])
        self.steps: list[Batches] = []

    def __call__(
        self, chunks: Any, optimizer: Any, scheduler: Any, batches: Any, **keywords: Any
    ) -> Any:
        """One step."""
        self.steps.append([as_lists(batch) for batch in batches])
        result = self._train_step(chunks, optimizer, scheduler, batches, **keywords)
        loss, _, num_labels = result.sums.tolist()
        self.curve.loss.append(loss / num_labels)
        self.curve.grad_norm.append(result.grad_norm)
        return result


class Curves:
    """Trains one variant after the other.

    Args:
        options: The command line.
        work: Folder for the checkpoint and what training leaves.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options = options
        self._model, self._output = work / "model", work / "out"
        config = {**SHAPES[options.shape], **options.sizes}
        in_own_process(
            functools.partial(write_checkpoint, tokenizer=options.tokenizer), self._model, config
        )
        self._steps: list[Batches] = []

    def run(self, variant: str) -> Curve:
        """Trains one.

        Raises:
            RuntimeError: It failed, or its batches were not those of the variants before.
        """
        if variant in PLAIN:
            return self._run_plain(variant)
        try:
            curve, steps = in_own_process(train_ours, self._words(variant))
        finally:
            # It leaves a whole checkpoint.
            shutil.rmtree(self._output, ignore_errors=True)
        if self._steps and not are_same(self._steps, steps):
            raise RuntimeError("it trained on other batches than the variants before")
        self._steps = steps
        return curve

    def _words(self, variant: str) -> list[str]:
        backend, more = OURS[variant]
        case = Case(shape=self._options.shape, backend=backend)
        flags = hf_step.SFT_FLAGS | {
            "lr": self._options.lr,
            "torch_dtype": self._options.torch_dtype,
            "logging_steps": 1,
            **more,
        }
        words = sft_words(case, self._options, self._model, self._output)
        return [
            *map(str, words),
            *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
        ]

    def _run_plain(self, variant: str) -> Curve:
        if not self._steps:
            raise RuntimeError("there are no batches, because megatron sft did not train")
        settings = hf_step.Settings(
            model=self._model,
            adapter=None,
            layout="pack",
            threads=torch.get_num_threads(),
            lr=self._options.lr,
            device="cuda" if has_gpu() else "cpu",
            dtype="float32" if variant == "plain-float32" else self._options.torch_dtype,
        )
        return in_own_process(train_plain, settings, self._steps)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function where nothing is imported, patched or held on the GPU yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def train_ours(words: list[str]) -> tuple[Curve, list[Batches]]:
    """Runs `megatron sft`; returns also what it trained on."""
    from mtrain.platform.device import prepare_megatron

    prepare_megatron()
    from mtrain.training import loop

    recorder = Recorder(loop.train_step)
    with mock.patch.object(loop, "train_step", recorder):
        code = megatron(["sft", *words])
    if code:
        raise RuntimeError(f"megatron sft ended with exit code {code}")
    return recorder.curve, recorder.steps


def train_plain(settings: hf_step.Settings, steps: list[Batches]) -> Curve:
    """Trains in transformers."""
    trainer = hf_step.Trainer(settings)
    curve = Curve([], [])
    for number, batches in enumerate(steps, start=1):
        timing = trainer.step(batches)
        print(f"plain step {number}/{len(steps)}: {timing}", file=sys.stderr)
        curve.loss.append(timing.loss)
        curve.grad_norm.append(timing.grad_norm)
    return curve


def are_same(steps: list[Batches], others: list[Batches]) -> bool:
    """Whether all steps have the same micro-batches."""
    mine, theirs = (list(itertools.chain(*side)) for side in (steps, others))
    return len(mine) == len(theirs) and all(
        np.array_equal(batch[name], other[name])
        for batch, other in zip(mine, theirs, strict=True)
        for name in batch
    )


def difference(curve: Curve, other: Curve) -> Difference:
    """Compares two curves of the same steps."""
    losses = np.abs(np.subtract(curve.loss, other.loss))
    norms = np.abs(np.divide(curve.grad_norm, other.grad_norm) - 1)
    return Difference(losses.max().item(), losses.mean().item(), norms.max().item())


def table(curves: dict[str, Curve | None]) -> str:
    """A row for every variant; None: it failed."""
    complete = [curve for curve in curves.values() if curve is not None]
    num_steps = len(complete[0].loss) if complete else 0
    shown = [step for step in SHOWN_STEPS if step <= num_steps]
    header = "| variant | " + "".join(f"loss at {step} | " for step in shown)
    header += "largest loss difference | mean | largest relative norm difference |"
    rows = [header, "|" + "---|" * header.count(" |")]
    for name, curve in curves.items():
        if curve is None:
            rows.append(f"| {name} | failed |")
            continue
        losses = "".join(f"{curve.loss[step - 1]:.4f} | " for step in shown)
        away = " | | " if curve is complete[0] else difference(curve, complete[0])
        rows.append(f"| {name} | {losses}{away} |")
    return "\n".join(rows)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="Datasets of megatron sft.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--sizes", type=json.loads, default={}, help="More of config.json, as JSON")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=8192, help="Tokens of a pack.")
    parser.add_argument("--global_batch_size", type=int, default=1, help="Packs of a step.")
    parser.add_argument("--lr", type=float, default=hf_step.LR, help="Of all steps.")
    parser.add_argument(
        "--torch_dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if has_gpu() else "float32",
    )
    parser.add_argument("--work", type=Path, help="Where checkpoints are made, such as a RAM disk.")
    parser.add_argument("--log_dir", type=Path, help="Keep all losses and norms here, as JSON.")
    parser.add_argument("flags", nargs="*", help="More flags of megatron sft, after --")
    return parser.parse_args()


def usable_variants(wanted: list[str]) -> list[str]:
    """Those that can run here, `megatron sft` first: it makes the batches."""
    chosen = [name for name in VARIANTS if name in wanted]
    without = [name for name in chosen if name in OURS and OURS[name][0] == "te"]
    if not without or has_transformer_engine():
        return chosen
    print(f"Left out, because Transformer Engine cannot be used here: {', '.join(without)}")
    return [name for name in chosen if name not in without]


def keep(curves: dict[str, Curve | None], options: argparse.Namespace) -> None:
    """Writes what was run and every loss and norm."""
    if options.log_dir is None:
        return
    options.log_dir.mkdir(parents=True, exist_ok=True)
    found = {name: dataclasses.asdict(curve) for name, curve in curves.items() if curve is not None}
    content = {"options": vars(options), "unfused": FUSIONS, "curves": found}
    path = options.log_dir / "loss_curves.json"
    path.write_text(json.dumps(content, indent=2, default=str))


def main() -> int:
    """Runs the variants and prints the table; 1 if one failed."""
    options = read_arguments()
    curves: dict[str, Curve | None] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        runs = Curves(options, Path(folder))
        for variant in usable_variants(options.variants):
            began = time.monotonic()
            try:
                curves[variant] = runs.run(variant)
            except Exception:
                # The others go on.
                traceback.print_exc()
                curves[variant] = None
            # Now, because the variants that follow may be cut short.
            keep(curves, options)
            print(f"{variant}: {time.monotonic() - began:.0f} s", flush=True)
    print(versions(), options.torch_dtype, sep=", ")
    print(f"unfused: {' '.join(f'--{name} false' for name in FUSIONS)}", table(curves), sep="\n")
    return int(None in curves.values())


if __name__ == "__main__":
    sys.exit(main())
