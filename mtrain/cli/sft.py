"""`megatron sft` on one rank, from the configuration to the last checkpoint, in order.

This is the file to read first. By the time it runs, `mtrain.cli.main` has checked the flags and
`mtrain.cli.preparation` has prepared the data, before the ranks were started.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mtrain.checkpoint.folder import write_atomically
from mtrain.checkpoint.run_folder import continues_in, create_run_folder, remove_leftovers
from mtrain.cli.batches import Batches
from mtrain.cli.joining import join, training_dtype
from mtrain.cli.launch import Placement
from mtrain.cli.loading import find_backend, load_adapter, load_model, start_parallel
from mtrain.cli.model_source import hf_names, stored_names
from mtrain.cli.notices import finished_notice, start_notice, stop_notice
from mtrain.cli.preparation import Inputs, open_inputs
from mtrain.cli.rank_checks import check_cuda_graphs, check_same_inputs
from mtrain.cli.replaying import replay, replays_layers
from mtrain.cli.resuming import (
    ResumePoint,
    find_resume_point,
    merged_adapter,
    open_batches,
    restore,
)
from mtrain.cli.saving import (
    TrainingRun,
    adapter_dtype,
    check_room,
    checkpoint_contents,
    make_saver,
)
from mtrain.cli.start_clock import StartClock
from mtrain.config import SftConfig, config_to_dict
from mtrain.data.storage import TokenizedDataset
from mtrain.model.build import fuse_weight_gradients
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState, World, destroy_parallel, destroy_world
from mtrain.platform.device import device_info
from mtrain.platform.signals import signal_exit_code
from mtrain.platform.stop_request import StopRequest
from mtrain.training.balance import count_routers
from mtrain.training.evaluate import EvaluationResult, evaluate
from mtrain.training.flops import ModelShape
from mtrain.training.freeze import freeze_parameters, keep_graph_connected
from mtrain.training.loop import LoopPlan, Surroundings, epoch_ends, every, train
from mtrain.training.metrics import Meter, RunSize
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.watchdog import Watchdog
from mtrain.training.wrap import wrap_chunks
from mtrain.training.writers import RunLog, open_run_log

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

    from mtrain.data.tokenize import PreparedData


def run(config: SftConfig, here: Placement, clock: StartClock) -> int:
    """Trains on this rank; every rank runs it.

    Args:
        config: Resolved and checked.
        here: This rank.
        clock: Measures the start.

    Returns:
        Exit code.

    Raises:
        ValueError: A setting does not fit the model or the data.
        NonFiniteError: The loss or a gradient is not finite.
        SaveError: A checkpoint could not be written.
    """
    started = datetime.now()
    backend = find_backend(config)
    check_cuda_graphs(config.model)
    inputs = open_inputs(config, world_size=here.world_size, data_key=here.data_key)
    point = find_resume_point(config)
    clock.end_phase("checks")
    world = join(config, here)
    check_same_inputs(
        config,
        inputs.source,
        world,
        adapter=inputs.adapter,
        data=inputs.data,
        step=point.trainer.step if point else None,
    )
    state = start_parallel(config, world, seed=config.training.seed)
    clock.end_phase("ranks")
    train_data = open_batches(config, inputs, state, point=point)
    clock.end_phase("data")
    total_steps = config.training.train_iters or train_data.plan.total_steps
    output_dir = Path(config.checkpoint.output_dir).expanduser()
    if point is not None and point.trainer.step >= total_steps:
        _say(world, finished_notice(point, total_steps=total_steps))
        _tidy_up(world, point, output_dir)
        return _end(0)

    bare, trained = _load(config, inputs, state, backend=backend, point=point, clock=clock)
    run = _wrap(bare, config, inputs, state, train_data, backend=backend, total_steps=total_steps)
    notes = restore(run, point) if point else []
    clock.end_phase("optimizer")
    folder = create_run_folder(
        output_dir,
        add_version=config.checkpoint.add_version,
        started=started,
        world=world,
        resumed=point.folder if point else None,
    )
    check_room(run, folder)
    _say(world, start_notice(run, trained=trained, folder=folder), *notes)
    first_step = point.trainer.step if point else 0
    stopped_by = _train(run, train_data, folder, here, first_step=first_step, clock=clock)
    if stopped_by:
        _say(world, stop_notice(stopped_by))
    return _end(signal_exit_code(stopped_by) if stopped_by else 0)


def _wrap(
    bare: list[LanguageModel],
    config: SftConfig,
    inputs: Inputs,
    state: ParallelState,
    train_data: Batches,
    *,
    backend: str,
    total_steps: int,
) -> TrainingRun:
    """The model with gradient buffers, optimizer and all else that a run has."""
    replays = replays_layers(bare, config)
    chunks = wrap_chunks(
        bare,
        parallel=config.parallel,
        grad_reduce_in_fp32=config.training.accumulate_allreduce_grads_in_fp32,
    )
    if replays:
        replay(bare, chunks)
    optimizer = build_optimizer(chunks, config.optimizer)
    return TrainingRun(
        config=config,
        inputs=inputs,
        state=state,
        backend=backend,
        bare=bare,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, total_steps=total_steps),
        meter=_meter(bare, inputs, train_data, state, total_steps=total_steps),
        batches=train_data.plan,
        total_steps=total_steps,
    )


def _tidy_up(world: World, point: ResumePoint, output_dir: Path) -> None:
    """What is left of a finished run: nobody goes on in it any more, who would do it."""
    if world.is_first_rank and continues_in(output_dir, point.folder):
        remove_leftovers(point.folder.parent)


def _end(code: int) -> int:
    destroy_parallel()
    destroy_world()
    return code


def _train(
    run: TrainingRun,
    train_data: Batches,
    folder: Path,
    here: Placement,
    *,
    first_step: int,
    clock: StartClock,
) -> int:
    """Trains to the end; returns the number of the signal that ended it early, or 0."""
    config, state = run.config, run.state
    saver = make_saver(run, folder)
    with (
        _open_log(run, folder, first_step=first_step) as log,
        StopRequest(here.failure_folder) as stop,
        Watchdog(config.training.hang_timeout, rank=state.rank) as watchdog,
    ):
        return train(
            chunks=run.chunks,
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            steps=train_data.steps(run.total_steps, first=first_step),
            plan=_loop_plan(run, first_step=first_step),
            settings=config.training,
            state=state,
            around=Surroundings(
                meter=run.meter,
                log=log,
                evaluate=_evaluation(config, run.inputs.data, run.chunks, state),
                save=lambda step: saver.save(
                    step, checkpoint_contents(run, step, open_file=saver.open_file)
                ),
                saves=saver,
                stop=stop,
                completed=watchdog.beat,
                started=functools.partial(_tell_start, clock, log),
            ),
        )


def _tell_start(clock: StartClock, log: RunLog | None) -> None:
    clock.end_phase("first step")
    if log is not None:
        log.tell_once(clock.line(), clock.record())


def _load(
    config: SftConfig,
    inputs: Inputs,
    state: ParallelState,
    *,
    backend: str,
    point: ResumePoint | None,
    clock: StartClock,
) -> tuple[list[LanguageModel], str]:
    """The chunks of this rank, where only what is trained wants gradients; and what that is."""
    source, adapter = inputs.source, inputs.adapter
    chunks = load_model(
        config,
        source,
        state,
        backend=backend,
        training=config.training,
        dtype=training_dtype(config.model, source.hf_config),
        built=functools.partial(clock.end_phase, "model"),
    )
    clock.end_phase("weights")
    if adapter is None:
        count = freeze_parameters(
            chunks,
            tuner=config.tuner,
            state=state,
            hf_names=hf_names(source.table),
            stored_names=stored_names(source.table),
        )
        if config.model.gradient_accumulation_fusion:
            fuse_weight_gradients(chunks)
        return chunks, f"{count:,} weights"
    load_adapter(
        chunks,
        adapter,
        source,
        state,
        dtype=adapter_dtype(config, inputs),
        dropout=config.tuner.lora_dropout,
        seed=config.training.seed,
        resumed=None if point is None else merged_adapter(config, point),
    )
    keep_graph_connected(chunks)
    clock.end_phase("adapter")
    ranks = ", ".join(map(str, adapter.ranks))
    return chunks, f"{adapter.num_weights(source.table):,} weights of an adapter (rank {ranks})"


def _loop_plan(run: TrainingRun, *, first_step: int) -> LoopPlan:
    config, total_steps = run.config, run.total_steps
    checkpoints = every(config.checkpoint.save_steps, total_steps)
    evaluations = every(config.training.eval_steps, total_steps)
    if config.checkpoint.save_strategy == "epoch":
        checkpoints = epoch_ends(run.batches.epochs_consumed, total_steps, first_step=first_step)
        evaluations |= checkpoints
    return LoopPlan(
        total_steps=total_steps,
        first_step=first_step,
        logging_steps=config.logging.logging_steps,
        checkpoints=checkpoints,
        evaluations=evaluations,
    )


def _meter(
    chunks: Sequence[LanguageModel],
    inputs: Inputs,
    batches: Batches,
    state: ParallelState,
    *,
    total_steps: int,
) -> Meter:
    source = inputs.source
    described = source.family.megatron_config(source.hf_config, source.num_next_tokens)
    shape = ModelShape.from_config(
        chunks[0].config,
        vocab_size=described.gpt.vocab_size,
        num_delta_net_layers=len(described.layers.delta_net_layers),
        is_frozen=inputs.adapter is not None,
    )
    size = RunSize(
        total_steps=total_steps,
        samples_per_epoch=batches.num_samples,
        shape=shape,
        num_routers=count_routers(chunks),
    )
    return Meter(state=state, device=device_info(), size=size)


def _evaluation(
    config: SftConfig,
    data: PreparedData,
    chunks: Sequence[DistributedDataParallel],
    state: ParallelState,
) -> Callable[[], EvaluationResult] | None:
    """What evaluates the model as it is; None where that was not asked for."""
    if data.validation is None or config.training.eval_iters == 0:
        return None
    dataset = TokenizedDataset(data.validation)
    batches = Batches(config, dataset, data.report, state, is_training=False)
    num_steps = batches.plan.total_steps
    if config.training.eval_iters > 0:
        num_steps = min(num_steps, config.training.eval_iters)
    return lambda: evaluate(chunks, batches.steps(num_steps), state=state)


def _open_log(
    run: TrainingRun, folder: Path, *, first_step: int
) -> contextlib.AbstractContextManager[RunLog | None]:
    """The log of the run, and args.json beside it; None on all ranks but the first."""
    if not run.state.is_first_rank:
        return contextlib.nullcontext()
    arguments = config_to_dict(run.config)
    write_atomically(folder / "args.json", json.dumps(arguments, indent=2, ensure_ascii=False))
    return open_run_log(
        run.config.logging,
        folder=folder,
        total_steps=run.total_steps,
        first_step=first_step,
        arguments=arguments,
    )


def _say(world: World, *lines: str) -> None:
    for line in lines if world.is_first_rank else ():
        print(line, file=sys.stderr)
