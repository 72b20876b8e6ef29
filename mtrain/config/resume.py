"""A run that goes on: which checkpoint it continues, and what that decides of the other flags.

The one thing to know: `--resume_from_checkpoint PATH` and, as in Megatron-SWIFT, `--finetune false`
with the checkpoint as `--model` or `--adapters` mean the same. The configuration afterwards has the
path in `checkpoint.resume_from_checkpoint`, and names it as the model or adapter to load as well.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrain.config.fields import spell
from mtrain.config.model import ModelConfig
from mtrain.config.run import SftConfig, config_to_dict, resolve_sft
from mtrain.config.saved_arguments import read_arguments

__all__ = [
    "AUTO",
    "STATE_FOLDER",
    "TRAINER_FILE",
    "changed_flags",
    "checkpoint_step",
    "find_checkpoints",
    "find_runs",
    "list_checkpoints",
    "resolve_resumed",
    "run_version",
]

AUTO = "auto"
STATE_FOLDER = "state"
TRAINER_FILE = "trainer.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RUN = re.compile(r"v(\d+)-\d{8}-\d{6}")

# Flags that say where things are or what is shown, and those that a resumed run sets itself.
_NOT_COMPARED = frozenset(
    {
        *("model", "mcore_model", "adapters", "mcore_adapter", "output_dir", "add_version"),
        *("dataset", "val_dataset", "tensorboard_dir", "load_from_cache_file"),
        *("finetune", "resume_from_checkpoint", "no_load_optim", "no_load_rng"),
    }
)


def checkpoint_step(folder: Path) -> int | None:
    """The step of a folder called `checkpoint-<step>`; None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def run_version(folder: Path) -> int | None:
    """The number of a folder called `v<N>-<date>-<time>`; None for any other name."""
    match = _RUN.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    steps = {checkpoint_step(path): path for path in run.iterdir() if path.is_dir()}
    return [path for _, path in sorted((s, path) for s, path in steps.items() if s is not None)]


def find_runs(output_dir: Path) -> list[Path]:
    """The folders of all runs in a folder, the latest first, and itself at the end.

    Args:
        output_dir: Folder of runs, or the folder of one run.
    """
    if not output_dir.is_dir():
        return []
    # Runs that started at the same moment may have the same number.
    runs = [
        (version, path.name, path)
        for path in output_dir.iterdir()
        if (version := run_version(path)) is not None and path.is_dir()
    ]
    return [*(path for *_, path in sorted(runs, reverse=True)), output_dir]


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of all runs in a folder, the latest run first, its newest step first.

    Args:
        output_dir: Folder of runs, or the folder of one run.
    """
    return [path for run in find_runs(output_dir) for path in reversed(list_checkpoints(run))]


def resolve_resumed(config: SftConfig) -> SftConfig:
    """`resolve_sft`, and the model and adapter of the checkpoint that the run continues.

    Args:
        config: As parsed.

    Raises:
        ValueError: The checkpoint cannot be continued by such a run.
    """
    checkpoint = _checkpoint(config)
    if checkpoint is None:
        return resolve_sft(config)
    saved = _read_saved(checkpoint)
    # Before the rest is resolved, so that the output folder is named after the base.
    config = resolve_sft(
        dataclasses.replace(config, model=_base_model(config.model, saved, checkpoint=checkpoint))
    )
    if saved.get("tuner_type") != config.tuner.tuner_type:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: was saved with --tuner_type "
            f"{saved.get('tuner_type')}, not {config.tuner.tuner_type}; use the same"
        )
    model, tuner = config.model, config.tuner
    if tuner.tuner_type == "full":
        model = dataclasses.replace(model, model=str(checkpoint), mcore_model=None)
    elif (checkpoint / "adapter_config.json").is_file():
        tuner = dataclasses.replace(tuner, adapters=(str(checkpoint),), mcore_adapter=None)
    resumed = dataclasses.replace(
        config.checkpoint, finetune=False, resume_from_checkpoint=str(checkpoint)
    )
    return dataclasses.replace(config, model=model, tuner=tuner, checkpoint=resumed)


def _base_model(model: ModelConfig, saved: Mapping[str, Any], *, checkpoint: Path) -> ModelConfig:
    """The model that the run began with, unless another one is given."""
    is_given = model.model is not None and Path(model.model).expanduser() != checkpoint
    if is_given or not isinstance(saved.get("model"), str):
        return model
    use_hf = model.use_hf or saved.get("use_hf") is True
    return dataclasses.replace(model, model=saved["model"], use_hf=use_hf)


def _checkpoint(config: SftConfig) -> Path | None:
    """The checkpoint that the flags name; None for a run from the start."""
    wanted = config.checkpoint.resume_from_checkpoint
    assert wanted != AUTO, "it is replaced by what was found"
    if wanted is None:
        if config.checkpoint.finetune:
            return None
        wanted = next(iter(config.tuner.adapters), None) or config.model.model
        if wanted is None:
            raise ValueError(
                "--finetune false continues a run: name its checkpoint with "
                "--resume_from_checkpoint (or auto), --model or --adapters"
            )
    path = Path(wanted).expanduser()
    if not (path / STATE_FOLDER / TRAINER_FILE).is_file():
        what = "has no state to continue from" if path.is_dir() else "no such folder"
        raise ValueError(
            f"--resume_from_checkpoint {path}: {what}; give a checkpoint that was saved with "
            "--no_save_optim false, or start a new run from its weights (--finetune true)"
        )
    return path


def _read_saved(checkpoint: Path) -> dict[str, Any]:
    saved = read_arguments(checkpoint)
    if not saved:
        raise ValueError(f"{checkpoint}: has no args.json")
    return saved


def changed_flags(saved: Mapping[str, Any], config: SftConfig) -> list[str]:
    """Flags that differ from those of the checkpoint, each with both values.

    Args:
        saved: The args.json of the checkpoint.
        config: The configuration of the resumed run; its values are the ones that are used.
    """
    return [
        f"--{name} {spell(value)} (it was {spell(saved[name])})"
        for name, value in config_to_dict(config).items()
        if name in saved and name not in _NOT_COMPARED and saved[name] != value
    ]
