"""Runs `megatron sft` in this process and profiles some of its steps on the GPU.

    python benchmarks/kernel_times.py --steps 18 19 --output times.json -- --model DIR ...

Time by class of kernel, how long the GPU worked at all, where it paused longest, and every place of
our code where the host waited for the GPU. Profiled steps are slower on the host: read speed off
other steps.
"""

import argparse
import collections
import json
import re
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mtrain.training.loop as training_loop
from mtrain.cli.main import main as megatron

# The first pattern that is found in the name of a kernel.
_CLASSES = {
    "communication": r"nccl",
    "attention": (
        r"flash|fmha|sdpa|cudnn_generated|cudnn::fusion|mha_"
        r"|^(forward|query_gradient|key_gradient)_kernel"
    ),
    "products": r"gemm|cutlass|nvjet|splitkreduce|cublas|gemv",
    "optimizer": r"adam|^_update_kernel|multi_tensor|lpnorm|l2norm",
    "norms": r"rms_?norm|ln_fwd|ln_bwd|layer_norm|layernorm|GammaBeta",
    "rotary embedding": r"rope|rotary",
    "token exchange": r"permute|sort|index|gather|scatter|topk|cumsum|scan|histogram",
    "copies": r"memcpy|memset|copy|catarray|fillfunctor",
    "compiled": r"triton",
}
_NUM_KERNELS = 25
_NUM_PAUSES = 12


def kernel_class(name: str) -> str:
    """What a kernel is for, by its name."""
    for label, pattern in _CLASSES.items():
        if re.search(pattern, name, flags=re.IGNORECASE):
            return label
    return "element by element"


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) intervals, in their unit."""
    total, last = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


def pauses(kernels: Iterable[tuple[float, float, str]], count: int) -> list[tuple[float, str, str]]:
    """The longest pauses between (begin, end, name), with the names before and behind each."""
    found = []
    last, before = float("inf"), ""
    for begin, end, name in sorted(kernels):
        if begin > last:
            found.append((begin - last, before, name))
        if before == "" or end > last:
            last, before = end, name
    return sorted(found, reverse=True)[:count]


class StepProfiler:
    """Stands in for the training step: profiles the steps from the first to the last one.

    Args:
        train_step: What it calls.
        first: First step that is profiled, from 1.
        last: Last one; the results are there after it.
    """

    def __init__(self, train_step: Any, *, first: int, last: int) -> None:
        self._train_step = train_step
        self._first, self._last = first, last
        self._profile: profile | None = None
        self._waits: collections.Counter[str] = collections.Counter()
        self._started = 0.0
        self.results: dict[str, Any] = {}

    def __call__(self, *args: Any, step: int, **kwargs: Any) -> Any:
        """One step."""
        if step == self._first - 1:
            return self._note_waits(*args, step=step, **kwargs)
        if step == self._first:
            torch.cuda.synchronize()
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
            self._started = time.monotonic()
        result = self._train_step(*args, step=step, **kwargs)
        if step == self._last and self._profile is not None:
            torch.cuda.synchronize()
            seconds = time.monotonic() - self._started
            self._profile.stop()
            self.results = self._summary(seconds)
        return result

    def _note_waits(self, *args: Any, **kwargs: Any) -> Any:
        """Counts where the host waits for the device, by the line that is to blame."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return self._train_step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits = [note for note in caught if "synchroniz" in str(note.message)]
                self._waits.update(f"{note.filename}:{note.lineno}" for note in waits)

    def _summary(self, seconds: float) -> dict[str, Any]:
        assert self._profile is not None
        num_steps = self._last - self._first + 1
        kernels = [
            event
            for event in self._profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        by_class: collections.Counter[str] = collections.Counter()
        by_name: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
        for event in kernels:
            milliseconds = event.time_range.elapsed_us() / 1000
            by_class[kernel_class(event.name)] += milliseconds
            by_name[event.name][0] += 1
            by_name[event.name][1] += milliseconds
        busy = busy_time((event.time_range.start, event.time_range.end) for event in kernels)
        longest = pauses(
            ((e.time_range.start, e.time_range.end, e.name) for e in kernels), _NUM_PAUSES
        )
        slowest = sorted(by_name.items(), key=lambda item: -item[1][1])[:_NUM_KERNELS]
        return {
            "milliseconds_per_step": 1000 * seconds / num_steps,
            "busy_milliseconds_per_step": busy / 1000 / num_steps,
            "kernels_per_step": len(kernels) / num_steps,
            "by_class": {name: ms / num_steps for name, ms in by_class.most_common()},
            "pauses": [
                {"milliseconds": us / 1000, "before": before[:80], "behind": behind[:80]}
                for us, before, behind in longest
            ],
            "waits": dict(self._waits.most_common()),
            "slowest": [
                {"name": name[:160], "calls": calls / num_steps, "milliseconds": ms / num_steps}
                for name, (calls, ms) in slowest
            ],
        }


def show(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = [
        f"{results['milliseconds_per_step']:.1f} ms a step, the GPU works for "
        f"{results['busy_milliseconds_per_step']:.1f}; {results['kernels_per_step']:.0f} kernels"
    ]
    lines += [f"{ms:9.2f} ms  {name}" for name, ms in results["by_class"].items()]
    lines += [
        f"{kernel['milliseconds']:9.2f} ms {kernel['calls']:7.0f} x  {kernel['name'][:110]}"
        for kernel in results["slowest"]
    ]
    lines += [
        f"{pause['milliseconds']:9.2f} ms the GPU waits, between {pause['before'][:50]} "
        f"and {pause['behind'][:50]}"
        for pause in results["pauses"]
    ]
    lines += [f"the host waits {count} x in {place}" for place, count in results["waits"].items()]
    return "\n".join(lines)


def main() -> int:
    """Trains and prints the profile; the exit code of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, required=True, metavar=("FIRST", "LAST"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results.")
    parser.add_argument("flags", nargs="*", help="Flags of megatron sft, after --")
    arguments = parser.parse_args()
    first, last = arguments.steps
    profiler = StepProfiler(training_loop.train_step, first=first, last=last)
    training_loop.train_step = profiler
    code = megatron(["sft", *arguments.flags])
    arguments.output.write_text(json.dumps(profiler.results, indent=2))
    print(show(profiler.results), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
