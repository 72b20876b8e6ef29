"""Runs the chunks of all ranks on a text and brings every layer's output to the first rank.

The one thing to know: no pipeline schedule. Chunks run one after the other in the order of the
model, and what each of them computes is broadcast inside the pipeline group: the next chunk takes
its input from there and the first rank its copy. Layers of multi-token prediction run when there
are labels, so the last chunk runs again with some.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState
from mtrain.verify.precision import ModelOutputs, NextTokenOutputs
from mtrain.verify.texts import TokenText


@torch.no_grad()
def megatron_outputs(
    chunks: Sequence[LanguageModel], texts: Sequence[TokenText], *, state: ParallelState
) -> list[ModelOutputs]:
    """What the model makes of each text. Every rank calls it with the same texts.

    Args:
        chunks: Chunks of this rank, in any layout, with or without adapters.
        texts: One row each, not packed. Data-parallel ranks all run all of them.
        state: This rank.

    Returns:
        One a text on global rank 0; nothing on the others.
    """
    num_layers = _num_layers(chunks, state)
    with _evaluating(chunks):
        outputs = [_outputs(chunks, text, num_layers, state) for text in texts]
    return [found for found in outputs if found is not None]


def _num_layers(chunks: Sequence[LanguageModel], state: ParallelState) -> list[list[int]]:
    """Layers of each chunk of each pipeline rank."""
    ours = [len(chunk.decoder.layers) for chunk in chunks]
    everyone: list[list[int]] = [[]] * state.layout.pp_size
    dist.all_gather_object(everyone, ours, group=state.groups.pp)
    return everyone


@contextmanager
def _evaluating(chunks: Sequence[LanguageModel]) -> Iterator[None]:
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(chunks, modes, strict=True):
            chunk.train(was_training)


def _outputs(
    chunks: Sequence[LanguageModel],
    text: TokenText,
    num_layers: list[list[int]],
    state: ParallelState,
) -> ModelOutputs | None:
    layout, config = state.layout, chunks[0].config
    num_tokens = len(text.input_ids)
    # Sequence parallelism cuts the row into equal parts. What is added comes last, where the
    # causal mask hides it from the text.
    num_added = -num_tokens % layout.tp_size
    input_ids = F.pad(text.input_ids, (0, num_added)).to(state.device)[None]
    seq_part = input_ids.shape[1] // (layout.tp_size if config.sequence_parallel else 1)

    found = []
    hidden_states, output = None, None
    for index, chunk in enumerate(chunks):
        for pp_rank in range(layout.pp_size):
            shape = (num_layers[pp_rank][index], seq_part, config.hidden_size)
            if pp_rank == state.coordinates.pp_rank:
                hidden_states, output = _run(chunk, input_ids, hidden_states)
                assert hidden_states.shape == shape
            else:
                hidden_states = torch.empty(shape, device=state.device)
            dist.broadcast(hidden_states, group=state.groups.pp, group_src=pp_rank)
            found.append(hidden_states)
    logits = _broadcast_logits(
        _whole_logits(output[0], chunks[-1], state) if state.is_last_stage else None,
        (input_ids.shape[1], chunks[-1].num_words),
        state,
    )
    joined = _whole_rows(torch.cat(found), config, state)
    next_tokens = None
    if config.mtp_num_layers:
        before = found[-2] if len(found) > 1 else None
        next_tokens = _next_tokens(chunks[-1], input_ids, before, state)
    if not state.is_first_rank:
        return None
    return ModelOutputs(
        hidden_states=joined[:, :num_tokens].cpu(),
        logits=logits[:num_tokens].cpu(),
        next_tokens=None if next_tokens is None else _cut(next_tokens, num_tokens),
    )


def _run(
    chunk: LanguageModel, input_ids: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one chunk.

    Args:
        chunk: The chunk.
        input_ids: int64 [1, seq].
        before: float32 [layers, seq_part, hidden], outputs of the chunk before it.

    Returns:
        float32 [layers, seq_part, hidden], outputs of its layers; and what the chunk returns.
    """
    _set_input(chunk, before)
    found: list[torch.Tensor] = []
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    with ExitStack() as hooks:
        for layer in chunk.decoder.layers:
            hooks.callback(layer.register_forward_hook(_keep_in(found)).remove)
        output = chunk(input_ids, position_ids)
    return torch.stack(found), output


def _set_input(chunk: LanguageModel, before: torch.Tensor | None) -> None:
    if not chunk.pre_process:
        assert before is not None
        chunk.set_input_tensor(before[-1][:, None].to(chunk.config.pipeline_dtype))


def _keep_in(found: list[torch.Tensor]) -> Callable[..., None]:
    """A hook that appends a layer's output as float32 [seq_part, hidden]."""

    def keep(_layer: object, _inputs: object, output: tuple[torch.Tensor, object]) -> None:
        # A copy: without gradients, Megatron-Core works in place.
        found.append(output[0][:, 0].to(torch.float32, copy=True))

    return keep


def _next_tokens(
    chunk: LanguageModel,
    input_ids: torch.Tensor,
    before: torch.Tensor | None,
    state: ParallelState,
) -> NextTokenOutputs:
    """Multi-token prediction, on every rank.

    Args:
        chunk: The last chunk of this rank; on the last stage it has the layers.
        input_ids: int64 [1, seq].
        before: float32 [layers, seq_part, hidden], outputs of the chunk before the last one.
        state: This rank.
    """
    config, seq = chunk.config, input_ids.shape[1]
    seq_part = seq // (state.layout.tp_size if config.sequence_parallel else 1)
    shape = (config.mtp_num_layers, seq_part, config.hidden_size)
    hidden_states, logits = torch.empty(shape, device=state.device), None
    if state.is_last_stage:
        hidden_states, outputs = _run_next_tokens(chunk, input_ids, before)
        assert hidden_states.shape == shape
        logits = torch.stack([_whole_logits(output, chunk, state) for output in outputs])
    dist.broadcast(hidden_states, group=state.groups.pp, group_src=state.layout.pp_size - 1)
    return NextTokenOutputs(
        hidden_states=_whole_rows(hidden_states, config, state),
        logits=_broadcast_logits(logits, (config.mtp_num_layers, seq, chunk.num_words), state),
    )


def _run_next_tokens(
    chunk: LanguageModel, input_ids: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs the last chunk as training does.

    Returns:
        float32 [layers, seq_part, hidden], outputs of the decoder layers in multi-token prediction;
        and of each the part [seq, padded_vocab / tp_size] of the logits.
    """
    _set_input(chunk, before)
    found: list[torch.Tensor] = []
    normalised: list[torch.Tensor] = []

    def keep_normalised(_layer: object, _inputs: object, output: tuple[Any, ...]) -> None:
        normalised.append(output[0].clone())

    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    with ExitStack() as hooks:
        for layer in chunk.mtp.layers:
            hook = layer.transformer_layer.register_forward_hook(_keep_in(found))
            hooks.callback(hook.remove)
            hooks.callback(layer.register_forward_hook(keep_normalised).remove)
        # Whatever the labels are, the layers run.
        chunk(input_ids, position_ids, labels=input_ids)
    return torch.stack(found), [chunk.output_layer(hidden)[0][:, 0] for hidden in normalised]


def _cut(outputs: NextTokenOutputs, num_tokens: int) -> NextTokenOutputs:
    """The first tokens of the outputs, on the CPU."""
    return NextTokenOutputs(
        hidden_states=outputs.hidden_states[:, :num_tokens].cpu(),
        logits=outputs.logits[:, :num_tokens].cpu(),
    )


def _whole_logits(part: torch.Tensor, chunk: LanguageModel, state: ParallelState) -> torch.Tensor:
    """Logits float32 [seq, vocab] without padded words, of the part of each tensor-parallel rank.

    Args:
        part: [seq, padded_vocab / tp_size].
        chunk: The last chunk.
        state: This rank.
    """
    whole = _gather_over_tp(part.float(), state, axis=1)
    return whole[:, : chunk.num_words].contiguous()


def _broadcast_logits(
    logits: torch.Tensor | None, shape: tuple[int, ...], state: ParallelState
) -> torch.Tensor:
    """Logits of the last stage on every rank."""
    if logits is None:
        logits = torch.empty(shape, device=state.device)
    dist.broadcast(logits, group=state.groups.pp, group_src=state.layout.pp_size - 1)
    return logits


def _whole_rows(
    hidden_states: torch.Tensor, config: TransformerConfig, state: ParallelState
) -> torch.Tensor:
    """[layers, seq, hidden] of the part [layers, seq_part, hidden] of each rank."""
    if not config.sequence_parallel:
        return hidden_states
    return _gather_over_tp(hidden_states, state, axis=1)


def _gather_over_tp(tensor: torch.Tensor, state: ParallelState, *, axis: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(state.layout.tp_size)]
    dist.all_gather(parts, tensor.contiguous(), group=state.groups.tp)
    return torch.cat(parts, dim=axis)
