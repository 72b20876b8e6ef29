"""Compares two checkpoints tensor by tensor, whatever their files and formats.

The one thing to know: equal means the same bits. Blocks of rows are compared, so memory stays small
however large a tensor is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from mtrain.bridge.safetensors_header import BITS_OF_DTYPE
from mtrain.bridge.sources import StoredShape, StoredWeights

__all__ = ["Comparison", "Verdict", "compare_checkpoints"]

BLOCK_BYTES = 16 * 2**20
Verdict = Literal["equal", "other dtype", "different", "other shape", "only in A", "only in B"]

_MAX_THREADS = 4
# No numbers that can be subtracted, or less than a byte each.
_NOT_COMPARED = ("F6_E2M3", "F6_E3M2", "F4", "C64")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What became of one tensor.

    Attributes:
        name: Its name.
        verdict: "equal" for the same bits; "other dtype" for values that are the same when those
            of the wider dtype are rounded to the narrower one; "different" for other values.
        text: More about it, for the user; empty if it is equal.
    """

    name: str
    verdict: Verdict
    text: str = ""


def compare_checkpoints(
    first: StoredWeights, second: StoredWeights, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[Comparison]:
    """Compares all tensors that either checkpoint has, in the order of the first.

    Args:
        first: Called A in what is said.
        second: Called B.
        block_bytes: About how much of a tensor is read at once, if a row is not larger.

    Yields:
        One comparison a tensor.

    Raises:
        ValueError: A dtype cannot be compared.
    """
    _check_dtypes(first)
    _check_dtypes(second)
    both = [name for name in first.tensors if name in second.tensors]
    with (
        first.open() as a,
        second.open() as b,
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads,
    ):

        def compare(name: str) -> Comparison:
            stored = first.tensors[name], second.tensors[name]
            return _compare(name, stored, (a.slices(name), b.slices(name)), block_bytes)

        yield from threads.map(compare, both)
    yield from _only_in("only in A", first, second)
    yield from _only_in("only in B", second, first)


def _check_dtypes(checkpoint: StoredWeights) -> None:
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in _NOT_COMPARED:
            raise ValueError(f"{checkpoint.folder}: {name} is {tensor.dtype}: not compared here")


def _only_in(verdict: Verdict, one: StoredWeights, other: StoredWeights) -> Iterator[Comparison]:
    for name, tensor in one.tensors.items():
        if name not in other.tensors:
            text = f"{tensor.dtype} {list(tensor.shape)}"
            yield Comparison(name=name, verdict=verdict, text=text)


def _compare(
    name: str, stored: tuple[StoredShape, StoredShape], slices: tuple[Any, Any], block_bytes: int
) -> Comparison:
    a, b = stored
    if tuple(a.shape) != tuple(b.shape):
        text = f"{list(a.shape)} in A, {list(b.shape)} in B"
        return Comparison(name=name, verdict="other shape", text=text)
    counts, maxima = [0], [0.0]
    for block in _blocks(a, b, block_bytes):
        count, maximum = _difference(slices[0][block], slices[1][block])
        counts.append(count)
        maxima.append(maximum)
    verdict: Verdict = "equal" if a.dtype == b.dtype else "other dtype"
    text = "" if a.dtype == b.dtype else f"{a.dtype} in A, {b.dtype} in B"
    if sum(counts):
        # Of torch, because it keeps a NaN.
        maximum = torch.tensor(maxima, dtype=torch.float64).max().item()
        found = f"{sum(counts)} of {prod(a.shape)} elements differ, at most by {maximum:.4g}"
        verdict, text = "different", f"{text}: {found}" if text else found
    return Comparison(name=name, verdict=verdict, text=text)


def _blocks(a: StoredShape, b: StoredShape, block_bytes: int) -> Iterator[Any]:
    """What to index a tensor with, part by part."""
    if not a.shape:
        yield ()
        return
    row_bytes = prod(a.shape[1:]) * max(BITS_OF_DTYPE[a.dtype], BITS_OF_DTYPE[b.dtype]) // 8
    num_rows = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, a.shape[0], num_rows):
        yield slice(start, min(start + num_rows, a.shape[0]))


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """How many elements differ, and the largest difference; NaN where one is no number.

    Of two dtypes the one with the finer steps is rounded to the other.
    """
    is_rounded = a.dtype != b.dtype
    if is_rounded:
        a, b = _same_dtype(a, b)
    bits = _INTEGERS[a.dtype.itemsize]
    a_bits, b_bits = a.contiguous().view(bits), b.contiguous().view(bits)
    # Mostly so, and many times faster than to count.
    if torch.equal(a_bits, b_bits):
        return 0, 0.0
    differs = a_bits != b_bits
    if is_rounded:
        # Which bits a NaN has after rounding means nothing.
        differs &= ~(a.isnan() & b.isnan())
    differences = (a[differs].double() - b[differs].double()).abs()
    return differences.numel(), differences.max().item() if differences.numel() else 0.0


def _same_dtype(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not (a.is_floating_point() and b.is_floating_point()):
        return a.double(), b.double()
    coarser = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return a.to(coarser), b.to(coarser)
