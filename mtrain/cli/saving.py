"""What a run saves: the weights in the form that was asked for, and the state to go on from.

The one thing to know: the weights are those of a Hugging Face checkpoint or a PEFT adapter and are
written once. The state has what they lack: moments, and float32 main parameters where the weights
are saved in half precision or merged.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_writer import OpenFile, SafetensorsWriter
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.checkpoint.adapter import AdapterFormat, adapter_contents
from mtrain.checkpoint.folder import Contents, SaveError
from mtrain.checkpoint.optimizer_state import OptimizerFormat, OptimizerTensors
from mtrain.checkpoint.run_folder import Retention
from mtrain.checkpoint.saver import Saver, SaveReport
from mtrain.checkpoint.trainer_state import TrainerState, state_contents
from mtrain.checkpoint.weights import WeightsFormat, weights_contents
from mtrain.cli.joining import training_dtype
from mtrain.cli.model_source import base_name
from mtrain.cli.preparation import Inputs
from mtrain.config import SftConfig, config_to_dict
from mtrain.data.loader import BatchPlan
from mtrain.lora.merge import merged_lookup
from mtrain.lora.plan import adapter_table
from mtrain.lora.weights import adapter_lookup
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState
from mtrain.training.metrics import Meter
from mtrain.training.optimizer_state import (
    MAIN,
    moment_names,
    optimizer_progress,
    parameter_states,
    trained_parameters,
)
from mtrain.training.random_state import random_states

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

__all__ = [
    "TrainingRun",
    "adapter_dtype",
    "check_room",
    "checkpoint_contents",
    "data_order",
    "make_saver",
    "saved_line",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """Everything that training changes, and what it was made from.

    Attributes:
        config: The configuration.
        inputs: Model, adapter and data.
        state: This rank.
        backend: Backend of the layers.
        bare: The model chunks of this rank.
        chunks: The same, wrapped.
        optimizer: Their optimizer.
        scheduler: What drives its learning rate.
        meter: What log lines are made from.
        batches: Which samples each step takes.
        total_steps: Length of the run.
    """

    config: SftConfig
    inputs: Inputs
    state: ParallelState
    backend: str
    bare: Sequence[LanguageModel]
    chunks: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    meter: Meter
    batches: BatchPlan
    total_steps: int

    @property
    def trained_table(self) -> WeightTable:
        """The weights that are trained: those of the adapter, or of the model."""
        table, adapter = self.inputs.source.table, self.inputs.adapter
        return table if adapter is None else adapter_table(table, adapter.lora)

    def optimizer_tensors(self) -> OptimizerTensors:
        """What the optimizer remembers, without what the saved weights say already."""
        trained = trained_parameters(self.chunks)
        saved = self._saved_dtype()
        # In float32 the weights are the main parameters, unless they are saved otherwise.
        with_main = frozenset(
            place
            for parameter, place in trained.items()
            if not parameter.dtype == saved == torch.float32
        )
        return OptimizerTensors(
            parameters=parameter_states(self.chunks, self.optimizer),
            trained=frozenset(trained.values()),
            kinds=(MAIN, *moment_names(self.optimizer)),
            only={MAIN: with_main},
            is_sharded=self.config.parallel.use_distributed_optimizer,
        )

    def _saved_dtype(self) -> torch.dtype | None:
        """Dtype in which the trained parameters are saved; None where they are merged."""
        if self.inputs.adapter is None:
            return self.bare[0].config.params_dtype
        return None if self.config.tuner.merge_lora else adapter_dtype(self.config, self.inputs)

    def belongs_to(self) -> dict[str, str]:
        """What the state of the optimizer goes with, and with nothing else."""
        facts: dict[str, Any] = {"torch_dtype": self.bare[0].config.params_dtype}
        if self.inputs.adapter is not None:
            facts["lora_dtype"] = adapter_dtype(self.config, self.inputs)
            facts["the base model (its hash)"] = self.inputs.adapter.fingerprint
        facts["optimizer"] = self.config.optimizer.optimizer
        return {name: str(fact).removeprefix("torch.") for name, fact in facts.items()}

    def optimizer_format(self) -> OptimizerFormat:
        """How the optimizer's state is written."""
        return OptimizerFormat(
            table=self.trained_table,
            max_shard_size=self.config.checkpoint.max_shard_bytes,
        )


def data_order(config: SftConfig, inputs: Inputs) -> dict[str, Any]:
    """Which data in which order; where this differs, a position in it means nothing."""
    data, training = config.data, config.training
    return {
        # Named by the contents of the data and by what tokenised them.
        "prepared": inputs.data.train.parent.name,
        "seed": training.seed,
        "train_dataloader_shuffle": data.train_dataloader_shuffle,
        "packing_length": data.packing_length if data.packing else None,
        "packing_strategy": data.packing_strategy,
    }


def adapter_dtype(config: SftConfig, inputs: Inputs) -> torch.dtype:
    """Dtype that an adapter is trained and saved in."""
    return training_dtype(config.model, inputs.source.hf_config, wanted=config.tuner.lora_dtype)


def checkpoint_contents(run: TrainingRun, step: int, *, open_file: OpenFile) -> Contents:
    """What the checkpoint after a step consists of; all ranks call it.

    Args:
        run: The run.
        step: Steps done.
        open_file: What takes the tensors of a file.
    """
    config, adapter = run.config, run.inputs.adapter
    if adapter is None or config.tuner.merge_lora:
        weights = _model_contents(run, open_file)
    else:
        weights = _adapter_contents(run, open_file)
    if config.checkpoint.no_save_optim:
        return weights
    has_random_states = not config.checkpoint.no_save_rng
    return weights + state_contents(
        _trainer_state(run, step, has_random_states=has_random_states),
        run.optimizer_tensors(),
        random_states() if has_random_states else None,
        form=run.optimizer_format(),
        state=run.state,
        open_file=open_file,
    )


def _trainer_state(run: TrainingRun, step: int, *, has_random_states: bool) -> TrainerState:
    progress = optimizer_progress(run.optimizer)
    return TrainerState(
        step=step,
        total_steps=run.total_steps,
        layout=dataclasses.asdict(run.state.layout),
        belongs_to=run.belongs_to(),
        num_updates=progress.num_updates,
        loss_scale=progress.loss_scale,
        schedule_steps=run.scheduler.num_steps,
        data=data_order(run.config, run.inputs),
        data_unit=run.batches.consumed_units(step),
        metrics=run.meter.progress(),
        has_random_states=has_random_states,
    )


def check_room(run: TrainingRun, folder: Path) -> None:
    """Makes sure that a checkpoint fits on the disk; all ranks call it.

    Raises:
        ValueError: It does not. All ranks raise.
    """
    num_bytes = checkpoint_contents(run, 0, open_file=SafetensorsWriter).num_bytes
    free = torch.tensor(float(shutil.disk_usage(folder).free), device=run.state.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN, group=run.state.world.group)
    if num_bytes > free:
        raise ValueError(
            f"{folder}: a checkpoint needs about {num_bytes} bytes, and {int(free)} are free; "
            "choose another --output_dir, or leave out the optimizer (--no_save_optim true)"
        )


def make_saver(run: TrainingRun, folder: Path) -> Saver:
    """What saves the checkpoints of a run.

    Args:
        run: The run.
        folder: Its folder.
    """
    settings, adapter = run.config.checkpoint, run.inputs.adapter
    stops = settings.save_on_error == "stop"
    stored = None if adapter is None else adapter.stored
    loaded_from = run.inputs.source.folder if stored is None else stored.folder
    # With a merged adapter that is the base, and the checkpoint is another folder.
    started_from = Path(settings.resume_from_checkpoint or loaded_from)

    def report(saved: SaveReport) -> None:
        if run.state.is_first_rank:
            tqdm.write(saved_line(saved), file=sys.stderr)

    def fail(error: SaveError) -> None:
        if stops:
            raise error
        if run.state.is_first_rank:
            tqdm.write(f"warning: {error}; training goes on (--save_on_error warn)", sys.stderr)

    return Saver(
        folder,
        world=run.state.world,
        retention=Retention(limit=settings.save_total_limit, protected=started_from),
        is_async=settings.async_save,
        report=report,
        fail=fail,
    )


def saved_line(saved: SaveReport) -> str:
    """What is said about a checkpoint that was published."""
    gigabytes = saved.num_bytes / 1e9
    speed = gigabytes / max(saved.total_seconds, 1e-9)
    return (
        f"saved {saved.folder}: {gigabytes:.2f} GB in {saved.total_seconds:.1f} s ({speed:.2f} "
        f"GB/s), training stood still for {saved.blocked_seconds:.1f} s"
    )


def _model_contents(run: TrainingRun, open_file: OpenFile) -> Contents:
    """The model, or the model with its adapter merged."""
    source, chunks = run.inputs.source, run.bare
    is_merged = run.inputs.adapter is not None
    return weights_contents(
        merged_lookup(chunks) if is_merged else lookup_in(tensors_by_name(chunks)),
        form=WeightsFormat(
            source=source.folder,
            hf_config=source.hf_config,
            table=source.table,
            dtype=chunks[0].config.params_dtype,
            max_shard_size=run.config.checkpoint.max_shard_bytes,
            stored=source.stored_as(keeps_fp8=run.config.checkpoint.fp8_export),
        ),
        arguments=config_to_dict(run.config),
        state=run.state,
        open_file=open_file,
    )


def _adapter_contents(run: TrainingRun, open_file: OpenFile) -> Contents:
    config, source, adapter = run.config, run.inputs.source, run.inputs.adapter
    assert adapter is not None, "there is none to save"
    dtype = adapter_dtype(config, run.inputs)
    return adapter_contents(
        adapter_lookup(run.bare, dtype=dtype),
        form=AdapterFormat(
            source=source.folder,
            table=source.table,
            lora=adapter.lora,
            dtype=dtype,
            base=base_name(config.model),
            fingerprint=adapter.fingerprint,
            layout=config.tuner.lora_export_layout,
            dropout=config.tuner.lora_dropout,
        ),
        arguments=config_to_dict(config),
        state=run.state,
        open_file=open_file,
        protected=None if adapter.stored is None else adapter.stored.folder,
    )
