"""Layers whose kernels are recorded once and replayed for every micro-batch after that.

A layer is about fifty kernels, and starting each from Python takes longer than small kernels run.
Packs of one length always start the same ones, so CUDA graphs hold those of a segment of layers:
one forward, one backward. Data parallelism works between segments; without any there is only one.

The one thing to know: a recording reads and writes memory that stays where it is (`LayerBuffers`),
so a micro-batch is copied there and its results are read there. It is of one kind of micro-batch
(`MicroBatchKind`), and of the first of a step or of later ones, since the first writes gradients
over what the step before left. Nothing is recorded before one step was computed as it is, which
compiles kernels.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from mtrain.model.delta_net import GatedDeltaNet
from mtrain.model.dispatch import LocalTokenDispatcher
from mtrain.model.documents import PackedDocuments, has_blocks_everywhere
from mtrain.model.gpt import LanguageModel
from mtrain.model.layer_buffers import LayerBuffers, LayerInputs, MicroBatchKind
from mtrain.model.layer_segments import LayerSegment, SegmentedWork, split_layers
from mtrain.platform.cuda_graphs import Record
from mtrain.platform.device import has_gpu
from mtrain.platform.weight_gradients import add_gradient, stand_in_gradient

__all__ = ["replay_layers", "why_not_replayed"]

_BALANCE_LOSSES = {"aux_loss", "seq_aux_loss", "none"}
# Gradients of a segment are sent when all its layers have theirs.
_SEGMENT_LENGTH = 4


class DataParallelism(Protocol):
    """What it does beside layers that nobody watches (`mtrain.training.data_parallel`)."""

    @property
    def overlaps(self) -> bool:
        """Whether it works while layers do."""

    def leave(self, parameters: list[torch.nn.Parameter]) -> None:
        """Watches no longer for gradients of these."""

    def wait_for_parameters(self, modules: list[torch.nn.Module]) -> None:
        """Is called before modules read their parameters."""

    def gradients_are_added(self, parameters: list[torch.nn.Parameter]) -> None:
        """Is called when a micro-batch has added to the main gradients of these."""


def replay_layers(
    model: LanguageModel,
    record: Record,
    data_parallelism: DataParallelism,
    *,
    segment_length: int = _SEGMENT_LENGTH,
) -> None:
    """Lets training on packs replay the layers of a model.

    Args:
        model: The only chunk of its rank; see `why_not_replayed`. All that is trained has a
            `main_grad`, which must stay where it is, as must the parameters.
        record: Of `mtrain.platform.cuda_graphs`.
        data_parallelism: Of the model.
        segment_length: Layers that are started as one, where data parallelism overlaps.
    """
    length = segment_length if data_parallelism.overlaps else len(model.decoder.layers)
    segments = split_layers(model.decoder, length=length)
    model.decoder.__class__ = ReplayedBlock
    model.decoder.replays = _Replays(model.config, segments, record, data_parallelism)


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
        "there is no GPU": not has_gpu(),
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
        if not torch.is_grad_enabled():
            return super().forward(
                hidden_states,
                attention_mask,
                packed_seq_params=packed_seq_params,
                rotary_pos_emb=rotary_pos_emb,
                padding_mask=padding_mask,
                **others,
            )
        assert packed_seq_params is not None, "gradients of rows would get lost"
        inputs = LayerInputs(
            hidden=hidden_states,
            rotary=rotary_pos_emb,
            padding=padding_mask,
            packed=packed_seq_params,
        )
        return self.replays(inputs)


@dataclass(frozen=True, slots=True)
class _Part:
    """A segment of one kind of micro-batch, forward and backward.

    Attributes:
        segment: The layers.
        forward: Of the last one, fills the output in the buffers.
        backward: Adds to main gradients; of the first one, fills the input's gradient.
        written: The parameters to whose main gradients it adds.
    """

    segment: LayerSegment
    forward: Callable[[], None]
    backward: Callable[[], None]
    written: list[torch.nn.Parameter]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """All layers of one kind of micro-batch."""

    buffers: LayerBuffers
    parts: list[_Part]


class _Replays:
    """Recordings of all layers, made when they are wanted.

    Args:
        config: Model shape and attention kernel.
        segments: The layers, with main gradients.
        record: See `replay_layers`.
        data_parallelism: Likewise.
    """

    def __init__(
        self,
        config: TransformerConfig,
        segments: list[LayerSegment],
        record: Record,
        data_parallelism: DataParallelism,
    ) -> None:
        self._config = config
        self._knows_no_longest = has_blocks_everywhere(config)
        self._segments = segments
        self._record = record
        self._data_parallelism = data_parallelism
        # Each once, also one that layers share.
        trained = itertools.chain.from_iterable(segment.parameters for segment in segments)
        parameters = list(dict.fromkeys(trained))
        # Somebody else's hook would be called in a recording only.
        data_parallelism.leave(parameters)
        self._overwritten = [p for p in parameters if hasattr(p, "overwrites_main_grad")]
        for parameter in parameters:
            # At once, so that gradients of all layers need not be kept.
            parameter.register_hook(functools.partial(self._take_gradient, parameter))
        self._stream: torch.cuda.Stream | None = None
        self._buffers: dict[MicroBatchKind, LayerBuffers] = {}
        self._recordings: dict[tuple[MicroBatchKind, bool], _Recording] = {}
        self._computed: set[bool] = set()
        # Hidden states want no gradient where the embedding is frozen; the layers do.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, inputs: LayerInputs) -> torch.Tensor:
        """Output of the layers, [seq, 1, hidden]."""
        # One that no micro-batch uses keeps its mark.
        is_first = all(parameter.overwrites_main_grad for parameter in self._overwritten)
        kind = MicroBatchKind.of(inputs, knows_no_longest=self._knows_no_longest)
        if kind not in self._buffers:
            self._buffers[kind] = LayerBuffers(kind, inputs, self._config)
        buffers = self._buffers[kind]
        buffers.fill(inputs)
        recording = self._recordings.get((kind, is_first))
        if recording is None and is_first in self._computed:
            recording = self._try_to_record(buffers)
            self._recordings[kind, is_first] = recording
        elif recording is None:
            self._computed.add(is_first)
            recording = self._recording(buffers, _do_not_record)
        return _Replay.apply(inputs.hidden, self._anchor, recording, self._data_parallelism)

    def _try_to_record(self, buffers: LayerBuffers) -> _Recording:
        """A recording; what does the work each time, if there is no memory for one, say."""
        # Modules that wait while they are recorded would wait in every replay.
        for segment in self._segments:
            self._data_parallelism.wait_for_parameters(segment.modules)
        try:
            return self._recording(buffers, self._record)
        except RuntimeError as error:
            # A recording runs nothing, so nothing is lost.
            reason = str(error).partition("\n")[0]
            warnings.warn(
                "layers could not be recorded as a CUDA graph, so their kernels are started one by "
                f"one (--cuda_graph_impl none): {reason}",
                stacklevel=2,
            )
            self._record = _do_not_record
            self._recordings.clear()
            return self._recording(buffers, _do_not_record)

    def _recording(self, buffers: LayerBuffers, record: Record) -> _Recording:
        work = SegmentedWork(self._segments, buffers)
        numbers = range(len(self._segments))

        def backward(index: int) -> None:
            self._stream = torch.cuda.current_stream() if buffers.grad.is_cuda else None
            work.backward(index)

        with self._kept_marks():
            # In the order in which they are replayed: they take memory from each other.
            forwards = [record(functools.partial(work.forward, index)) for index in numbers]
            backwards = [record(functools.partial(backward, index)) for index in reversed(numbers)]
        ways = zip(self._segments, forwards, reversed(backwards), work.written, strict=True)
        parts = [_Part(*way) for way in ways]
        return _Recording(buffers=buffers, parts=parts)

    def _take_gradient(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
        """Adds a gradient to the main gradient; what is handed on takes no memory."""
        # Autograd calls from a thread of its own, and only one stream is recorded.
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            add_gradient(parameter, grad)
        return stand_in_gradient(parameter)

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
    """Gives autograd a recording as one function."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        recording: _Recording,
        data_parallelism: DataParallelism,
    ) -> torch.Tensor:
        ctx.recording, ctx.data_parallelism = recording, data_parallelism
        for part in recording.parts:
            data_parallelism.wait_for_parameters(part.segment.modules)
            part.forward()
        return recording.buffers.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buffers = ctx.recording.buffers
        buffers.grad.copy_(grad)
        for part in reversed(ctx.recording.parts):
            part.backward()
            for parameter in part.written:
                parameter.overwrites_main_grad = False
            ctx.data_parallelism.gradients_are_added(part.written)
        grad = buffers.input_grad
        return None if grad is None else grad.detach(), None, None, None
