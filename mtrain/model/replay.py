"""Layers whose kernels are recorded once and replayed for every micro-batch after that.

A layer is about fifty kernels, and starting each from Python takes longer than small kernels run.
Packs of one length always start the same ones, so a CUDA graph holds those of all layers forward,
another those backward.

The one thing to know: a recording reads and writes memory that stays where it is (`_Buffers`), so
a micro-batch is copied there and its results are read there. It is of one kind of micro-batch
(`_Kind`): of one shape, and the first of a step or a later one, since the first writes gradients
over what the step before left. Nothing is recorded before one step was computed as it is, which
compiles kernels.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.delta_net import GatedDeltaNet
from mtrain.model.dispatch import LocalTokenDispatcher
from mtrain.model.documents import PackedDocuments, has_blocks_everywhere, pack_documents
from mtrain.model.gpt import LanguageModel
from mtrain.platform.cuda_graphs import Record
from mtrain.platform.weight_gradients import add_gradient

__all__ = ["replay_layers", "why_not_replayed"]

_FEWEST_DOCUMENTS = 64
_BALANCE_LOSSES = {"aux_loss", "seq_aux_loss", "none"}


def replay_layers(model: LanguageModel, record: Record) -> list[torch.nn.Parameter]:
    """Lets training on packs replay the layers of a model.

    Args:
        model: The only chunk of its rank; see `why_not_replayed`. All that is trained has a
            `main_grad`, which must stay where it is, as must the parameters.
        record: Of `mtrain.platform.cuda_graphs`.

    Returns:
        The parameters whose gradients go to their main gradients without anybody's help: nobody
        else may have a hook on them.
    """
    model.decoder.__class__ = ReplayedBlock
    model.decoder.replays = _Replays(model.decoder, record)
    return [parameter for parameter in model.decoder.parameters() if parameter.requires_grad]


def why_not_replayed(model: LanguageModel) -> str:
    """What keeps the layers of a model from being recorded; empty if nothing does.

    Args:
        model: A chunk, alone on its rank and not shared with others.
    """
    config = model.config
    modules = list(model.decoder.modules())
    balancing = config.moe_router_load_balancing_type
    kinds = {balancing} if isinstance(balancing, str) else set(balancing)
    reasons = {
        "there is no GPU": not torch.cuda.is_available(),
        "the model is not in half precision": config.params_dtype == torch.float32,
        "nothing in the layers is trained": not any(
            parameter.requires_grad for parameter in model.decoder.parameters()
        ),
        "activations are recomputed": config.recompute_granularity is not None,
        # The host looks at the lengths of documents.
        "the model has gated delta nets": any(
            isinstance(module, GatedDeltaNet) for module in modules
        ),
        # Its kernels are planned by the host.
        "Transformer Engine computes attention": model.packed_format == "thd"
        and not has_blocks_everywhere(config),
        # The host asks how many tokens came.
        "tokens travel to their experts": any(
            isinstance(module, MoELayer)
            and not isinstance(module.token_dispatcher, LocalTokenDispatcher)
            for module in modules
        ),
        "experts are balanced over the global batch": config.num_moe_experts is not None
        and not kinds <= _BALANCE_LOSSES,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


class ReplayedBlock(TransformerBlock):
    """Megatron-Core's layers; `replays` takes over where a pack is trained on."""

    replays: "_Replays"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedDocuments | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """[seq, 1, hidden] -> [seq, 1, hidden]; arguments as for Megatron-Core's class."""
        layers = functools.partial(super().forward, attention_mask=attention_mask, **others)
        if packed_seq_params is None or not torch.is_grad_enabled():
            return layers(
                hidden_states,
                packed_seq_params=packed_seq_params,
                rotary_pos_emb=rotary_pos_emb,
                padding_mask=padding_mask,
            )
        inputs = _Inputs(
            hidden=hidden_states,
            rotary=rotary_pos_emb,
            padding=padding_mask,
            packed=packed_seq_params,
        )
        return self.replays(layers, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What layers get of a micro-batch.

    Attributes:
        hidden: [seq, 1, hidden].
        rotary: Cosines and sines, see `RotarySelfAttention`.
        padding: bool [1, seq], True at padding.
        packed: Document boundaries.
    """

    hidden: torch.Tensor
    rotary: torch.Tensor | None
    padding: torch.Tensor | None
    packed: PackedDocuments

    def run(self, layers: Callable[..., torch.Tensor]) -> torch.Tensor:
        return layers(
            self.hidden,
            packed_seq_params=self.packed,
            rotary_pos_emb=self.rotary,
            padding_mask=self.padding,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
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
    def of(cls, inputs: _Inputs, *, knows_no_longest: bool) -> "_Kind":
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
            num_documents=max(_FEWEST_DOCUMENTS, 1 << (num_documents - 1).bit_length()),
            longest=len(inputs.hidden) if knows_no_longest else inputs.packed.max_seqlen_q,
        )


class _Buffers:
    """Where recordings of a kind find a micro-batch and leave what came of it.

    Attributes:
        inputs: Of the layers. Documents of no tokens fill up the boundaries.
        output: [seq, 1, hidden].
        grad: Of the output.
        input_grad: Of hidden states, or None.
    """

    def __init__(self, kind: _Kind, inputs: _Inputs, config: TransformerConfig) -> None:
        def like(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.empty_like(tensor, requires_grad=False)

        self._longest, self._config = kind.longest, config
        ends = inputs.packed.cu_seqlens_q.new_zeros(kind.num_documents + 1)
        self.inputs = _Inputs(
            hidden=like(inputs.hidden).requires_grad_(kind.needs_grad),
            rotary=like(inputs.rotary),
            padding=like(inputs.padding),
            packed=self._packed(ends, inputs),
        )
        self.output = like(inputs.hidden)
        self.grad = like(inputs.hidden)
        self.input_grad = like(inputs.hidden) if kind.needs_grad else None

    def _packed(self, ends: torch.Tensor, inputs: _Inputs) -> PackedDocuments:
        packed = pack_documents(
            ends,
            longest=self._longest,
            num_tokens=len(inputs.hidden),
            packed_format=inputs.packed.qkv_format,
            config=self._config,
        )
        return dataclasses.replace(packed, is_replayed=True)

    def fill(self, inputs: _Inputs) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """The layers of one kind of micro-batch, forward and backward.

    Attributes:
        buffers: Where they read and write.
        forward: Fills `output`.
        backward: Adds to main gradients and fills `input_grad`.
        written: The parameters to whose main gradients it adds.
    """

    buffers: _Buffers
    forward: Callable[[], None]
    backward: Callable[[], None]
    written: list[torch.nn.Parameter]


class _Replays:
    """Recordings of a block of layers, made when they are wanted.

    Args:
        block: The layers, with main gradients.
        record: See `replay_layers`.
    """

    def __init__(self, block: TransformerBlock, record: Record) -> None:
        self._config = block.config
        self._knows_no_longest = has_blocks_everywhere(block.config)
        self._record = record
        self._parameters = [p for p in block.parameters() if p.requires_grad]
        self._overwritten = [p for p in self._parameters if hasattr(p, "overwrites_main_grad")]
        self._buffers: dict[_Kind, _Buffers] = {}
        self._recordings: dict[tuple[_Kind, bool], _Recording] = {}
        self._computed: set[bool] = set()
        # Hidden states want no gradient where the embedding is frozen; the layers do.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, layers: Callable[..., torch.Tensor], inputs: _Inputs) -> torch.Tensor:
        """Output of the layers, [seq, 1, hidden]."""
        # One that no micro-batch uses keeps its mark.
        is_first = all(parameter.overwrites_main_grad for parameter in self._overwritten)
        kind = _Kind.of(inputs, knows_no_longest=self._knows_no_longest)
        if kind not in self._buffers:
            self._buffers[kind] = _Buffers(kind, inputs, self._config)
        buffers = self._buffers[kind]
        buffers.fill(inputs)
        recording = self._recordings.get((kind, is_first))
        if recording is None and is_first in self._computed:
            recording = self._try_to_record(layers, buffers)
            self._recordings[kind, is_first] = recording
        elif recording is None:
            self._computed.add(is_first)
            recording = self._recording(layers, buffers, _do_not_record)
        return _Replay.apply(inputs.hidden, self._anchor, recording)

    def _try_to_record(self, layers: Callable[..., torch.Tensor], buffers: _Buffers) -> _Recording:
        """A recording; what does the work each time, if there is no memory for one."""
        try:
            return self._recording(layers, buffers, self._record)
        except torch.OutOfMemoryError:
            warnings.warn(
                "no memory to record the layers as a CUDA graph; their kernels are started one by "
                "one (--cuda_graph_impl none)",
                stacklevel=2,
            )
            self._record = _do_not_record
            self._recordings.clear()
            return self._recording(layers, buffers, _do_not_record)

    def _recording(
        self, layers: Callable[..., torch.Tensor], buffers: _Buffers, record: Record
    ) -> _Recording:
        kept: list[torch.Tensor] = []
        written: list[torch.nn.Parameter] = []
        hidden = buffers.inputs.hidden
        wanted = [hidden] * hidden.requires_grad + self._parameters

        def forward() -> None:
            with torch.enable_grad():
                kept[:] = [buffers.inputs.run(layers)]
            buffers.output.copy_(kept[0].detach())

        def backward() -> None:
            grads = torch.autograd.grad(kept.pop(), wanted, buffers.grad, allow_unused=True)
            if hidden.requires_grad:
                buffers.input_grad.copy_(grads[0])
            of_parameters = zip(
                self._parameters, grads[len(grads) - len(self._parameters) :], strict=True
            )
            found = [(parameter, grad) for parameter, grad in of_parameters if grad is not None]
            for parameter, grad in found:
                add_gradient(parameter, grad)
            written[:] = [parameter for parameter, _ in found]

        with self._kept_marks():
            return _Recording(
                buffers=buffers, forward=record(forward), backward=record(backward), written=written
            )

    @contextlib.contextmanager
    def _kept_marks(self) -> Iterator[None]:
        """Leaves the marks of main gradients as they are: a recording writes nothing yet."""
        marks = [parameter.overwrites_main_grad for parameter in self._overwritten]
        try:
            yield
        finally:
            for parameter, mark in zip(self._overwritten, marks, strict=True):
                parameter.overwrites_main_grad = mark


def _do_not_record(work: Callable[[], None]) -> Callable[[], None]:
    return work


class _Replay(torch.autograd.Function):
    """Gives autograd a recording for one function."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        recording: _Recording,
    ) -> torch.Tensor:
        ctx.recording = recording
        recording.forward()
        return recording.buffers.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buffers = ctx.recording.buffers
        buffers.grad.copy_(grad)
        ctx.recording.backward()
        for parameter in ctx.recording.written:
            parameter.overwrites_main_grad = False
        grad = buffers.input_grad
        return None if grad is None else grad.detach(), None, None
