"""How layers are cut into segments; what segments compute is in test_replay.py."""

from types import SimpleNamespace

import pytest
import torch

from mtrain.model.layer_segments import split_layers


def block_of(num_layers, *, trained) -> SimpleNamespace:
    """Layers of two modules, of which those with the named numbers are trained, and a norm."""
    layers = [torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(num_layers)]
    for index, layer in enumerate(layers):
        layer.requires_grad_(index in trained)
    return SimpleNamespace(
        layers=torch.nn.ModuleList(layers), final_layernorm=torch.nn.Linear(2, 2)
    )


@pytest.mark.parametrize(
    ("length", "trained", "sizes"),
    [
        (2, range(5), [2, 2, 1]),
        (5, range(5), [5]),
        (9, range(5), [5]),
        # Frozen layers in front are of one segment with what is trained behind them.
        (1, {2, 3, 4}, [3, 1, 1]),
        (1, {2}, [3, 2]),
        (2, {0, 4}, [2, 3]),
    ],
)
def test_every_segment_but_the_last_trains_something(length, trained, sizes) -> None:
    block = block_of(5, trained=trained)
    segments = split_layers(block, length=length)
    assert [len(segment.layers) for segment in segments] == sizes
    assert [layer for segment in segments for layer in segment.layers] == list(block.layers)
    assert [segment.norm for segment in segments] == [
        *[None] * (len(sizes) - 1),
        block.final_layernorm,
    ]
    assert all(segment.modules for segment in segments)


def test_segments_know_what_is_trained() -> None:
    block = block_of(3, trained={0, 1})
    first, last = split_layers(block, length=1)[0], split_layers(block, length=2)[-1]
    assert first.modules == [block.layers[0][0]]
    assert first.parameters == list(block.layers[0].parameters())
    assert last.modules == [block.final_layernorm]
    assert last.parameters == list(block.final_layernorm.parameters())
