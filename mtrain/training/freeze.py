"""Which parameters are trained: prefixes, regular expressions or a ratio decide `requires_grad`.

The one thing to know: names are those of the whole model (Megatron's, with the layer numbers of
the model, or Hugging Face's), not those of one pipeline stage, so a setting means the same on
every layout. Call it before the chunks are wrapped: data parallelism ignores frozen parameters.
Whoever else freezes parameters, as LoRA does, calls `keep_graph_connected` afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mtrain.config.tuner import TunerConfig
from mtrain.parallel import ParallelLayout, ParallelState

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["freeze_parameters", "global_parameter_names", "keep_graph_connected"]

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class _Named:
    """A parameter as every rank can talk about it."""

    name: str
    stored_name: str
    hf_names: tuple[str, ...]
    num_weights: int

    @property
    def every_name(self) -> tuple[str, ...]:
        """What it may be called."""
        return (self.name, self.stored_name, *self.hf_names)

    @property
    def position(self) -> int:
        """Embedding, then the layers in order, then the rest."""
        if layer := _LAYER.match(self.name):
            return int(layer[1])
        return -1 if self.name.startswith("embedding.") else 10**9


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A prefix or regular expression of the user, with the flag it came from."""

    flag: str
    text: str

    def matches(self, name: str) -> bool:
        if self.flag.endswith("_regex"):
            return re.search(self.text, name) is not None
        return name.startswith(self.text)


def freeze_parameters(
    chunks: Sequence[GPTModel],
    *,
    tuner: TunerConfig,
    state: ParallelState,
    hf_names: Mapping[str, tuple[str, ...]] | None = None,
    stored_names: Mapping[str, str] | None = None,
) -> int:
    """Sets `requires_grad` of every parameter: first what is frozen, then what is trained anyway.

    Args:
        chunks: Bare model chunks of this rank.
        tuner: The `freeze_*` and `trainable_*` settings.
        state: This rank; every rank must call this.
        hf_names: Hugging Face names by Megatron name of the whole model; without it only
            Megatron names can be used. A fused parameter is frozen by the names of all its parts.
        stored_names: Names of norms in Megatron-LM's checkpoints, where they belong to linears, by
            Megatron name; they can be used as well.

    Returns:
        How many weights of the whole model are trained.

    Raises:
        ValueError: A pattern matches nothing, names a part of a fused parameter, or nothing is
            left to train. All ranks raise.
    """
    named = {
        parameter: _Named(
            name,
            (stored_names or {}).get(name, name),
            (hf_names or {}).get(name, ()),
            _num_weights(parameter, state.layout),
        )
        for chunk in chunks
        for name, parameter in global_parameter_names(chunk)
    }
    everywhere = _merge(list(named.values()), state)
    frozen = _matched(everywhere, _patterns(tuner, "freeze"))
    frozen |= _first(everywhere, tuner.freeze_parameters_ratio)
    frozen -= _matched(everywhere, _patterns(tuner, "trainable"))
    for parameter, info in named.items():
        parameter.requires_grad_(info.name not in frozen)
    num_trained = sum(info.num_weights for info in everywhere if info.name not in frozen)
    if not num_trained:
        raise ValueError(
            "all parameters are frozen: name the ones to train with --trainable_parameters"
        )
    keep_graph_connected(chunks)
    return num_trained


def global_parameter_names(chunk: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a chunk under the names that they have in the whole model.

    Layer numbers inside a chunk start at 0. The output layer of a model with tied embeddings on
    the last of several stages is a copy of the embedding, and is called so.
    """
    for name, parameter in chunk.named_parameters():
        if layer := _LAYER.match(name):
            number = chunk.decoder.layers[int(layer[1])].layer_number - 1
            yield f"decoder.layers.{number}.{name[layer.end() :]}", parameter
        elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            yield _EMBEDDING, parameter
        else:
            yield name, parameter


def _num_weights(parameter: torch.nn.Parameter, layout: ParallelLayout) -> int:
    # Megatron-Core marks what is split: `allreduce` False is an expert, shared out over the
    # expert ranks; `tensor_model_parallel` a matrix split over the tensor ranks.
    if not getattr(parameter, "allreduce", True):
        return parameter.numel() * layout.ep_size * layout.etp_size
    if getattr(parameter, "tensor_model_parallel", False):
        return parameter.numel() * layout.tp_size
    return parameter.numel()


def _merge(ours: list[_Named], state: ParallelState) -> list[_Named]:
    """The parameters of all stages in the order of the model, each once."""
    gathered: list[list[_Named]] = [[] for _ in range(state.layout.pp_size)]
    dist.all_gather_object(gathered, ours, group=state.groups.pp)
    unique = {info.name: info for stage in reversed(gathered) for info in stage}
    # The sort is stable: inside a layer the order is that of the module.
    return sorted(unique.values(), key=lambda info: info.position)


def _patterns(tuner: TunerConfig, kind: str) -> list[_Pattern]:
    if kind == "freeze":
        prefixes, regex = tuner.freeze_parameters, tuner.freeze_parameters_regex
    else:
        prefixes, regex = tuner.trainable_parameters, tuner.trainable_parameters_regex
    flag = f"{kind}_parameters"
    patterns = [_Pattern(flag, text) for text in prefixes]
    if regex is not None:
        _check_regex(flag + "_regex", regex)
        patterns.append(_Pattern(flag + "_regex", regex))
    return patterns


def _check_regex(flag: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"--{flag} {text!r} is not a regular expression: {error}") from None


def _matched(parameters: Sequence[_Named], patterns: Sequence[_Pattern]) -> set[str]:
    for pattern in patterns:
        names = (name for info in parameters for name in info.every_name)
        if not any(pattern.matches(name) for name in names):
            raise ValueError(
                f"--{pattern.flag} {pattern.text!r} matches no parameter; there are: "
                + ", ".join(_existing(parameters))
            )
    return {info.name for info in parameters if _matches(info, patterns)}


def _matches(info: _Named, patterns: Sequence[_Pattern]) -> bool:
    names = (info.name, info.stored_name)
    if any(pattern.matches(name) for pattern in patterns for name in names):
        return True
    hits = [any(pattern.matches(name) for pattern in patterns) for name in info.hf_names]
    if any(hits) and not all(hits):
        flag = f"--{patterns[0].flag}"
        parts = ", ".join(info.hf_names)
        raise ValueError(f"{flag} names a part of {info.name}, which is one parameter: {parts}")
    return bool(hits) and all(hits)


def _existing(parameters: Sequence[_Named]) -> list[str]:
    """The names with every layer number replaced by `*`, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", info.name) for info in parameters))


def _first(parameters: Sequence[_Named], ratio: float) -> set[str]:
    """The longest start of the model that holds at most this share of its weights."""
    budget = ratio * sum(info.num_weights for info in parameters)
    names: set[str] = set()
    for info in parameters:
        budget -= info.num_weights
        if budget < 0:
            break
        names.add(info.name)
    return names if ratio > 0 else set()


def keep_graph_connected(chunks: Sequence[GPTModel]) -> None:
    """Lets gradients through recomputed layers above a frozen embedding.

    A recomputed region only takes part in backward when one of its inputs wants a gradient;
    parameters inside do not count.

    Args:
        chunks: Bare model chunks of this rank with `requires_grad` decided.
    """
    for chunk in chunks:
        recomputes = chunk.config.recompute_granularity is not None
        trains = any(parameter.requires_grad for parameter in chunk.decoder.parameters())
        if not (recomputes and trains and chunk.pre_process):
            continue
        if not any(parameter.requires_grad for parameter in chunk.embedding.parameters()):
            chunk.embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
    del module, inputs
    output.requires_grad_(torch.is_grad_enabled())
