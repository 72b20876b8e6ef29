"""A checkpoint as it would be without quantisation: 8-bit and 4-bit weights are shown as bfloat16.

The one thing to know: the tensors themselves say what is quantised. `X` of 8-bit floats has
`X_scale_inv` beside it, and `X_blocks` with `X_scales` are the 4-bit form of `X`. Values are
computed for the parts that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtrain.bridge.sources import StoredShape, StoredWeights, TensorShape, TensorSource
from mtrain.bridge.storage.quantization import Fp8Blocks

FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES_OF_BLOCK = 16

Code = Literal["fp8", "mxfp4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedWeights:
    """A checkpoint without quantisation; see `StoredWeights`.

    Attributes:
        checkpoint: What is in the files.
        tensors: All tensors; quantised ones are BF16, and their factors are not among them.
        codes: How those that are quantised are stored.
        blocks: How 8-bit floats are scaled.
    """

    checkpoint: StoredWeights
    tensors: Mapping[str, StoredShape]
    codes: Mapping[str, Code]
    blocks: Fp8Blocks

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    @contextmanager
    def open(self) -> Iterator[TensorSource]:
        """Gives the tensors; read and computed when asked for."""
        with self.checkpoint.open() as files:
            yield _DecodedSource(self, files) if self.codes else files


def decoded(
    checkpoint: StoredWeights, blocks: Fp8Blocks
) -> tuple[DecodedWeights, Mapping[str, list[str]]]:
    """A checkpoint as it would be without quantisation.

    Args:
        checkpoint: Any checkpoint.
        blocks: How its 8-bit floats are scaled.

    Returns:
        The checkpoint, and by kind what is wrong with it: a tensor without its factors, or the
        other way round, or factors of another shape or dtype.
    """
    stored = checkpoint.tensors
    tensors: dict[str, StoredShape] = {}
    codes: dict[str, Code] = {}
    faults: dict[str, list[str]] = {}
    for name, tensor in stored.items():
        if tensor.dtype == FP8:
            tensors[name], codes[name] = TensorShape("BF16", tuple(tensor.shape)), "fp8"
            for kind, text in _fp8_faults(name, stored, blocks):
                faults.setdefault(kind, []).append(text)
        elif name.endswith(_BLOCKS) and tensor.dtype == "U8":
            base = name.removesuffix(_BLOCKS)
            tensors[base], codes[base] = TensorShape("BF16", _mxfp4_shape(tensor.shape)), "mxfp4"
            for kind, text in _mxfp4_faults(base, stored):
                faults.setdefault(kind, []).append(text)
        elif (owner := _owner_of_scales(name, tensor, stored)) is None:
            tensors[name] = tensor
        elif owner not in stored:
            faults.setdefault("missing", []).append(owner)
    return (
        DecodedWeights(checkpoint=checkpoint, tensors=tensors, codes=codes, blocks=blocks),
        faults,
    )


def _owner_of_scales(
    name: str, tensor: StoredShape, stored: Mapping[str, StoredShape]
) -> str | None:
    """The tensor that something holds the factors of; None where it is something else."""
    if name.endswith(SCALE_SUFFIX):
        base = name.removesuffix(SCALE_SUFFIX)
        # Factors of a tensor that is not quantised are no part of the model, and are told so.
        return None if base in stored and stored[base].dtype != FP8 else base
    if name.endswith(_SCALES) and tensor.dtype == "U8":
        return name.removesuffix(_SCALES) + _BLOCKS
    return None


def _fp8_faults(
    name: str, stored: Mapping[str, StoredShape], blocks: Fp8Blocks
) -> Iterator[tuple[str, str]]:
    scale = f"{name}{SCALE_SUFFIX}"
    shape = tuple(stored[name].shape)
    if scale not in stored:
        yield "missing", scale
    elif len(shape) < 2:
        yield "wrong shape", f"{name} has {shape}, and only matrices have factors of blocks"
    elif stored[scale].dtype not in _SCALE_DTYPES:
        yield "dtype not supported", f"{scale} ({stored[scale].dtype})"
    elif tuple(stored[scale].shape) != blocks.scale_shape(shape):
        yield (
            "wrong shape",
            f"{scale} has {tuple(stored[scale].shape)}, expected is {blocks.scale_shape(shape)} "
            f"for blocks of {blocks.rows} x {blocks.columns}",
        )


def _mxfp4_faults(base: str, stored: Mapping[str, StoredShape]) -> Iterator[tuple[str, str]]:
    blocks, scales = base + _BLOCKS, base + _SCALES
    shape = tuple(stored[blocks].shape)
    if scales not in stored:
        yield "missing", scales
    elif len(shape) < 3 or shape[-1] != _BYTES_OF_BLOCK:
        yield "wrong shape", f"{blocks} has {shape}, expected is [..., rows, blocks, 16]"
    elif tuple(stored[scales].shape) != shape[:-1]:
        yield (
            "wrong shape",
            f"{scales} has {tuple(stored[scales].shape)}, expected is {shape[:-1]}",
        )


def _mxfp4_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor in blocks: stored by rows, shown transposed, as transformers has it."""
    *stacked, rows, num_blocks, size = (1, 1, 1, *shape)[-max(3, len(shape)) :]
    return (*stacked, num_blocks * size * 2, rows)


class _DecodedSource:
    def __init__(self, decoded: DecodedWeights, files: TensorSource) -> None:
        self._decoded = decoded
        self._files = files

    def slices(self, name: str) -> Any:
        """An object that gives parts of a tensor when it is indexed with slices."""
        code = self._decoded.codes.get(name)
        if code is None:
            return self._files.slices(name)
        shape = self._decoded.tensors[name].shape
        # Here, not above: it imports torch, which reading headers does without.
        if code == "fp8":
            from mtrain.bridge.storage.fp8_blocks import Fp8Slices

            scales = self._files.slices(f"{name}{SCALE_SUFFIX}")
            return Fp8Slices(self._files.slices(name), scales, shape, self._decoded.blocks)
        from mtrain.bridge.storage.mxfp4 import Mxfp4Slices

        blocks, scales = (self._files.slices(name + suffix) for suffix in (_BLOCKS, _SCALES))
        return Mxfp4Slices(blocks, scales, shape)
