from itertools import pairwise
from math import prod

import pytest
import torch

from mtrain.bridge.fragments import cut_parameter
from mtrain.bridge.plan import hf_tensors, plan_rank, weight_table
from mtrain.bridge.slices import view_box
from mtrain.parallel import ParallelLayout
from tests.tiny import tiny_config

LAYOUTS = [
    ("qwen3_moe_mixed", ParallelLayout()),
    ("qwen3_moe_mixed", ParallelLayout(world_size=2, tp_size=2, etp_size=2)),
    ("qwen2", ParallelLayout(world_size=2, tp_size=2)),
]


def cuts_of(size: int) -> list[list[int]]:
    """Bounds as data-parallel ranks have them: few, uneven, some inside a row."""
    return [[0, size], [0, size // 3, size // 2 + 1, size], [0, 1, size - 1, size]]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_fragments_hold_what_the_parameter_holds_there(model, layout):
    """T11: every element of every parameter, wherever it is cut."""
    table = weight_table(tiny_config(model))
    numbers = torch.arange(sum(prod(shape) for shape in hf_tensors(table).values()))
    ends = torch.tensor([prod(shape) for shape in hf_tensors(table).values()]).cumsum(0)
    hf = {
        name: numbers[end - prod(shape) : end].view(shape)
        for (name, shape), end in zip(hf_tensors(table).items(), ends.tolist(), strict=True)
    }
    for parameter in plan_rank(table, layout=layout, rank=layout.world_size - 1):
        whole = filled(parameter.shape, parameter.pieces, hf).flatten()
        for bounds in cuts_of(whole.numel()):
            for start, stop in pairwise(bounds):
                fragments = cut_parameter(parameter, start=start, stop=stop)
                assert len(fragments) <= 3
                names = [fragment.plan.name for fragment in fragments]
                assert names == [f"{parameter.name}[{index}]" for index in range(len(names))]
                parts = [filled(f.plan.shape, f.plan.pieces, hf).flatten() for f in fragments]
                assert torch.equal(torch.cat(parts), whole[start:stop])
                sizes = [fragment.size for fragment in fragments]
                assert [f.offset for f in fragments] == [sum(sizes[:i]) for i in range(len(sizes))]


def filled(shape, pieces, hf) -> torch.Tensor:
    """A parameter of the numbers that its plan takes; padding is -1."""
    tensor = torch.full(shape, -1)
    for piece in pieces:
        source = view_box(hf[piece.hf_name], piece.hf)
        target = view_box(tensor, piece.local, expert=piece.expert)
        target.copy_(source.reshape(target.shape))
    return tensor
