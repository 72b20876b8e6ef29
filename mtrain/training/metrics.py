"""What a log line says, and the meter that adds it up between two lines.

The one thing to know: steps only add to sums on the device. At a log line every rank sends one
small vector to all others, and every rank comes to the same `LogRecord`.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mtrain.parallel import ParallelState
from mtrain.platform.device import DeviceInfo
from mtrain.training.balance import BALANCE_LOSSES, SIDE_LOSSES, take_side_losses
from mtrain.training.batch import BatchCounts
from mtrain.training.flops import ModelShape, hardware_flops, training_flops

if TYPE_CHECKING:
    from mtrain.training.step import StepResult

__all__ = ["LogRecord", "Meter", "RunSize"]

_GIB = 2**30
_TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """One log line: means and rates since the line before.

    Attributes:
        step: Steps done.
        total_steps: Steps of the run.
        epoch: Passes over the training data, with a fraction.
        loss: Cross-entropy over all tokens with a label, nats a token.
        token_accuracy: Share of them whose label was the likeliest word.
        grad_norm: Global gradient norm of the last step, before clipping; None if skipped.
        learning_rate: Learning rate of the last step.
        consumed_samples: Samples trained on since the start.
        consumed_tokens: Tokens since the start, without padding.
        tokens_per_second_per_gpu: Without padding.
        padded_tokens_per_second_per_gpu: With padding, which is what was computed.
        tflops_per_gpu: Useful operations a second, 1e12: those of real tokens, computed once.
        mfu: The same over the device's peak; None where the peak is not known.
        hfu: Likewise of what was computed, with padding and recomputation (`hardware_flops`).
        memory_gib: Highest memory of any rank so far, as the driver sees it.
        seconds_per_step: Wall time of a step; evaluation and saving are left out.
        data_share: Share of that time spent waiting for data, on the slowest rank.
        padding_ratio: Share of the computed tokens that are padding.
        eta_seconds: Time left at this speed.
        skipped_steps: float16 steps without an update since the line before.
        load_balancing_loss: Mean over expert layers, without its coefficient; None if unused.
        seq_load_balancing_loss: The same, balanced in every sequence.
        global_load_balancing_loss: The same, balanced over the global batch.
        z_loss: Router z-loss, likewise.
        mtp_loss: Cross-entropy of multi-token prediction, without its coefficient; mean over its
            layers and over micro-batches, None if unused.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    token_accuracy: float
    grad_norm: float | None
    learning_rate: float
    consumed_samples: int
    consumed_tokens: int
    tokens_per_second_per_gpu: float
    padded_tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None
    hfu: float | None
    memory_gib: float
    seconds_per_step: float
    data_share: float
    padding_ratio: float
    eta_seconds: float
    skipped_steps: int
    load_balancing_loss: float | None = None
    seq_load_balancing_loss: float | None = None
    global_load_balancing_loss: float | None = None
    z_loss: float | None = None
    mtp_loss: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        """The fields that have a value."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """What the numbers of a log line are relative to.

    Attributes:
        total_steps: Steps of the run.
        samples_per_epoch: Samples of the training data that are not dropped.
        shape: Sizes of the model.
        num_routers: Expert layers on this rank.
    """

    total_steps: int
    samples_per_epoch: int
    shape: ModelShape
    num_routers: int


class Meter:
    """Adds up steps and turns them into a `LogRecord`.

    Args:
        state: This rank.
        device: The device, for MFU.
        size: The run.
    """

    def __init__(self, *, state: ParallelState, device: DeviceInfo, size: RunSize) -> None:
        self._state = state
        self._device = device
        self._size = size
        self._consumed_samples = 0
        self._consumed_tokens = 0
        # Tensor ranks compute the same loss and all stages see the same batch: one of them counts.
        self._has_loss = state.is_last_stage and state.coordinates.tp_rank == 0
        self._start_interval()

    def _start_interval(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._state.device)
        self._counts = BatchCounts()
        self._num_steps = 0
        self._num_skipped = 0
        self._data_seconds = 0.0
        self._paused_seconds = 0.0
        self._last: StepResult | None = None
        self._started = time.monotonic()
        self._side_losses = torch.zeros(
            len(SIDE_LOSSES), dtype=torch.float64, device=self._state.device
        )

    def add_step(self, result: StepResult, counts: BatchCounts, *, data_seconds: float) -> None:
        """Notes one step.

        Args:
            result: From `train_step`.
            counts: The micro-batches of this data-parallel rank.
            data_seconds: How long this rank waited for them.
        """
        if self._has_loss:
            self._sums += result.sums
        self._counts += counts
        self._num_steps += 1
        self._num_skipped += result.is_skipped
        self._data_seconds += data_seconds
        self._last = result

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training (evaluation, saving) out of the rates."""
        self._paused_seconds += seconds

    def progress(self) -> list[list[float]]:
        """What the next log line adds to, as one list of numbers a rank; all ranks call it."""
        self._side_losses += take_side_losses(self._state.device)
        host = [
            *(self._consumed_samples, self._consumed_tokens, self._num_steps, self._num_skipped),
            *(self._seconds(), self._data_seconds),
            *dataclasses.astuple(self._counts),
        ]
        device = self._state.device
        ours = torch.tensor(host, dtype=torch.float64, device=device)
        return self._gather(torch.cat([ours, self._sums, self._side_losses])).tolist()

    def restore(self, progress: Sequence[Sequence[float]]) -> None:
        """Goes on from where a run stood.

        Args:
            progress: From `progress`. With another number of ranks the sums of the running interval
                are left out: its log line is then about the steps since the resume.
        """
        samples, tokens = progress[0][:2]
        self._consumed_samples, self._consumed_tokens = int(samples), int(tokens)
        if len(progress) != self._state.layout.world_size:
            return
        _, _, num_steps, num_skipped, seconds, data_seconds, *rest = progress[self._state.rank]
        self._num_steps, self._num_skipped = int(num_steps), int(num_skipped)
        self._started -= seconds
        self._data_seconds = data_seconds
        num_counts = len(dataclasses.fields(BatchCounts))
        self._counts = BatchCounts(
            **{
                field.name: int(value)
                for field, value in zip(dataclasses.fields(BatchCounts), rest, strict=False)
            }
        )
        sums = torch.tensor(rest[num_counts:], dtype=torch.float64, device=self._state.device)
        self._sums, self._side_losses = sums[:3].clone(), sums[3:].clone()

    def _seconds(self) -> float:
        return time.monotonic() - self._started - self._paused_seconds

    def _gather(self, ours: torch.Tensor) -> torch.Tensor:
        """The numbers of all ranks, one rank a row, on the CPU."""
        everyone = [torch.empty_like(ours) for _ in range(self._state.layout.world_size)]
        dist.all_gather(everyone, ours, group=self._state.world.group)
        return torch.stack(everyone).cpu()

    def record(self, step: int) -> LogRecord:
        """The log line after `step`; starts the next interval. All ranks must call this."""
        last, size = self._last, self._size
        assert last is not None, "a log line needs a step"
        totals, slowest = self._exchange()
        self._consumed_samples += int(totals["samples"])
        self._consumed_tokens += int(totals["tokens"])
        seconds = max(slowest["seconds"], 1e-9)
        num_labels = max(totals["labels"], 1.0)
        seconds_per_step = seconds / self._num_steps
        record = LogRecord(
            step=step,
            total_steps=size.total_steps,
            epoch=self._consumed_samples / size.samples_per_epoch,
            loss=totals["loss"] / num_labels,
            token_accuracy=totals["correct"] / num_labels,
            grad_norm=None if last.is_skipped else last.grad_norm,
            learning_rate=last.learning_rate,
            consumed_samples=self._consumed_samples,
            consumed_tokens=self._consumed_tokens,
            memory_gib=slowest["memory"] / _GIB,
            seconds_per_step=seconds_per_step,
            data_share=slowest["data_seconds"] / seconds,
            padding_ratio=1 - totals["tokens"] / max(totals["padded_tokens"], 1.0),
            eta_seconds=seconds_per_step * (size.total_steps - step),
            skipped_steps=self._num_skipped,
            **self._rates(totals, seconds),
            **_side_losses(totals),
        )
        self._start_interval()
        return record

    def _rates(self, totals: Mapping[str, float], seconds: float) -> dict[str, float | None]:
        """What a GPU did a second, by the names of the log line."""
        gpu_seconds, peak = seconds * self._state.layout.world_size, self._device.peak_flops
        work = {
            "num_labels": totals["labels"],
            "num_attention_pairs": totals["attention_pairs"],
        }
        tokens, padded = totals["tokens"], totals["padded_tokens"]
        useful = training_flops(self._size.shape, num_tokens=tokens, **work) / gpu_seconds
        done = hardware_flops(self._size.shape, num_padded_tokens=padded, **work) / gpu_seconds
        return {
            "tokens_per_second_per_gpu": tokens / gpu_seconds,
            "padded_tokens_per_second_per_gpu": padded / gpu_seconds,
            "tflops_per_gpu": useful / _TERA,
            "mfu": None if peak is None else useful / peak,
            "hfu": None if peak is None else done / peak,
        }

    def _exchange(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums over the ranks, and the largest of any rank, in one collective."""
        counts = self._counts if self._has_loss else BatchCounts()
        summed = {
            "samples": counts.num_samples,
            "tokens": counts.num_tokens,
            "padded_tokens": counts.num_padded_tokens,
            "attention_pairs": counts.num_attention_pairs,
            "last_stage_calls": self._state.is_last_stage * self._counts.num_micro_batches,
            "router_calls": self._size.num_routers * self._counts.num_micro_batches,
        }
        largest = {
            "seconds": self._seconds(),
            "data_seconds": self._data_seconds,
            "memory": _peak_memory(self._state.device),
        }
        device = self._state.device
        host = torch.tensor([*summed.values(), *largest.values()], dtype=torch.float64)
        self._side_losses += take_side_losses(device)
        table = self._gather(torch.cat([host.to(device), self._sums, self._side_losses]))
        names = (*summed, *largest, "loss", "correct", "labels", *SIDE_LOSSES)
        totals = dict(zip(names, table.sum(dim=0).tolist(), strict=True))
        highest = dict(zip(names, table.amax(dim=0).tolist(), strict=True))
        return totals, highest


def _side_losses(totals: dict[str, float]) -> dict[str, float]:
    calls = dict.fromkeys(BALANCE_LOSSES, totals["router_calls"]) | {
        "mtp_loss": totals["last_stage_calls"]
    }
    return {name: totals[name] / calls[name] for name in SIDE_LOSSES if totals[name] != 0}


def _peak_memory(device: torch.device) -> int:
    """Bytes: memory reserved on the GPU, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
