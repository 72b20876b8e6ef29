"""Which part of a tensor is asked for, when something is indexed with slices as a tensor is.

Sources of tensors that compute what they give need the numbers; a tensor would find them itself.
"""

from __future__ import annotations

Bounds = tuple[tuple[int, int], ...]


def bounds_of(key: slice | tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """First position and the one after the last, on every axis of a tensor.

    Args:
        key: Slices without steps, for the first axes; the others are whole.
        shape: Shape of the tensor.
    """
    slices = key if isinstance(key, tuple) else (key,)
    assert len(slices) <= len(shape) or not shape, f"{key} of a tensor of shape {shape}"
    found = []
    for size, part in zip(shape, (*slices, *[slice(None)] * len(shape)), strict=False):
        start, stop, step = part.indices(size)
        assert step == 1, "parts are asked for without gaps"
        found.append((start, max(start, stop)))
    return tuple(found)


def slices_of(bounds: Bounds) -> tuple[slice, ...]:
    """The key that asks for these positions."""
    return tuple(slice(start, stop) for start, stop in bounds)


def within(bounds: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """The key that asks for these positions where only those of `outer` are there."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(bounds, outer, strict=True)
    )
