"""Reads fields of a config.json that may hold anything.

Each function takes one fact out of the dictionary, checks it and says in one line what is wrong.
Defaults are those of the Hugging Face class, and only where that class has had them all along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtrain.bridge.family import LinearRope, Llama3Rope, LongRope, Rope, YarnRope

_FULL, _SLIDING = "full_attention", "sliding_attention"


def positive_int(hf_config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer above zero; `default` where the key is absent or null.

    Raises:
        ValueError: It is absent without a default, or is something else.
    """
    value = _given(hf_config, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json: {key!r} must be a whole number above zero, got {value!r}")
    return value


def whole_number(hf_config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer that is not negative; `default` where the key is absent or null.

    Raises:
        ValueError: It is absent without a default, or is something else.
    """
    value = _given(hf_config, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"config.json: {key!r} must be a whole number, got {value!r}")
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


def layer_kinds(
    hf_config: Mapping[str, Any], default: tuple[str, ...], *, known: tuple[str, ...]
) -> tuple[str, ...]:
    """The kind of attention of every layer.

    Args:
        hf_config: The config.
        default: Kinds where the config does not say.
        known: Kinds that the family has.

    Raises:
        ValueError: There are too few or too many, or one that is not known.
    """
    kinds = tuple(str(kind) for kind in hf_config.get("layer_types") or default)
    others = sorted(set(kinds) - set(known))
    if others:
        raise ValueError(
            f"config.json: 'layer_types' has {others}; this family has {', '.join(known)}"
        )
    num_layers = positive_int(hf_config, "num_hidden_layers")
    if len(kinds) != num_layers:
        raise ValueError(f"config.json: {len(kinds)} 'layer_types' for {num_layers} layers")
    return kinds


def sliding_window(
    hf_config: Mapping[str, Any],
    *,
    window: object,
    windowed: Sequence[int] | None = None,
    is_kept: bool = False,
) -> dict[str, Any]:
    """The layers in which a token does not see all before it.

    A window as long as the longest sequence changes nothing.

    Args:
        hf_config: The config.
        window: Tokens that a token of such a layer sees, itself included; None for all.
        windowed: Such layers where the config has no `layer_types`; all of them if None.
        is_kept: Keeps a window that is longer than any sequence; such layers differ in more.

    Returns:
        `window` and `windowed_layers` of `GroupedQueryAttention`, or nothing.

    Raises:
        ValueError: The window is no length, or there is another kind of layer.
    """
    num_layers = positive_int(hf_config, "num_hidden_layers")
    windowed = range(num_layers) if windowed is None else windowed
    default = tuple(_SLIDING if n in windowed else _FULL for n in range(num_layers))
    kinds = layer_kinds(hf_config, default, known=(_FULL, _SLIDING))
    layers = tuple(number for number, kind in enumerate(kinds) if kind == _SLIDING)
    longest = positive_int(hf_config, "max_position_embeddings")
    if window is None or not layers:
        return {}
    if not isinstance(window, int) or isinstance(window, bool) or window <= 0:
        raise ValueError(
            f"config.json: 'sliding_window' must be a whole number above zero, got {window!r}"
        )
    if window >= longest and not is_kept:
        return {}
    return {"window": window, "windowed_layers": layers}


def rope(
    hf_config: Mapping[str, Any],
    *,
    head_dim: int,
    kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn"),
    base: float = 10_000.0,
    partial: float | None = None,
    is_interleaved: bool = False,
) -> Rope:
    """The rotary embedding, from either spelling of the config.

    Args:
        hf_config: The config.
        head_dim: Size of a head, or of its part that may turn.
        kinds: Types of scaling that the Hugging Face class has.
        base: Theta where the config does not say.
        partial: Part of the head that turns where the config does not say; None where the
            Hugging Face class turns all of it, whatever the config says.
        is_interleaved: See `Rope`.

    Raises:
        ValueError: The scaling is of a type that is not built, or a parameter is missing.
    """
    parameters = rope_parameters(hf_config)
    given = number(
        parameters,
        "partial_rotary_factor",
        number(hf_config, "partial_rotary_factor", 1.0 if partial is None else partial),
    )
    if partial is None and given != 1.0:
        raise ValueError("config.json: 'partial_rotary_factor' other than 1 is not built")
    return Rope(
        base=rotary_base(hf_config, base),
        dim=int(head_dim * given),
        is_interleaved=is_interleaved,
        scaling=_rope_scaling(hf_config, parameters, kinds),
    )


def rotary_base(hf_config: Mapping[str, Any], default: float = 10_000.0) -> float:
    """Theta of the rotary embedding, from either spelling of the config.

    Source: transformers' `RotaryEmbeddingConfigMixin`.
    """
    base = number(hf_config, "rope_theta", default)
    return number(rope_parameters(hf_config), "rope_theta", base)


def rope_parameters(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` of older configs, or `rope_parameters` of transformers 5; the former wins."""
    for key in ("rope_scaling", "rope_parameters"):
        parameters = hf_config.get(key)
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ValueError(f"config.json: {key!r} must be an object, got {parameters!r}")
        if parameters:
            return parameters
    return {}


def _rope_scaling(
    hf_config: Mapping[str, Any], parameters: Mapping[str, Any], kinds: tuple[str, ...]
) -> LinearRope | Llama3Rope | YarnRope | LongRope | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in kinds:
        raise ValueError(
            f"config.json: rotary scaling {kind!r} is not built; supported: {', '.join(kinds)}"
        )
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(factor=number(parameters, "factor"))
    # Phi has it outside, and that one counts.
    original = positive_int(
        hf_config,
        "original_max_position_embeddings",
        parameters.get("original_max_position_embeddings")
        or hf_config.get("max_position_embeddings"),
    )
    if kind == "llama3":
        return Llama3Rope(
            factor=number(parameters, "factor"),
            low_freq_factor=number(parameters, "low_freq_factor"),
            high_freq_factor=number(parameters, "high_freq_factor"),
            original_max_position_embeddings=original,
        )
    longest = positive_int(hf_config, "max_position_embeddings")
    factor = number(parameters, "factor", longest / original)
    if kind == "yarn":
        return _yarn(parameters, factor=factor, original=original)
    return _longrope(parameters, factor=factor, original=original)


def _yarn(parameters: Mapping[str, Any], *, factor: float, original: int) -> YarnRope:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = (parameters.get(key) for key in ("mscale", "mscale_all_dim"))
    inferred = mscale(above) / mscale(below) if above and below else mscale(1.0)
    return YarnRope(
        factor=factor,
        beta_fast=number(parameters, "beta_fast", 32.0),
        beta_slow=number(parameters, "beta_slow", 1.0),
        attention_factor=number(parameters, "attention_factor", inferred),
        original_max_position_embeddings=original,
        rounds=boolean(parameters, "truncate", default=True),
    )


def _longrope(parameters: Mapping[str, Any], *, factor: float, original: int) -> LongRope:
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    divisors = {}
    for key in ("short_factor", "long_factor"):
        values = parameters.get(key)
        if not isinstance(values, list) or not all(isinstance(one, int | float) for one in values):
            raise ValueError(f"config.json: {key!r} must be a list of numbers, got {values!r}")
        divisors[key] = tuple(float(one) for one in values)
    return LongRope(
        **divisors,
        attention_factor=number(parameters, "attention_factor", inferred),
        original_max_position_embeddings=original,
    )


def _given(hf_config: Mapping[str, Any], key: str, default: object) -> object:
    value = hf_config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json has no {key!r}")
    return value
