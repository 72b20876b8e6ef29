"""The whole configuration of one command, and the defaults that depend on other flags.

The one thing to know: `resolve_sft` is called once, right after parsing; everything after it may
rely on the notes of its docstring.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from mtrain.config.checkpoint import CheckpointConfig
from mtrain.config.data import DataConfig, TemplateConfig
from mtrain.config.export import ExportOptions
from mtrain.config.logging import LoggingConfig
from mtrain.config.model import ModelConfig
from mtrain.config.moe import MoEConfig
from mtrain.config.optimizer import OptimizerConfig
from mtrain.config.parallel import ParallelConfig
from mtrain.config.training import TrainingConfig
from mtrain.config.tuner import TunerConfig

__all__ = [
    "ExportConfig",
    "SftConfig",
    "config_to_dict",
    "flag_values",
    "resolve_export",
    "resolve_sft",
]

FULL_LR = 1e-5
LORA_LR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """Configuration of `megatron sft`, one attribute a section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Configuration of `megatron export`, one attribute a section."""

    export: ExportOptions = field(default_factory=ExportOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def flag_values(config: SftConfig | ExportConfig) -> dict[str, Any]:
    """The values of all flags by name."""
    sections = (getattr(config, part.name) for part in dataclasses.fields(config))
    return {
        field.name: getattr(section, field.name)
        for section in sections
        for field in dataclasses.fields(section)
    }


def config_to_dict(config: SftConfig | ExportConfig) -> dict[str, Any]:
    """All settings as one flat mapping of flag name to value, ready for `json.dump`.

    Tuples become lists. A file with this content works as `--config` file.
    The hub token is left out: the mapping is written to disk.
    """
    values = flag_values(config)
    del values["hub_token"]
    return {n: list(value) if isinstance(value, tuple) else value for n, value in values.items()}


def resolve_sft(config: SftConfig) -> SftConfig:
    """Fills the defaults that depend on other flags.

    Afterwards `optimizer.lr`, `training.eval_steps`, `checkpoint.output_dir`,
    `parallel.sequence_parallel` and `tuner.merge_lora` are never None; `sequence_parallel` is False
    with one tensor-parallel rank (there is nothing to split over); `train_iters` given clears
    `num_train_epochs`; `packing` implies `padding_free`, and `template.max_length` and
    `data.packing_length` stand in for each other; full recomputation has a method and a number.

    Raises:
        ValueError: `bf16`, `fp16` and `torch_dtype` contradict each other.
    """
    optimizer = config.optimizer
    lr = optimizer.lr
    if lr is None:
        lr = FULL_LR if config.tuner.tuner_type == "full" else LORA_LR
    replace = dataclasses.replace
    return replace(
        config,
        model=_resolve_dtype(config.model),
        tuner=replace(config.tuner, merge_lora=bool(config.tuner.merge_lora)),
        data=_resolve_packing(config.data, config.template),
        template=_resolve_max_length(config.template, config.data),
        optimizer=replace(optimizer, lr=lr),
        training=_resolve_training(config.training, save_steps=config.checkpoint.save_steps),
        parallel=_resolve_sequence_parallel(config.parallel),
        checkpoint=_resolve_output_dir(config.checkpoint, config.model),
    )


def resolve_export(config: ExportConfig) -> ExportConfig:
    """The same for `megatron export`.

    Afterwards `tuner.merge_lora` is not None, and `checkpoint.output_dir` only where there is
    nothing to name it after.

    Raises:
        ValueError: `bf16`, `fp16` and `torch_dtype` contradict each other.
    """
    replace = dataclasses.replace
    checkpoint, tuner, model = config.checkpoint, config.tuner, config.model
    source = next(iter(tuner.adapters), None) or tuner.mcore_adapter
    source = source or model.mcore_model or model.model
    if checkpoint.output_dir is None and source:
        path = PurePath(source)
        # A model of a hub is named after its last part; a folder gets a neighbour.
        target = path if tuner.adapters or tuner.mcore_adapter or model.mcore_model else path.name
        ending = "mcore" if config.export.to_mcore else "hf"
        checkpoint = replace(checkpoint, output_dir=f"{target}-{ending}")
    merge_lora = config.tuner.merge_lora is not False
    return replace(
        config,
        model=_resolve_dtype(config.model),
        tuner=replace(config.tuner, merge_lora=merge_lora),
        parallel=_resolve_sequence_parallel(config.parallel),
        checkpoint=checkpoint,
    )


def _resolve_dtype(model: ModelConfig) -> ModelConfig:
    wanted = model.torch_dtype
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        switch = getattr(model, name)
        if switch and wanted not in (None, dtype):
            raise ValueError(f"--{name} true contradicts {wanted}: give --torch_dtype only")
        if switch is False and model.torch_dtype == dtype:
            raise ValueError(f"--{name} false contradicts --torch_dtype {dtype}: give one of them")
        if switch:
            wanted = dtype
    return dataclasses.replace(model, torch_dtype=wanted)


def _resolve_packing(data: DataConfig, template: TemplateConfig) -> DataConfig:
    if not data.packing:
        return data
    length = data.packing_length or template.max_length
    return dataclasses.replace(data, padding_free=True, packing_length=length)


def _resolve_max_length(template: TemplateConfig, data: DataConfig) -> TemplateConfig:
    if template.max_length is not None or not data.packing:
        return template
    return dataclasses.replace(template, max_length=data.packing_length)


def _resolve_training(training: TrainingConfig, *, save_steps: int) -> TrainingConfig:
    method, num_layers = training.recompute_method, training.recompute_num_layers
    if training.recompute_granularity == "full":
        method, num_layers = method or "uniform", num_layers or 1
    return dataclasses.replace(
        training,
        eval_steps=save_steps if training.eval_steps is None else training.eval_steps,
        num_train_epochs=None if training.train_iters else training.num_train_epochs,
        recompute_method=method,
        recompute_num_layers=num_layers,
    )


def _resolve_sequence_parallel(parallel: ParallelConfig) -> ParallelConfig:
    wanted = parallel.sequence_parallel is not False
    split = wanted and parallel.tensor_model_parallel_size > 1
    return dataclasses.replace(parallel, sequence_parallel=split)


def _resolve_output_dir(checkpoint: CheckpointConfig, model: ModelConfig) -> CheckpointConfig:
    if checkpoint.output_dir is not None:
        return checkpoint
    name = PurePath(model.model or model.mcore_model or "model").name
    return dataclasses.replace(checkpoint, output_dir=f"megatron_output/{name}")
