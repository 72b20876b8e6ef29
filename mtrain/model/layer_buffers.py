"""Memory that stays where it is, from which recorded layers read a micro-batch.

The one thing to know: packs differ in their documents alone, so one set of buffers serves all packs
of a length. Boundaries are filled up with documents of no tokens, which no kernel minds.
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.documents import PackedDocuments, pack_documents, power_of_two_above

__all__ = ["LayerBuffers", "LayerInputs", "MicroBatchKind"]

_FEWEST_DOCUMENTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """What layers get of a micro-batch.

    Attributes:
        hidden: [seq, 1, hidden].
        rotary: Cosines and sines, see `RotarySelfAttention`.
        padding: bool [1, seq], True at padding.
        packed: Document boundaries; None for rows, which are never recorded.
    """

    hidden: torch.Tensor
    rotary: torch.Tensor | None
    padding: torch.Tensor | None
    packed: PackedDocuments | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchKind:
    """What micro-batches have in common that a recording serves.

    Attributes:
        shapes: Of hidden states, cosines and sines, and the mask of padding, where there is one.
        needs_grad: Whether hidden states want a gradient.
        num_documents: At least as many as there are, a power of two.
        longest: At least the tokens of the longest document, if a kernel asks for it.
    """

    shapes: tuple[torch.Size | None, ...]
    needs_grad: bool
    num_documents: int
    longest: int

    @classmethod
    def of(cls, inputs: LayerInputs, *, knows_no_longest: bool) -> Self:
        """The kind of a micro-batch.

        Args:
            inputs: Of the layers.
            knows_no_longest: Whether no kernel asks for the longest document.
        """
        tensors = (inputs.hidden, inputs.rotary, inputs.padding)
        num_documents = inputs.packed.cu_seqlens_q.numel() - 1
        return cls(
            shapes=tuple(None if tensor is None else tensor.shape for tensor in tensors),
            needs_grad=inputs.hidden.requires_grad,
            num_documents=max(_FEWEST_DOCUMENTS, power_of_two_above(num_documents)),
            longest=len(inputs.hidden) if knows_no_longest else inputs.packed.max_seqlen_q,
        )


class LayerBuffers:
    """Where recordings of a kind find a micro-batch and leave what came of it.

    Attributes:
        inputs: Of the layers. Documents of no tokens fill up the boundaries.
        output: [seq, 1, hidden].
        grad: Of the output.
        input_grad: Of hidden states, or None.

    Args:
        kind: Of the micro-batches.
        inputs: One of them.
        config: Model shape and attention kernel.
    """

    def __init__(
        self, kind: MicroBatchKind, inputs: LayerInputs, config: TransformerConfig
    ) -> None:
        def like(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.empty_like(tensor)

        self._longest, self._config = kind.longest, config
        ends = inputs.packed.cu_seqlens_q.new_zeros(kind.num_documents + 1)
        self.inputs = LayerInputs(
            hidden=like(inputs.hidden).requires_grad_(kind.needs_grad),
            rotary=like(inputs.rotary),
            padding=like(inputs.padding),
            packed=self._packed(ends, inputs),
        )
        self.output = like(inputs.hidden)
        self.grad = like(inputs.hidden)
        self.input_grad = like(inputs.hidden) if kind.needs_grad else None

    def _packed(self, ends: torch.Tensor, inputs: LayerInputs) -> PackedDocuments:
        packed = pack_documents(
            ends,
            longest=self._longest,
            num_tokens=len(inputs.hidden),
            packed_format=inputs.packed.qkv_format,
            config=self._config,
        )
        return dataclasses.replace(packed, is_replayed=True)

    def fill(self, inputs: LayerInputs) -> None:
        """Copies a micro-batch."""
        ours = self.inputs
        ends, found = ours.packed.cu_seqlens_q, inputs.packed.cu_seqlens_q
        ends.fill_(len(inputs.hidden))
        ends[: len(found)].copy_(found)
        if (blocks := ours.packed.blocks) is not None:
            blocks.copy_(self._packed(ends, inputs).blocks)
        with torch.no_grad():
            ours.hidden.copy_(inputs.hidden)
        for mine, theirs in ((ours.rotary, inputs.rotary), (ours.padding, inputs.padding)):
            if mine is not None:
                mine.copy_(theirs)
