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

import torch
from tqdm import tqdm

from mtrain.bridge.plan import Backend
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.checkpoint.adapter import AdapterFormat, save_adapter
from mtrain.checkpoint.folder import create_run_folder, write_atomically
from mtrain.checkpoint.weights import WeightsFormat, save_checkpoint
from mtrain.cli.batches import Batches
from mtrain.cli.joining import join, training_dtype
from mtrain.cli.launch import Placement
from mtrain.cli.loading import find_backend, load_adapter, load_model, start_parallel
from mtrain.cli.model_source import ModelSource, base_name, hf_names
from mtrain.cli.preparation import Inputs, open_inputs
from mtrain.cli.rank_checks import check_same_inputs
from mtrain.config import SftConfig, config_to_dict
from mtrain.data.loader import BatchPlan
from mtrain.data.storage import TokenizedDataset
from mtrain.lora.merge import merged_lookup
from mtrain.lora.weights import adapter_lookup
from mtrain.model.build import fuse_weight_gradients
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState, destroy_parallel, destroy_world
from mtrain.platform.device import device_info
from mtrain.training.balance import count_routers
from mtrain.training.evaluate import EvaluationResult, evaluate
from mtrain.training.flops import ModelShape
from mtrain.training.freeze import freeze_parameters, keep_graph_connected
from mtrain.training.loop import LoopPlan, epoch_ends, every, train
from mtrain.training.metrics import Meter, RunSize
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.wrap import wrap_chunks
from mtrain.training.writers import RunLog, open_run_log

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

    from mtrain.data.tokenize import PreparedData


def run(config: SftConfig, here: Placement) -> int:
    """Trains on this rank; every rank runs it.

    Args:
        config: Resolved and checked.
        here: This rank.

    Returns:
        Exit code.

    Raises:
        ValueError: A setting does not fit the model or the data.
        NonFiniteError: The loss or a gradient is not finite.
        SaveError: A checkpoint could not be written.
    """
    started = datetime.now()
    backend = find_backend(config)
    inputs = open_inputs(config, world_size=here.world_size)
    source, adapter, data = inputs.source, inputs.adapter, inputs.data
    world = join(config, here)
    check_same_inputs(config, source, world, adapter=adapter, data=data)
    state = start_parallel(config, world, seed=config.training.seed)
    train_data = Batches(config, TokenizedDataset(data.train), data.report, state)
    total_steps = config.training.train_iters or train_data.plan.total_steps

    bare, trained = _load(config, inputs, state, backend=backend)
    chunks = wrap_chunks(
        bare,
        parallel=config.parallel,
        grad_reduce_in_fp32=config.training.accumulate_allreduce_grads_in_fp32,
    )
    optimizer = build_optimizer(chunks, config.optimizer)
    scheduler = build_scheduler(optimizer, config.optimizer, total_steps=total_steps)

    folder = create_run_folder(
        Path(config.checkpoint.output_dir).expanduser(),
        add_version=config.checkpoint.add_version,
        started=started,
        world=world,
    )
    if world.is_first_rank:
        _announce(source, state, backend=backend, trained=trained, folder=folder)
    with _open_log(config, folder, state, total_steps=total_steps) as log:
        train(
            chunks=chunks,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=train_data.steps(total_steps),
            plan=_loop_plan(config, train_data.plan, total_steps=total_steps),
            settings=config.training,
            state=state,
            meter=_meter(bare, inputs, train_data, state, total_steps=total_steps),
            log=log,
            evaluate=_evaluation(config, data, chunks, state),
            save=functools.partial(_save, config, inputs, state, folder, backend, bare),
        )
    destroy_parallel()
    destroy_world()
    return 0


def _load(
    config: SftConfig, inputs: Inputs, state: ParallelState, *, backend: Backend
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
    )
    if adapter is None:
        names = hf_names(source.table, backend=backend)
        count = freeze_parameters(chunks, tuner=config.tuner, state=state, hf_names=names)
        if backend == "te" and config.model.gradient_accumulation_fusion:
            fuse_weight_gradients(chunks)
        return chunks, f"{count:,} weights"
    load_adapter(
        chunks,
        adapter,
        source,
        state,
        backend=backend,
        dtype=_adapter_dtype(config, source),
        dropout=config.tuner.lora_dropout,
        seed=config.training.seed,
    )
    keep_graph_connected(chunks)
    ranks = ", ".join(map(str, adapter.ranks))
    return chunks, f"{adapter.num_weights(source.table):,} weights of an adapter (rank {ranks})"


def _adapter_dtype(config: SftConfig, source: ModelSource) -> torch.dtype:
    return training_dtype(config.model, source.hf_config, wanted=config.tuner.lora_dtype)


def _loop_plan(config: SftConfig, batches: BatchPlan, *, total_steps: int) -> LoopPlan:
    checkpoints = every(config.checkpoint.save_steps, total_steps)
    evaluations = every(config.training.eval_steps, total_steps)
    if config.checkpoint.save_strategy == "epoch":
        checkpoints = epoch_ends(batches.epochs_consumed, total_steps)
        evaluations |= checkpoints
    return LoopPlan(
        total_steps=total_steps,
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
    shape = ModelShape.from_config(
        chunks[0].config,
        vocab_size=inputs.source.hf_config["vocab_size"],
        is_frozen=inputs.adapter is not None,
    )
    size = RunSize(
        total_steps=total_steps,
        samples_per_epoch=batches.num_samples,
        shape=shape,
        num_routers=count_routers(chunks),
    )
    return Meter(state=state, device=device_info(), size=size)


def _save(
    config: SftConfig,
    inputs: Inputs,
    state: ParallelState,
    folder: Path,
    backend: Backend,
    chunks: Sequence[LanguageModel],
    step: int,
) -> None:
    """The model, the model with its adapter merged, or the adapter alone."""
    source, adapter = inputs.source, inputs.adapter
    arguments = config_to_dict(config)
    limit = config.checkpoint.save_total_limit
    if adapter is None or config.tuner.merge_lora:
        saved = save_checkpoint(
            folder,
            step,
            lookup_in(tensors_by_name(chunks)) if adapter is None else merged_lookup(chunks),
            form=WeightsFormat(
                source=source.folder,
                hf_config=source.hf_config,
                backend=backend,
                dtype=chunks[0].config.params_dtype,
                max_shard_size=config.checkpoint.max_shard_bytes,
            ),
            arguments=arguments,
            state=state,
            save_total_limit=limit,
        )
    else:
        saved = save_adapter(
            folder,
            step,
            adapter_lookup(chunks, dtype=_adapter_dtype(config, source)),
            form=AdapterFormat(
                source=source.folder,
                table=source.table,
                lora=adapter.lora,
                dtype=_adapter_dtype(config, source),
                base=base_name(config.model),
                fingerprint=adapter.fingerprint,
                layout=config.tuner.lora_export_layout,
                dropout=config.tuner.lora_dropout,
            ),
            arguments=arguments,
            state=state,
            backend=backend,
            save_total_limit=limit,
            protected=None if adapter.stored is None else adapter.stored.folder,
        )
    if state.is_first_rank:
        tqdm.write(f"saved {saved}", file=sys.stderr)


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
    config: SftConfig, folder: Path, state: ParallelState, *, total_steps: int
) -> contextlib.AbstractContextManager[RunLog | None]:
    """The log of the run, and args.json beside it; None on all ranks but the first."""
    if not state.is_first_rank:
        return contextlib.nullcontext()
    arguments = config_to_dict(config)
    write_atomically(folder / "args.json", json.dumps(arguments, indent=2, ensure_ascii=False))
    return open_run_log(config.logging, folder=folder, total_steps=total_steps, arguments=arguments)


def _announce(
    source: ModelSource, state: ParallelState, *, backend: Backend, trained: str, folder: Path
) -> None:
    layout = state.layout
    sizes = {
        "TP": layout.tp_size,
        "PP": layout.pp_size,
        "VPP": layout.num_chunks,
        "EP": layout.ep_size,
        "ETP": layout.etp_size,
        "DP": layout.dp_size,
    }
    split = " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    print(
        f"{source.family.name}: {trained} are trained on {device_info().name} "
        f"({split}, {backend} backend); checkpoints go to {folder}",
        file=sys.stderr,
    )
