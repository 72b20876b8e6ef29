"""Reads fields of a config.json that may hold anything.

Each function takes one fact out of the dictionary, checks it and says in one line what is wrong.
Defaults are those of the Hugging Face class, and only where that class has had them all along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.family import Llama3Rope

_DEFAULT_ROTARY_BASE = 10_000.0


def positive_int(hf_config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer above zero; `default` where the key is absent or null.

    Raises:
        ValueError: It is absent without a default, or is something else.
    """
    value = _given(hf_config, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json: {key!r} must be a whole number above zero, got {value!r}")
    return value


def number(hf_config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number; `default` where the key is absent or null.

    Raises:
        ValueError: It is absent without a default, or is something else.
    """
    value = _given(hf_config, key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: {key!r} must be a number, got {value!r}")
    return float(value)


def boolean(hf_config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """True or false; `default` where the key is absent or null.

    Raises:
        ValueError: It is something else.
    """
    value = hf_config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key!r} must be true or false, got {value!r}")
    return value


def refuse(hf_config: Mapping[str, Any], key: str, reason: str) -> None:
    """Refuses a model whose config has a true value under `key`.

    Raises:
        ValueError: It has.
    """
    if hf_config.get(key):
        raise ValueError(
            f"config.json: {key!r} is {hf_config[key]!r}, which is not built: {reason}"
        )


def refuse_sliding_window(hf_config: Mapping[str, Any], *, window: object) -> None:
    """Refuses a model in which a token does not see all before it.

    A window as long as the longest sequence changes nothing and passes.

    Args:
        hf_config: The config.
        window: Tokens that each token sees; None for all.

    Raises:
        ValueError: There is a window that matters.
    """
    layer_types = hf_config.get("layer_types") or []
    others = sorted({str(kind) for kind in layer_types if kind != "full_attention"})
    if others:
        raise ValueError(f"config.json: 'layer_types' has {others}; only full_attention is built")
    longest = positive_int(hf_config, "max_position_embeddings")
    if window is None or (isinstance(window, int) and window >= longest):
        return
    raise ValueError(
        f"config.json: 'sliding_window' is {window!r}: attention over a sliding window is not "
        "built; sequences that fit into the window do not notice it, so to train on such, set it "
        "to null in a copy of the checkpoint"
    )


def rotary_base(hf_config: Mapping[str, Any]) -> float:
    """Theta of the rotary embedding, from either spelling of the config.

    Source: transformers' `RotaryEmbeddingConfigMixin`.
    """
    parameters = _rope_parameters(hf_config)
    if parameters.get("rope_theta") is not None:
        return number(parameters, "rope_theta")
    return number(hf_config, "rope_theta", _DEFAULT_ROTARY_BASE)


def rope_scaling(hf_config: Mapping[str, Any]) -> Llama3Rope | None:
    """Scaling of the rotary frequencies; None for none.

    Raises:
        ValueError: It is of a type that is not built, or a parameter is missing.
    """
    parameters = _rope_parameters(hf_config)
    for holder in (parameters, hf_config):
        if number(holder, "partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("config.json: 'partial_rotary_factor' other than 1 is not built")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rotary scaling {kind!r} is not built; supported: default, llama3"
        )
    return Llama3Rope(
        factor=number(parameters, "factor"),
        low_freq_factor=number(parameters, "low_freq_factor"),
        high_freq_factor=number(parameters, "high_freq_factor"),
        original_max_position_embeddings=positive_int(
            parameters, "original_max_position_embeddings"
        ),
    )


def _rope_parameters(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` of older configs, or `rope_parameters` of transformers 5; the former wins."""
    for key in ("rope_scaling", "rope_parameters"):
        parameters = hf_config.get(key)
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ValueError(f"config.json: {key!r} must be an object, got {parameters!r}")
        if parameters:
            return parameters
    return {}


def _given(hf_config: Mapping[str, Any], key: str, default: object) -> object:
    value = hf_config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json has no {key!r}")
    return value
