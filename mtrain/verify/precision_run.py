"""The precision test of a loaded model against its Hugging Face folder, on all ranks.

The one thing to know: the first rank alone reads texts, runs the Hugging Face model and compares;
what comes out of that, a result or an error, all ranks get.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelState
from mtrain.verify.hf_next_tokens import missing_class
from mtrain.verify.hf_outputs import hf_outputs, judge_device
from mtrain.verify.megatron_outputs import megatron_outputs
from mtrain.verify.precision import ModelOutputs, compare_outputs
from mtrain.verify.report import PrecisionReport
from mtrain.verify.texts import TokenText, encode_texts

# What transformers and PEFT raise for folders that they cannot make a model of.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    ImportError,
    SafetensorError,
)
_PEFT_LEAVES_OUT = "PEFT leaves out the part of the adapter that changes it"


def run_precision_test(
    chunks: Sequence[LanguageModel],
    *,
    state: ParallelState,
    hf_folder: Path,
    adapter_folder: Path | None,
    tokenizer_folder: Path,
    vocab_size: int,
    dtype: torch.dtype,
    stored_dtype: torch.dtype | None = None,
    left_out: Sequence[str] = (),
    adapts_next_tokens: bool = False,
) -> PrecisionReport:
    """Compares loaded chunks with the Hugging Face model; every rank calls it.

    Args:
        chunks: Chunks of this rank, built in `dtype`, in any layout, with or without adapters.
        state: This rank.
        hf_folder: The Hugging Face checkpoint to compare with. The first rank loads the whole of
            it, onto its GPU if it has room there, while the others wait.
        adapter_folder: A PEFT adapter to put on it; None where chunks have none.
        tokenizer_folder: Where the tokenizer is, if there is one.
        vocab_size: Words of the model without padding.
        dtype: What both models compute in.
        stored_dtype: What the weights of the chunks were rounded to; None if they were not.
        left_out: Patterns for the names of weights that the Hugging Face class does not have.
        adapts_next_tokens: Whether the adapter changes multi-token prediction, which PEFT does not.

    Returns:
        The same report on every rank.

    Raises:
        ValueError: On every rank: the Hugging Face model, the adapter or the tokenizer does not
            load, or is of another size.
    """
    assert all(chunk.config.params_dtype == dtype for chunk in chunks)
    texts = _on_first_rank(lambda: encode_texts(tokenizer_folder, vocab_size=vocab_size), state)
    ours = megatron_outputs(chunks, texts, state=state)
    num_next_tokens = chunks[0].config.mtp_num_layers or 0
    problem = None
    if num_next_tokens:
        problem = _PEFT_LEAVES_OUT if adapts_next_tokens else missing_class()

    def compare() -> PrecisionReport:
        device = judge_device(hf_folder, dtype=dtype, device=state.device)
        theirs = hf_outputs(
            hf_folder,
            texts,
            adapter_folder=adapter_folder,
            dtype=dtype,
            stored_dtype=stored_dtype,
            left_out=left_out,
            num_next_tokens=0 if problem else num_next_tokens,
            device=device,
        )
        if problem is None:
            return compare_outputs(ours, theirs, texts, dtype=dtype)
        return _compare_without_next_tokens(ours, theirs, texts, dtype, problem)

    return _on_first_rank(compare, state)


def _compare_without_next_tokens(
    ours: Sequence[ModelOutputs],
    theirs: Sequence[ModelOutputs],
    texts: Sequence[TokenText],
    dtype: torch.dtype,
    problem: str,
) -> PrecisionReport:
    without = [dataclasses.replace(outputs, next_tokens=None) for outputs in ours]
    not_compared = [f"multi-token prediction, because {problem}"]
    return compare_outputs(without, theirs, texts, dtype=dtype, not_compared=not_compared)


def _on_first_rank(work: Callable[[], Any], state: ParallelState) -> Any:
    """What `work` returns on the first rank, on every rank.

    Raises:
        ValueError: On every rank, what was wrong on the first.
    """
    answer: list[Any] = [None, None]
    if state.is_first_rank:
        try:
            answer[0] = work()
        except _LOADING_ERRORS as error:
            reason = " ".join(str(error).split())
            answer[1] = f"the precision test cannot be made: {type(error).__name__}: {reason}"
    dist.broadcast_object_list(answer, src=0, group=state.world.group, device=state.device)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]
