"""`megatron sft` on one rank, from the configuration to the last checkpoint, in order.

This is the file to read first. By the time it runs, `mtrain.cli.main` has checked the flags and
`mtrain.cli.preparation` has prepared the data, before the ranks were started.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mtrain.bridge.load import load_weights
from mtrain.checkpoint.folder import create_run_folder, write_atomically
from mtrain.checkpoint.weights import WeightsFormat, save_checkpoint
from mtrain.cli.batches import Batches
from mtrain.cli.launch import Placement
from mtrain.cli.model_source import ModelSource, hf_names, parallel_layout
from mtrain.cli.preparation import open_inputs
from mtrain.cli.rank_checks import check_attention, check_collectives, check_same_inputs
from mtrain.config import SftConfig, config_to_dict
from mtrain.data.loader import BatchPlan
from mtrain.data.storage import TokenizedDataset
from mtrain.model.backends import choose_backend
from mtrain.model.build import build_model, fuse_weight_gradients, transformer_config
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState, destroy_parallel, initialize_parallel
from mtrain.platform.device import device_info
from mtrain.training.balance import count_routers
from mtrain.training.evaluate import EvaluationResult, evaluate
from mtrain.training.flops import ModelShape
from mtrain.training.freeze import freeze_parameters
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
    backend = _choose_backend(config)
    source, data = open_inputs(config, world_size=here.world_size)
    state = _join(config, here)
    check_same_inputs(config, source, data, state)
    train_data = Batches(config, TokenizedDataset(data.train), data.report, state)
    total_steps = config.training.train_iters or train_data.plan.total_steps

    bare = _load_model(config, source, state, backend=backend)
    num_trained = freeze_parameters(
        bare, tuner=config.tuner, state=state, hf_names=hf_names(source.table, backend=backend)
    )
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
        state=state,
    )
    if state.is_first_rank:
        _announce(source, state, backend=backend, num_trained=num_trained, folder=folder)
    with _open_log(config, folder, state, total_steps=total_steps) as log:
        train(
            chunks=chunks,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=train_data.steps(total_steps),
            plan=_loop_plan(config, train_data.plan, total_steps=total_steps),
            settings=config.training,
            state=state,
            meter=_meter(bare, source, train_data, state, total_steps=total_steps),
            log=log,
            evaluate=_evaluation(config, data, chunks, state),
            save=functools.partial(_save, config, source, state, folder, backend, bare),
        )
    destroy_parallel()
    return 0


def _choose_backend(config: SftConfig) -> str:
    """The backend, "te" or "torch", after checks of what it and the device can do."""
    check_collectives(config.parallel)
    backend = choose_backend(config.model.transformer_impl)
    check_attention(config.model, backend=backend)
    return backend


def _join(config: SftConfig, here: Placement) -> ParallelState:
    """Meets the other ranks."""
    return initialize_parallel(
        parallel_layout(config.parallel, world_size=here.world_size),
        rank=here.rank,
        local_rank=here.local_rank,
        seed=config.training.seed,
        timeout_seconds=config.parallel.ddp_timeout,
    )


def _load_model(
    config: SftConfig, source: ModelSource, state: ParallelState, *, backend: str
) -> list[LanguageModel]:
    """Builds the chunks of this rank and fills them from the checkpoint."""
    described = source.family.megatron_config(source.hf_config)
    model_config = transformer_config(
        described,
        state.layout,
        model=config.model,
        parallel=config.parallel,
        training=config.training,
        moe=config.moe,
        dtype=training_dtype(config.model.torch_dtype, source.hf_config),
        backend=backend,
    )
    chunks = build_model(described, model_config, state, backend=backend)
    load_weights(
        chunks,
        source.checkpoint,
        table=source.table,
        layout=state.layout,
        rank=state.rank,
        backend=backend,
    )
    if backend == "te" and config.model.gradient_accumulation_fusion:
        fuse_weight_gradients(chunks)
    return chunks


def training_dtype(wanted: str | None, hf_config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of weights and activations: what was asked for, or else the checkpoint's."""
    name = wanted or hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise ValueError(f"config.json: dtype {name!r} cannot be trained in; give --torch_dtype")
    return dtypes[name]


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
    source: ModelSource,
    batches: Batches,
    state: ParallelState,
    *,
    total_steps: int,
) -> Meter:
    size = RunSize(
        total_steps=total_steps,
        samples_per_epoch=batches.num_samples,
        shape=ModelShape.from_config(chunks[0].config, vocab_size=source.hf_config["vocab_size"]),
        num_routers=count_routers(chunks),
    )
    return Meter(state=state, device=device_info(), size=size)


def _save(
    config: SftConfig,
    source: ModelSource,
    state: ParallelState,
    folder: Path,
    backend: str,
    chunks: Sequence[LanguageModel],
    step: int,
) -> None:
    saved = save_checkpoint(
        folder,
        step,
        chunks,
        form=WeightsFormat(
            source=source.folder,
            hf_config=source.hf_config,
            backend=backend,
            dtype=chunks[0].config.params_dtype,
            max_shard_size=config.checkpoint.max_shard_bytes,
        ),
        arguments=config_to_dict(config),
        state=state,
        save_total_limit=config.checkpoint.save_total_limit,
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
    source: ModelSource, state: ParallelState, *, backend: str, num_trained: int, folder: Path
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
        f"{source.family.name}: {num_trained:,} weights are trained on {device_info().name} "
        f"({split}, {backend} backend); checkpoints go to {folder}",
        file=sys.stderr,
    )
