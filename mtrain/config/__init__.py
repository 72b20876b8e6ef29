"""Every user-facing setting: name, type, default, help and checks. Standard library only."""

from mtrain.config.checkpoint import CheckpointConfig
from mtrain.config.data import DataConfig, TemplateConfig
from mtrain.config.export import ExportOptions
from mtrain.config.logging import LoggingConfig
from mtrain.config.model import ModelConfig
from mtrain.config.moe import MoEConfig
from mtrain.config.optimizer import OptimizerConfig
from mtrain.config.parallel import ParallelConfig
from mtrain.config.run import (
    ExportConfig,
    SftConfig,
    config_to_dict,
    resolve_export,
    resolve_sft,
)
from mtrain.config.training import TrainingConfig
from mtrain.config.tuner import TunerConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ExportConfig",
    "ExportOptions",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SftConfig",
    "TemplateConfig",
    "TrainingConfig",
    "TunerConfig",
    "config_to_dict",
    "resolve_export",
    "resolve_sft",
]
