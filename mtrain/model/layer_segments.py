"""Neighbouring layers that are started as one.

The one thing to know: what lies between two segments is a moment at which data parallelism may
begin to send gradients, or must have received parameters.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from mtrain.model.layer_buffers import LayerBuffers, LayerInputs

__all__ = ["LayerSegment", "SegmentedWork", "split_layers"]


@dataclass(frozen=True, kw_only=True)
class LayerSegment:
    """Layers, none of which is recomputed, and the norm behind the last one of a model.

    Attributes:
        layers: In order.
        norm: None in front of other segments, and in models without one.
    """

    layers: Sequence[torch.nn.Module]
    norm: torch.nn.Module | None = None

    @functools.cached_property
    def modules(self) -> list[torch.nn.Module]:
        """Those with trained parameters of their own."""
        parts = [*self.layers] if self.norm is None else [*self.layers, self.norm]
        modules = (module for part in parts for module in part.modules())
        return [module for module in modules if _trained(module)]

    @functools.cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        owned = (parameter for module in self.modules for parameter in _trained(module))
        return list(dict.fromkeys(owned))

    def run(self, hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[seq, 1, hidden] -> [seq, 1, hidden], as Megatron-Core's block calls its layers.

        Args:
            hidden: In front of these layers.
            inputs: The rest of what layers get.
        """
        for layer in self.layers:
            hidden, _ = layer(
                hidden,
                None,
                rotary_pos_emb=inputs.rotary,
                packed_seq_params=inputs.packed,
                padding_mask=inputs.padding,
            )
        return hidden if self.norm is None else self.norm(hidden)


def split_layers(block: TransformerBlock, *, length: int) -> list[LayerSegment]:
    """Segments of at least so many layers, but for the last one.

    Each but the last trains something. So if anything is trained, every output wants a gradient.

    Args:
        block: All layers of a model.
        length: Layers of a segment.
    """
    segments: list[LayerSegment] = []
    rest = list(block.layers)
    size = length
    while size < len(rest):
        segment = LayerSegment(layers=rest[:size])
        if segment.modules:
            segments.append(segment)
            rest, size = rest[size:], length
        else:
            size += 1
    return [*segments, LayerSegment(layers=rest, norm=block.final_layernorm)]


class SegmentedWork:
    """What layers do with a micro-batch: all segments forward, then all of them backward.

    Args:
        segments: All layers.
        buffers: Of the micro-batch.

    Attributes:
        written: Of every segment the parameters to whose main gradients it added.
    """

    def __init__(self, segments: list[LayerSegment], buffers: LayerBuffers) -> None:
        self._segments = segments
        self._buffers = buffers
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._grad: torch.Tensor | None = None
        self.written: list[list[torch.nn.Parameter]] = [[] for _ in segments]

    def forward(self, index: int) -> None:
        """Runs a segment, which goes on where the one before ended."""
        inputs = self._buffers.inputs
        start = self._kept[-1][1].detach().requires_grad_() if index else inputs.hidden
        with torch.enable_grad():
            end = self._segments[index].run(start, inputs)
        self._kept.append((start, end))
        if index == len(self._segments) - 1:
            self._buffers.output.copy_(end.detach())

    def backward(self, index: int) -> None:
        """Differentiates a segment."""
        start, end = self._kept.pop()
        grad = self._buffers.grad if self._grad is None else self._grad
        wanted = [start] * start.requires_grad + self._segments[index].parameters
        grads = torch.autograd.grad(end, wanted, grad, allow_unused=True)
        self._grad = grads[0] if index else None
        if index == 0 and start.requires_grad:
            self._buffers.input_grad.copy_(grads[0])
        self.written[index][:] = [
            tensor
            for tensor, grad in zip(wanted, grads, strict=True)
            if grad is not None and tensor is not start
        ]


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.requires_grad]
