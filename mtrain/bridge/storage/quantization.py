"""What config.json says about weights in fewer bits: what can be read, and how FP8 is cut up.

The one thing to know: whether a tensor is quantised is seen from the tensors beside it, never from
here. This is about checkpoints that cannot be read at all, and about the size of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEY = "quantization_config"
_BLOCK_SIZE = (128, 128)
_SUPPORTED = {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Blocks:
    """How matrices of 8-bit floats are scaled: one factor for each block.

    Attributes:
        rows: Rows of a block; the last one may have fewer.
        columns: Its columns, likewise.
        has_power_scales: Whether factors are powers of two.
    """

    rows: int = _BLOCK_SIZE[0]
    columns: int = _BLOCK_SIZE[1]
    has_power_scales: bool = False

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the factors of a matrix, or of stacked ones."""
        *stacked, rows, columns = shape
        return (*stacked, -(-rows // self.rows), -(-columns // self.columns))


def check_quantization(hf_config: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose weights are in a form that cannot be read.

    Source: transformers' `FineGrainedFP8Config` and `Mxfp4Config`.

    Raises:
        ValueError: It has one.
    """
    settings = _settings(hf_config)
    method = settings.get("quant_method")
    if not settings or method == "mxfp4":
        return
    if method != "fp8":
        raise ValueError(
            f"config.json: {_KEY!r} has quant_method {method!r}, which cannot be read; supported: "
            "fp8 in blocks, mxfp4; use the checkpoint that is not quantised"
        )
    block_size = settings.get("weight_block_size", _BLOCK_SIZE)
    if not _is_block_size(block_size):
        raise ValueError(
            f"config.json: {_KEY!r} is fp8 with weight_block_size {block_size!r}; supported: a "
            "factor for each block, as [128, 128]; use the checkpoint that is not quantised"
        )
    for key, supported in _SUPPORTED.items():
        value = settings.get(key, supported)
        if value != supported:
            raise ValueError(
                f"config.json: {_KEY!r} is fp8 with {key} {value!r}; supported: {supported}; use "
                "the checkpoint that is not quantised"
            )


def fp8_blocks(hf_config: Mapping[str, Any]) -> Fp8Blocks:
    """The blocks of FP8 weights; of 128 x 128 where config.json says nothing.

    Raises:
        ValueError: As for `check_quantization`.
    """
    check_quantization(hf_config)
    settings = _settings(hf_config)
    if settings.get("quant_method") != "fp8":
        return Fp8Blocks()
    rows, columns = settings.get("weight_block_size", _BLOCK_SIZE)
    return Fp8Blocks(
        rows=rows, columns=columns, has_power_scales=settings.get("scale_fmt") == "ue8m0"
    )


def without_quantization(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with weights that are not quantised."""
    return {key: value for key, value in hf_config.items() if key != _KEY}


def _settings(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = hf_config.get(_KEY)
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"config.json: {_KEY!r} must be an object, got {settings!r}")
    return settings or {}


def _is_block_size(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    )
