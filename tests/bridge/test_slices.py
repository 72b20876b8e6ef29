import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mtrain.bridge.slices import read_box, tensors_by_name, view_box
from mtrain.bridge.spans import Span


def test_a_repeating_span_is_two_axes_of_a_view():
    tensor = torch.arange(24).view(12, 2)
    view = view_box(tensor, (Span(1, 2, 3, 4), Span(1, 1)))
    assert view.tolist() == [[[3], [5]], [[11], [13]], [[19], [21]]]
    view.zero_()
    assert tensor[1:3, 1].tolist() == [0, 0]
    assert tensor[3:5, 1].tolist() == [7, 9]


def test_an_expert_is_an_index_on_a_leading_axis():
    tensor = torch.arange(12).view(3, 2, 2)
    assert view_box(tensor, (Span(1, 1), Span(0, 2)), expert=2).tolist() == [[10, 11]]


def test_a_file_is_read_by_the_same_boxes(tmp_path):
    tensor = torch.arange(24.0).view(12, 2)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    box = (Span(1, 2, 3, 4), Span(1, 1))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert torch.equal(read_box(file.get_slice("x"), box), view_box(tensor, box))


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("temporary", torch.zeros(4), persistent=False)
        self.register_buffer("unset", None)

    def get_extra_state(self):
        return {"not": "a tensor"}

    def set_extra_state(self, state):
        raise NotImplementedError


def test_parameters_and_persistent_buffers_have_names():
    chunk = torch.nn.ModuleDict({"part": Part()})
    assert [set(named) for named in tensors_by_name([chunk, Part()])] == [
        {"part.weight", "part.kept"},
        {"weight", "kept"},
    ]
