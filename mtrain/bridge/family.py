"""What a model family is to the bridge: a weight table and a Megatron-Core configuration.

Both are functions of the plain dictionary in `config.json`. No torch and no transformers here, so
that checks and plans answer at once, and a checkpoint's own code is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtrain.bridge.rules import WeightTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Parameters of the "llama3" rotary scaling: low frequencies are divided by `factor`.

    Source: the `rope_scaling` of a Llama 3.1 config.json.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTArguments:
    """What a `GPTModel` takes besides its `TransformerConfig`.

    Attributes:
        vocab_size: Rows of the embedding in the checkpoint, not padded.
        max_position_embeddings: Longest sequence the model was made for, in tokens.
        rotary_base: Theta of the rotary embedding.
        rope_scaling: Scaling of its frequencies; None for none.
        is_tied: Whether the output layer is the embedding.
    """

    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: Llama3Rope | None
    is_tied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronConfig:
    """A Hugging Face config in Megatron-Core's words.

    Attributes:
        transformer: Fields of `TransformerConfig` by name; only those that the checkpoint decides.
        activation: Name of the activation in torch.nn.functional.
        gpt: Arguments of the model.
    """

    transformer: dict[str, Any]
    activation: str
    gpt: GPTArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models that share one weight table.

    Attributes:
        name: What people call it.
        model_types: Values of `model_type` in config.json.
        weight_table: Weights of a model from its config.json; ValueError with the reason when
            the model needs something that is not built.
        megatron_config: Its Megatron-Core configuration, with the same refusals.
    """

    name: str
    model_types: tuple[str, ...]
    weight_table: Callable[[Mapping[str, Any]], WeightTable]
    megatron_config: Callable[[Mapping[str, Any]], MegatronConfig]
