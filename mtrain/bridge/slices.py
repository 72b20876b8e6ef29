"""Turns the boxes of a plan into views of real tensors; the only place where the two meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mtrain.bridge.spans import Box


def view_box(tensor: torch.Tensor, box: Box, *, expert: int | None = None) -> torch.Tensor:
    """A view of the elements in a box.

    Views of two tensors by the two boxes of a piece have the same shape: a span that repeats
    becomes two axes, [count, size].

    Args:
        tensor: Any tensor.
        box: One span for each of its axes, the expert axis aside.
        expert: Index on the leading axis of stacked experts; None if there is none.
    """
    view = tensor if expert is None else tensor[expert]
    return _repeats_as_axes(view[_enclosing_slices(box)], box)


def read_box(stored: object, box: Box) -> torch.Tensor:
    """The same for a slice object of a safetensors file; reads no more than the enclosing rows."""
    return _repeats_as_axes(stored[_enclosing_slices(box)], box)  # type: ignore[index]


def named_tensors(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors that a checkpoint of the chunk consists of.

    Parameters and persistent buffers. The `_extra_state` of Transformer Engine is neither.
    """
    yield from chunk.named_parameters()
    for prefix, module in chunk.named_modules():
        # torch has no public way to ask whether a buffer is persistent.
        temporary = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False):
            if name not in temporary:
                yield f"{prefix}.{name}" if prefix else name, buffer


def tensors_by_name(chunks: Sequence[torch.nn.Module]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each chunk, by name."""
    return [dict(named_tensors(chunk)) for chunk in chunks]


def _enclosing_slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(span.start, span.start + span.extent) for span in box)


def _repeats_as_axes(view: torch.Tensor, box: Box) -> torch.Tensor:
    for axis in reversed(range(len(box))):
        span = box[axis]
        if span.count > 1:
            view = view.unfold(axis, span.size, span.step).movedim(-1, axis + 1)
    return view
