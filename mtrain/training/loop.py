"""The training loop: steps, and between them log lines, evaluations and checkpoints.

The one thing to know: what happens at a step depends on the step's number alone, so all ranks do
the same without talking about it. Saving and evaluating are callables; the loop knows when.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mtrain.config.training import TrainingConfig
from mtrain.parallel import ParallelState
from mtrain.training.batch import MicroBatch, count_batches
from mtrain.training.evaluate import EvaluationResult
from mtrain.training.metrics import Meter
from mtrain.training.requests import Answer, PendingSaves, RankRequests, Stop
from mtrain.training.step import train_step
from mtrain.training.wrap import gather_parameters
from mtrain.training.writers import RunLog

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = ["LoopPlan", "Surroundings", "epoch_ends", "every", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """When things happen, in optimizer steps.

    Attributes:
        total_steps: Length of the run.
        first_step: Steps that were done before; a resumed run goes on with the next one.
        logging_steps: Steps between two log lines; the first and the last step have one too.
        checkpoints: Steps after which a checkpoint is saved.
        evaluations: Steps after which the model is evaluated.
    """

    total_steps: int
    first_step: int = 0
    logging_steps: int
    checkpoints: frozenset[int]
    evaluations: frozenset[int]

    def logs_after(self, step: int) -> bool:
        """Whether there is a log line after this step."""
        return step == 1 or step % self.logging_steps == 0 or step == self.total_steps


def every(interval: int, total_steps: int) -> frozenset[int]:
    """Every so many steps, and the last one."""
    return frozenset({*range(interval, total_steps + 1, interval), total_steps})


def epoch_ends(
    epochs_consumed: Callable[[int], float], total_steps: int, *, first_step: int = 0
) -> frozenset[int]:
    """The steps in which an epoch ends, and the last one.

    Args:
        epochs_consumed: Epochs before a step, counted from 0.
        total_steps: Length of the run.
        first_step: Steps that were done before.
    """
    steps = range(first_step, total_steps + 1)
    epochs = {step: int(epochs_consumed(step)) for step in steps}
    ends = (step for step in steps[1:] if epochs[step] > epochs[step - 1])
    return frozenset({*ends, total_steps})


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What happens between steps.

    Attributes:
        meter: Adds up what log lines say.
        log: Where they go; None on all ranks but the first.
        evaluate: Evaluates the model as it is; None without validation data.
        save: Begins to save a checkpoint of the given step.
        saves: What became of it; complete when training ends.
        stop: Whether this rank is asked to stop.
        completed: Told what was done last, for whoever watches that something is.
        started: Called after the first step.
    """

    meter: Meter
    log: RunLog | None
    evaluate: Callable[[], EvaluationResult] | None
    save: Callable[[int], None]
    saves: PendingSaves
    stop: Stop
    completed: Callable[[str], None]
    started: Callable[[], None]


def train(
    *,
    chunks: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    steps: Iterator[Sequence[MicroBatch]],
    plan: LoopPlan,
    settings: TrainingConfig,
    state: ParallelState,
    around: Surroundings,
) -> int:
    """Trains to the end of the plan, or until a rank is asked to stop; saves in both cases.

    Args:
        chunks: Wrapped model chunks of this rank.
        optimizer: From `build_optimizer`.
        scheduler: From `build_scheduler`.
        steps: The micro-batches of this data-parallel rank, one list a step.
        plan: When things happen.
        settings: The training section, for garbage collection.
        state: This rank.
        around: What happens between steps.

    Returns:
        The number of the signal that ended training early; 0 at the end of the plan.

    Raises:
        NonFiniteError: The loss or a gradient is not finite.
        ValueError: The data ends before the plan.
    """
    requests = RankRequests(state.world)
    stopped_by = 0
    with _garbage_collection(settings) as collect:
        for step in range(plan.first_step + 1, plan.total_steps + 1):
            requests.ask(around.stop.requested, is_writing=around.saves.is_working)
            started = time.monotonic()
            batches = _next_batches(steps, step, plan.total_steps)
            data_seconds = time.monotonic() - started
            counts = count_batches(batches)
            result = train_step(chunks, optimizer, scheduler, batches, state=state, step=step)
            around.meter.add_step(result, counts, data_seconds=data_seconds)
            around.completed(f"step {step}")
            answer = requests.answer()
            if step == plan.first_step + 1:
                around.started()
            evaluated = _between_steps(step, answer, chunks, plan=plan, around=around)
            with _paused(around.meter):
                collect(step, evaluated=evaluated)
            if answer.stop and step < plan.total_steps:
                stopped_by = answer.stop
                break
        around.saves.wait()
    return stopped_by


def _between_steps(
    step: int,
    answer: Answer,
    chunks: Sequence[DistributedDataParallel],
    *,
    plan: LoopPlan,
    around: Surroundings,
) -> bool:
    """Logs, evaluates and saves, whatever is due; returns whether it evaluated."""
    log = around.log
    if log is not None:
        log.advance()
    if plan.logs_after(step):
        record = around.meter.record(step)
        if log is not None:
            log.write(record.as_dict(), step=step, kind="train")
    with _paused(around.meter):
        evaluates = around.evaluate is not None and step in plan.evaluations and not answer.stop
        if evaluates:
            _evaluate(around.evaluate, log=log, step=step)
            around.completed(f"the evaluation after step {step}")
        if around.saves.is_pending and not answer.is_writing:
            around.saves.advance()
        if step in plan.checkpoints or answer.stop:
            gather_parameters(chunks)
            around.save(step)
            around.completed(f"the save of step {step}")
    return evaluates


def _next_batches(
    steps: Iterator[Sequence[MicroBatch]], step: int, total_steps: int
) -> Sequence[MicroBatch]:
    batches = next(steps, None)
    if batches is None:
        raise ValueError(f"the data ends after {step - 1} of {total_steps} steps")
    return batches


def _evaluate(evaluate: Callable[[], EvaluationResult], *, log: RunLog | None, step: int) -> None:
    result = evaluate()
    if log is not None:
        values = {
            "loss": result.loss,
            "token_accuracy": result.token_accuracy,
            "num_tokens": result.num_tokens,
        }
        log.write(values, step=step, kind="eval")


@contextlib.contextmanager
def _paused(meter: Meter) -> Iterator[None]:
    """Leaves what happens inside out of the speed of training."""
    started = time.monotonic()
    yield
    meter.pause(time.monotonic() - started)


class _Collect(Protocol):
    def __call__(self, step: int, *, evaluated: bool) -> None:
        """Collects garbage if it is time to."""


@contextlib.contextmanager
def _garbage_collection(settings: TrainingConfig) -> Iterator[_Collect]:
    """Hands out a function to call after each step.

    With `manual_gc` Python's own collector is off, so that no rank stops at a step of its own while
    all others wait for it. What is there already (imports, the model) is not looked through: that
    takes half a second and finds nothing.
    """

    def collect(step: int, *, evaluated: bool) -> None:
        every = settings.manual_gc_steps
        is_due = every and step % every == 0
        if settings.manual_gc and (is_due or (evaluated and settings.manual_gc_eval)):
            gc.collect()

    if not settings.manual_gc:
        yield collect
        return
    others_froze = gc.get_freeze_count() > 0
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        if not others_froze:
            gc.unfreeze()
