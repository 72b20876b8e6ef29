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
class LinearRope:
    """The "linear" scaling: all frequencies are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """Parameters of the "yarn" scaling, which stretches low frequencies and keeps high ones.

    Attributes:
        factor: Longest sequence now / then.
        beta_fast: Turns within the original context above which a frequency stays.
        beta_slow: Turns below which it is divided by `factor`.
        attention_factor: What cosines and sines are multiplied with.
        original_max_position_embeddings: Longest sequence before the scaling, in tokens.
        rounds: Whether the bounds of the blend are whole dimensions.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    original_max_position_embeddings: int
    rounds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """Parameters of the "longrope" scaling of Phi: a divisor for each frequency.

    Attributes:
        short_factor: Divisors for sequences up to the original length.
        long_factor: Divisors for longer ones.
        attention_factor: What cosines and sines are multiplied with.
        original_max_position_embeddings: The original length, in tokens.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A rotary embedding.

    Attributes:
        base: Theta.
        dim: Leading dimensions of a head that turn; the others stay.
        is_interleaved: Whether dimensions 2i and 2i+1 turn together, not i and i + dim / 2.
        scaling: How frequencies are stretched; None for not at all.
    """

    base: float
    dim: int
    is_interleaved: bool = False
    scaling: LinearRope | Llama3Rope | YarnRope | LongRope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTArguments:
    """What a `GPTModel` takes besides its `TransformerConfig`.

    Attributes:
        vocab_size: Rows of the embedding in the checkpoint, not padded.
        max_position_embeddings: Longest sequence the model was made for, in tokens.
        rope: Its rotary embedding; None for learned positions.
        window_rope: That of layers with a sliding window, where it is another one.
        is_tied: Whether the output layer is the embedding.
        embedding_scale: What embeddings are multiplied with, in the dtype of the model.
    """

    vocab_size: int
    max_position_embeddings: int
    rope: Rope | None
    is_tied: bool
    window_rope: Rope | None = None
    embedding_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArguments:
    """What `TransformerConfig` has no words for, or no words that suit every layer.

    Attributes:
        has_sublayer_norms: Outputs of attention and MLP are normalised before they are added.
        delta_net_layers: Layers with a gated delta net in place of attention.
        is_rope_interleaved: As in `Rope`, for latent attention.
        group_scores: Best scores of a group of experts whose sum decides whether the group is
            chosen from; None for what Megatron-Core takes.
    """

    has_sublayer_norms: bool = False
    delta_net_layers: tuple[int, ...] = ()
    is_rope_interleaved: bool = False
    group_scores: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronConfig:
    """A Hugging Face config in Megatron-Core's words.

    Attributes:
        transformer: Fields of `TransformerConfig` by name; only those that the checkpoint decides.
        activation: "silu", "gelu", "gelu_tanh" or "quick_gelu" (x * sigmoid(1.702 x)).
        gpt: Arguments of the model.
        layers: Arguments of its layers.
    """

    transformer: dict[str, Any]
    activation: str
    gpt: GPTArguments
    layers: LayerArguments = LayerArguments()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models that share one weight table.

    The first two functions also take `num_next_tokens`, how many layers of multi-token prediction
    the model is built with; 0 leaves them out.

    Attributes:
        name: What people call it.
        model_types: Values of `model_type` in config.json.
        weight_table: Weights of a model from its config.json; ValueError with the reason when
            the model needs something that is not built.
        megatron_config: Its Megatron-Core configuration, with the same refusals.
        num_next_tokens: Layers of multi-token prediction that its checkpoints hold.
    """

    name: str
    model_types: tuple[str, ...]
    weight_table: Callable[..., WeightTable]
    megatron_config: Callable[..., MegatronConfig]
    num_next_tokens: Callable[[Mapping[str, Any]], int]
