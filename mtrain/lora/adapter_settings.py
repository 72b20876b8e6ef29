"""The adapter_config.json of somebody else: what is taken from it, and what is refused.

Shapes in the file of weights say which projections are adapted and with which rank. What only the
config knows is the scale; ranks in it are there to be compared. Nothing in it is opened or run.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain.bridge.safetensors_header import parse_json
from mtrain.lora.name_patterns import first_matches

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
MAX_RANK = 65_536

# Fields that change what the weights mean, and why they are refused when they are set.
_REFUSED = {
    "use_dora": "DoRA scales the columns of the merged weight",
    "lora_bias": "biases of the adapter",
    "layer_replication": "layers that occur more than once",
    "trainable_token_indices": "single rows of the embedding are trained",
    "megatron_config": "an adapter of another Megatron model",
    "alora_invocation_tokens": "an adapter that only some tokens see",
    "use_qalora": "adapters of quantised weights",
    "arrow_config": "adapters that are routed",
    "use_bdlora": "block-diagonal factors",
    "monteclora_config": "random factors",
    "kasa_config": "the base weights are changed",
    "velora_config": "its own backward pass",
    "ensure_weight_tying": "an adapter that embedding and output layer share",
}
# These start from changed base weights, so that the adapter alone means nothing.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What an adapter_config.json says.

    Attributes:
        path: The file.
        rank: Rank of what no pattern names.
        alpha: Alpha of what no pattern names.
        use_rslora: Whether the scale is alpha / sqrt(rank).
        dropout: Dropout that it was trained with.
        rank_pattern: Ranks by PEFT's keys, in the order of the file.
        alpha_pattern: Alphas by PEFT's keys, in the order of the file.
        target_parameters: Parameters that are adapted themselves, not through their module.
        modules_to_save: Modules that are stored whole.
        base: Name or path of the model it was trained on, for people to read.
        config: The whole content.
    """

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    base: str | None
    config: Mapping[str, Any]

    def lookup_name(self, module: str) -> str:
        """The name under which PEFT looks a module up in its patterns."""
        parameter = f"{module}.weight"
        is_parameter = any(f".{parameter}".endswith(f".{key}") for key in self.target_parameters)
        return parameter if is_parameter else module

    def ranks_and_alphas(self, names: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha that PEFT gives to modules or parameters, by `lookup_name`.

        Raises:
            ValueError: A key of a pattern cannot be matched.
        """
        try:
            rank_keys = first_matches(tuple(self.rank_pattern), names)
            alpha_keys = first_matches(tuple(self.alpha_pattern), names)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return {
            name: (
                self.rank_pattern[rank_keys[name]] if name in rank_keys else self.rank,
                self.alpha_pattern[alpha_keys[name]] if name in alpha_keys else self.alpha,
            )
            for name in names
        }


def read_settings(folder: Path) -> AdapterSettings:
    """Reads the adapter_config.json of a folder.

    Raises:
        ValueError: It is missing, not sound, or asks for something that is not built.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{folder}: has no {CONFIG_FILE}, so it is no PEFT adapter")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file")
    if status.st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is no {CONFIG_FILE}")
    config = parse_json(path.read_bytes(), source=path)
    try:
        _refuse(config)
        return AdapterSettings(
            path=path,
            rank=_rank(config, "r"),
            alpha=_alpha(config, "lora_alpha"),
            use_rslora=_boolean(config, "use_rslora"),
            dropout=_dropout(config),
            rank_pattern=_pattern(config, "rank_pattern", _rank),
            alpha_pattern=_pattern(config, "alpha_pattern", _alpha),
            target_parameters=_names(config, "target_parameters"),
            modules_to_save=_names(config, "modules_to_save"),
            base=_base(config),
            config=config,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"'peft_type' is {config.get('peft_type')!r}; only LORA is built")
    if config.get("bias", "none") != "none":
        raise ValueError(f"'bias' is {config['bias']!r}: trained biases are not built")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{key!r} is set, which is not built: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"'init_lora_weights' is {start!r}, which changes the base weights, so the adapter does"
            " not fit the original ones; save it with PEFT's path_initial_model_for_weight_"
            "conversion first"
        )


def _rank(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise ValueError(f"{key!r} must be a rank from 1 to {MAX_RANK}, got {value!r}")
    return value


def _alpha(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    # Comparing works for integers that are too large for a float, and fails for infinity and NaN.
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"{key!r} must be a number, got {str(value)[:80]!r}")
    return float(value)


def _dropout(config: Mapping[str, Any]) -> float:
    value = config.get("lora_dropout")
    if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
        raise ValueError(f"'lora_dropout' must be a number from 0 to 1, got {str(value)[:80]!r}")
    return float(value or 0.0)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key!r} must be true or false, got {value!r}")
    return bool(value)


def _pattern(config: Mapping[str, Any], key: str, read: Any) -> dict[str, Any]:
    pattern = config.get(key)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{key!r} must be an object, got {type(pattern).__name__}")
    try:
        return {name: read(pattern, name) for name in pattern}
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = config.get(key)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{key!r} must be a list of names, got {str(names)[:80]!r}")
    return tuple(names)


def _base(config: Mapping[str, Any]) -> str | None:
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"'base_model_name_or_path' must be text, got {type(base).__name__}")
    return base


def scale_ratio(part: int, whole: int, *, use_rslora: bool) -> float:
    """What alpha is multiplied with so that `part` of the `whole` rank keeps the scale."""
    return math.sqrt(part / whole) if use_rslora else part / whole
