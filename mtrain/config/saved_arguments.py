"""What the folder of a checkpoint says about itself: the base that the user did not repeat.

The one thing to know: only the name of the base is taken from an `args.json`, and only where the
command line names none. Folders of Megatron-SWIFT have one too.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mtrain.config.model import ModelConfig
from mtrain.config.run import ExportConfig, SftConfig

__all__ = ["fill_base", "read_arguments"]

ARGUMENTS_FILE = "args.json"


def fill_base(config: SftConfig | ExportConfig) -> SftConfig | ExportConfig:
    """The configuration with its base: `--model`, or `--mcore_model`, or both.

    A torch_dist folder that has a config.json needs no `--model`. An adapter that was given without
    a base goes with the base that its args.json names.

    Args:
        config: Resolved configuration.

    Raises:
        ValueError: An args.json is no JSON object.
    """
    model, tuner = config.model, config.tuner
    if model.model is None and model.mcore_model is None:
        folder = tuner.mcore_adapter or next(iter(tuner.adapters), None)
        if folder is not None:
            model = _named_in(folder, model)
    if model.model is None and model.mcore_model is not None:
        root = Path(model.mcore_model).expanduser()
        if root.is_dir() and not (root / "config.json").is_file():
            model = dataclasses.replace(
                _named_in(model.mcore_model, model), mcore_model=model.mcore_model
            )
    return dataclasses.replace(config, model=model)


def _named_in(folder: str, model: ModelConfig) -> ModelConfig:
    """The model with the names that the args.json of a folder gives."""
    saved = read_arguments(Path(folder).expanduser())
    names = {
        flag: saved[flag] for flag in ("model", "mcore_model") if isinstance(saved.get(flag), str)
    }
    if names and isinstance(saved.get("use_hf"), bool):
        names["use_hf"] = saved["use_hf"] or model.use_hf
    return dataclasses.replace(model, **names)


def read_arguments(folder: Path) -> dict[str, Any]:
    """The flags in the args.json of a checkpoint; empty without one.

    Raises:
        ValueError: It is no JSON object.
    """
    path = folder / ARGUMENTS_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return content
