"""Layers whose kernels are recorded once and replayed for every micro-batch after that.

A layer is about fifty kernels, and starting each from Python takes longer than small kernels run.
Packs of one length always start the same ones, so a CUDA graph holds those of all layers forward,
another those backward.

The one thing to know: a recording reads and writes memory that stays where it is (`LayerBuffers`),
so a micro-batch is copied there and its results are read there. It is of one kind of micro-batch
(`MicroBatchKind`), and of the first of a step or of later ones, since the first writes gradients
over what the step before left. Nothing is recorded before one step was computed as it is, which
compiles kernels.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock

from mtrain.model.delta_net import GatedDeltaNet
from mtrain.model.dispatch import LocalTokenDispatcher
from mtrain.model.documents import PackedDocuments, has_blocks_everywhere
from mtrain.model.gpt import LanguageModel
from mtrain.model.layer_buffers import LayerBuffers, LayerInputs, MicroBatchKind
from mtrain.platform.cuda_graphs import Record
from mtrain.platform.device import has_gpu
from mtrain.platform.weight_gradients import add_gradient, stand_in_gradient

__all__ = ["replay_layers", "why_not_replayed"]

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
    return model.decoder.replays.parameters


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
        layers = functools.partial(super().forward, attention_mask=attention_mask, **others)
        inputs = LayerInputs(
            hidden=hidden_states,
            rotary=rotary_pos_emb,
            padding=padding_mask,
            packed=packed_seq_params,
        )
        if not torch.is_grad_enabled():
            return inputs.run(layers)
        assert inputs.packed is not None, "gradients of rows would get lost"
        return self.replays(layers, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """The layers of one kind of micro-batch, forward and backward.

    Attributes:
        buffers: Where they read and write.
        forward: Fills `output`.
        backward: Adds to main gradients and fills `input_grad`.
        written: The parameters to whose main gradients it adds.
    """

    buffers: LayerBuffers
    forward: Callable[[], None]
    backward: Callable[[], None]
    written: list[torch.nn.Parameter]


class _Replays:
    """Recordings of a block of layers, made when they are wanted.

    Attributes:
        parameters: What is trained of the layers.

    Args:
        block: The layers, with main gradients.
        record: See `replay_layers`.
    """

    def __init__(self, block: TransformerBlock, record: Record) -> None:
        self._config = block.config
        self._knows_no_longest = has_blocks_everywhere(block.config)
        self._record = record
        self.parameters = [p for p in block.parameters() if p.requires_grad]
        self._overwritten = [p for p in self.parameters if hasattr(p, "overwrites_main_grad")]
        for parameter in self.parameters:
            # At once, so that gradients of all layers need not be kept.
            parameter.register_hook(functools.partial(self._take_gradient, parameter))
        self._stream: torch.cuda.Stream | None = None
        self._buffers: dict[MicroBatchKind, LayerBuffers] = {}
        self._recordings: dict[tuple[MicroBatchKind, bool], _Recording] = {}
        self._computed: set[bool] = set()
        # Hidden states want no gradient where the embedding is frozen; the layers do.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, layers: Callable[..., torch.Tensor], inputs: LayerInputs) -> torch.Tensor:
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
            recording = self._try_to_record(layers, buffers)
            self._recordings[kind, is_first] = recording
        elif recording is None:
            self._computed.add(is_first)
            recording = self._recording(layers, buffers, _do_not_record)
        return _Replay.apply(inputs.hidden, self._anchor, recording)

    def _try_to_record(
        self, layers: Callable[..., torch.Tensor], buffers: LayerBuffers
    ) -> _Recording:
        """A recording; what does the work each time, if there is no memory for one, say."""
        try:
            return self._recording(layers, buffers, self._record)
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
            return self._recording(layers, buffers, _do_not_record)

    def _recording(
        self, layers: Callable[..., torch.Tensor], buffers: LayerBuffers, record: Record
    ) -> _Recording:
        kept: list[torch.Tensor] = []
        written: list[torch.nn.Parameter] = []
        hidden = buffers.inputs.hidden
        wanted = [hidden] * hidden.requires_grad + self.parameters

        def forward() -> None:
            with torch.enable_grad():
                kept[:] = [buffers.inputs.run(layers)]
            buffers.output.copy_(kept[0].detach())

        def backward() -> None:
            self._stream = torch.cuda.current_stream() if hidden.is_cuda else None
            grads = torch.autograd.grad(kept.pop(), wanted, buffers.grad, allow_unused=True)
            if hidden.requires_grad:
                buffers.input_grad.copy_(grads[0])
            written[:] = [
                tensor
                for tensor, grad in zip(wanted, grads, strict=True)
                if grad is not None and tensor is not hidden
            ]

        with self._kept_marks():
            return _Recording(
                buffers=buffers, forward=record(forward), backward=record(backward), written=written
            )

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
