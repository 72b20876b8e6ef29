"""Which decoder layers each model chunk holds, for any pipeline rank, without a model.

A rank has one chunk, or one for each virtual stage. Layers go to the chunks virtual stage by
virtual stage, and inside one from the first pipeline rank to the last.
Source: Megatron-Core's `get_num_layers_to_build` and `get_transformer_layer_offset`.
"""

from __future__ import annotations

from mtrain.parallel import ParallelLayout


def chunk_layers(num_layers: int, *, layout: ParallelLayout, pp_rank: int) -> tuple[range, ...]:
    """Layers of each chunk of a pipeline rank, numbered over the whole model.

    Raises:
        ValueError: The layers cannot be spread that way; the message says over what.
    """
    sizes = []
    for stage_layers in _layers_of_stages(num_layers, layout):
        if stage_layers % layout.num_chunks:
            raise ValueError(
                f"{stage_layers} layers of a pipeline stage cannot be split into "
                f"{layout.num_chunks} virtual stages"
            )
        sizes.append(stage_layers // layout.num_chunks)
    starts = [chunk * sum(sizes) + sum(sizes[:pp_rank]) for chunk in range(layout.num_chunks)]
    return tuple(range(start, start + sizes[pp_rank]) for start in starts)


def _layers_of_stages(num_layers: int, layout: ParallelLayout) -> list[int]:
    first, last = layout.num_layers_in_first_stage, layout.num_layers_in_last_stage
    head = [first] if first is not None else []
    tail = [last] if last is not None else []
    num_even = layout.pp_size - len(head) - len(tail)
    rest = num_layers - sum(head) - sum(tail)
    if num_even < 0 or rest < 0 or (rest % num_even if num_even else rest):
        named = "".join(
            f", {count} of them in the {which} stage"
            for which, count in (("first", first), ("last", last))
            if count is not None
        )
        raise ValueError(
            f"{num_layers} layers cannot be spread evenly over {layout.pp_size} pipeline stages"
            + named
        )
    even = [rest // num_even] * num_even if num_even else []
    return [*head, *even, *tail]
