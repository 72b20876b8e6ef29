"""Runs the chunks of all ranks on a text and brings every layer's output to the first rank.

The one thing to know: no pipeline schedule. Chunks run one after the other in the order of the
model, and what each of them computes is broadcast inside the pipeline group: the next chunk takes
its input from there and the first rank its copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState
from mtrain.verify.precision import ModelOutputs
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
    logits = _logits(output, input_ids.shape[1], chunks[-1].num_words, state)
    joined = torch.cat(found)
    if config.sequence_parallel:
        joined = _gather_over_tp(joined, state, axis=1)
    if not state.is_first_rank:
        return None
    return ModelOutputs(
        hidden_states=joined[:, :num_tokens].cpu(), logits=logits[:num_tokens].cpu()
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
    if not chunk.pre_process:
        assert before is not None
        chunk.set_input_tensor(before[-1][:, None].to(chunk.config.pipeline_dtype))
    found: list[torch.Tensor] = []

    def keep(_layer: object, _inputs: object, output: tuple[torch.Tensor, object]) -> None:
        # A copy: without gradients, Megatron-Core works in place.
        found.append(output[0][:, 0].to(torch.float32, copy=True))

    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    with ExitStack() as hooks:
        for layer in chunk.decoder.layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        output = chunk(input_ids, position_ids)
    return torch.stack(found), output


def _logits(
    output: torch.Tensor | None, seq: int, num_words: int, state: ParallelState
) -> torch.Tensor:
    """Logits float32 [seq, vocab] without padded words, on every rank.

    Args:
        output: What the last chunk of this rank returned; on the last stage its part of the
            logits [1, seq, padded_vocab / tp_size].
        seq: Length of the row.
        num_words: Words without padding.
        state: This rank.
    """
    if state.is_last_stage:
        assert output is not None
        whole = _gather_over_tp(output[0].float(), state, axis=1)
        logits = whole[:, :num_words].contiguous()
    else:
        logits = torch.empty(seq, num_words, device=state.device)
    dist.broadcast(logits, group=state.groups.pp, group_src=state.layout.pp_size - 1)
    return logits


def _gather_over_tp(tensor: torch.Tensor, state: ParallelState, *, axis: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(state.layout.tp_size)]
    dist.all_gather(parts, tensor.contiguous(), group=state.groups.tp)
    return torch.cat(parts, dim=axis)
