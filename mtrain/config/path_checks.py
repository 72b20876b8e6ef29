"""Settings against the disk: is what is read there, can the output be written?

The one thing to know: nothing is created. A name that is not a path and looks like `owner/name` is
an id on a hub; whether it can be fetched is found out by whoever fetches it.
"""

import importlib.util
import os
import re
from pathlib import Path

from mtrain.config.data import DataConfig
from mtrain.config.dataset_name import DatasetName
from mtrain.config.logging import LoggingConfig
from mtrain.config.model import ModelConfig
from mtrain.config.run import ExportConfig, SftConfig
from mtrain.config.tuner import TunerConfig

__all__ = [
    "check_adapters",
    "check_datasets",
    "check_export_dir",
    "check_mcore_model",
    "check_run_dir",
    "check_trackers",
    "local_config_folder",
    "local_model_folder",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_model_folder(model: str) -> Path | None:
    """The folder that `--model` names, or None when it is an id on a hub.

    Raises:
        ValueError: It is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"--model {model}: is a file; give the folder of the checkpoint")
    if _HUB_ID.fullmatch(model):
        return None
    raise ValueError(f"--model {model}: no such folder, and not an id such as Qwen/Qwen3-0.6B")


def local_config_folder(model: ModelConfig) -> Path | None:
    """The folder with config.json and tokenizer, or None when they come from a hub.

    A torch_dist folder that has them is enough; `--model` beside it wins.

    Raises:
        ValueError: `--model` names neither a folder nor an id.
    """
    if model.model is not None:
        return local_model_folder(model.model)
    assert model.mcore_model is not None, "the checks refuse it"
    return Path(model.mcore_model).expanduser()


def check_datasets(data: DataConfig) -> None:
    """Checks that every dataset is a path that exists or an id on a hub.

    Raises:
        ValueError: Naming the flag and the missing path.
    """
    for name in ("dataset", "val_dataset"):
        for value in getattr(data, name):
            DatasetName.parse(value, use_hf=False, flag=name)


def check_adapters(tuner: TunerConfig) -> None:
    """Checks that every adapter is a folder; what is in it is looked at later.

    Raises:
        ValueError: Naming the flag and the missing path.
    """
    for text in tuner.adapters:
        _check_folder("adapters", text)
    if tuner.mcore_adapter is not None:
        _check_folder("mcore_adapter", tuner.mcore_adapter)


def check_mcore_model(model: ModelConfig) -> None:
    """The same for a model in Megatron-Core's format.

    Raises:
        ValueError: Naming the flag and the missing path.
    """
    if model.mcore_model is not None:
        _check_folder("mcore_model", model.mcore_model)


def _check_folder(flag: str, text: str) -> None:
    path = Path(text).expanduser()
    if not path.is_dir():
        what = "is a file; give its folder" if path.exists() else "no such folder"
        raise ValueError(f"--{flag} {text}: {what}")


def check_run_dir(config: SftConfig) -> None:
    """Checks that the folder of runs can be made and written, and does not hold another run.

    Args:
        config: Resolved configuration.

    Raises:
        ValueError: Naming the folder that is in the way.
    """
    output_dir = _check_output_dir(config)
    is_new = config.checkpoint.resume_from_checkpoint is None
    if is_new and not config.checkpoint.add_version and any(output_dir.glob("checkpoint-*")):
        raise ValueError(
            f"--output_dir {output_dir} holds checkpoints of another run: "
            "give another folder, or --add_version true"
        )


def check_export_dir(config: ExportConfig) -> None:
    """Checks that the output folder can be made and written, and is not in use.

    Args:
        config: Resolved configuration.

    Raises:
        ValueError: Naming the folder that is in the way.
    """
    output_dir = _check_output_dir(config)
    if not config.export.exist_ok and output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"--output_dir {output_dir} is not empty: give another folder, or --exist_ok true"
        )


def _check_output_dir(config: SftConfig | ExportConfig) -> Path:
    """The output folder, which can be written and is none of those that are read."""
    assert config.checkpoint.output_dir is not None, "resolving fills it"
    output_dir = Path(config.checkpoint.output_dir).expanduser()
    nearest = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--output_dir {output_dir}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {output_dir}: {nearest} cannot be written to")
    sources = [
        ("model", config.model.model),
        ("mcore_model", config.model.mcore_model),
        ("mcore_adapter", config.tuner.mcore_adapter),
        *(("adapters", adapter) for adapter in config.tuner.adapters),
    ]
    for flag, source in sources:
        if source is not None and output_dir.resolve() == Path(source).expanduser().resolve():
            raise ValueError(
                f"--output_dir {output_dir} is the folder of --{flag}; give another folder"
            )
    return output_dir


def check_trackers(logging: LoggingConfig) -> None:
    """Checks that the packages of the trackers are installed; they bear the trackers' names.

    Raises:
        ValueError: Naming the missing package.
    """
    for name in logging.report_to:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report_to {name} needs a package that is not installed: pip install {name}"
            )
