"""The table that Llama-like decoders share; a family file says where it departs from it.

`Decoder` holds the facts of one model, read from its config.json. `decoder_family` makes a family
of a function that reads them. Megatron names are those of Megatron-Core's GPTModel, with the
experts stacked in one parameter a layer (mtrain's own expert module).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtrain.bridge import hf_config as config
from mtrain.bridge.families.attention import GroupedQueryAttention
from mtrain.bridge.families.delta_net import DeltaNet
from mtrain.bridge.families.latent_attention import LatentAttention
from mtrain.bridge.families.layers import LayerNames, NormNames
from mtrain.bridge.families.mlp import Experts, gated_mlp_rules
from mtrain.bridge.families.next_tokens import NextTokens
from mtrain.bridge.family import Family, GPTArguments, LayerArguments, MegatronConfig, Rope
from mtrain.bridge.rules import HFTensor, IgnoredKey, Padded, Rule, WeightTable
from mtrain.bridge.storage.quantization import check_quantization

LLAMA_NORMS = NormNames()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The facts about one model that decide its weights and its configuration.

    Attributes:
        num_layers: Layers, those of multi-token prediction not counted.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of dense MLPs.
        vocab_size: Rows of the embedding.
        max_position_embeddings: Longest sequence, in tokens.
        layernorm_epsilon: Added to the mean square in norms.
        rope: Rotary embedding.
        is_tied: Whether the output layer is the embedding.
        attention: Attention of all layers, or of all but those of `delta_net`.
        window_rope: Rotary embedding of windowed layers, where it is another one.
        delta_net: Linear attention of some layers.
        experts: Mixture of experts of some layers.
        norms: Names of the norms.
        has_fused_mlp: One tensor holds gate and up projection of dense MLPs.
        has_zero_centered_norms: Norm weights are stored minus one.
        activation: See `MegatronConfig`.
        embedding_scale: See `GPTArguments`.
        next_tokens: Layers of multi-token prediction.
        transformer: More fields of `TransformerConfig`.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rope: Rope
    is_tied: bool
    attention: GroupedQueryAttention | LatentAttention
    window_rope: Rope | None = None
    delta_net: DeltaNet | None = None
    experts: Experts | None = None
    norms: NormNames = LLAMA_NORMS
    has_fused_mlp: bool = False
    has_zero_centered_norms: bool = False
    activation: str = "silu"
    embedding_scale: float | None = None
    next_tokens: NextTokens | None = None
    transformer: Mapping[str, Any] | None = None

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with an ordinary MLP."""
        return self._other_layers(self.experts)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with ordinary attention."""
        return self._other_layers(self.delta_net)

    def _other_layers(self, part: Experts | DeltaNet | None) -> tuple[int, ...]:
        return tuple(n for n in range(self.num_layers) if part is None or n not in part.layers)


def read_decoder(
    hf_config: Mapping[str, Any],
    *,
    attention: GroupedQueryAttention | LatentAttention,
    rope: Rope,
    activation_key: str = "hidden_act",
    activation_default: str = "silu",
    tied_by_default: bool = False,
    **facts: Any,
) -> Decoder:
    """Reads a decoder from config.json.

    Args:
        hf_config: The config.
        attention: Its attention.
        rope: Its rotary embedding.
        activation_key: Where the activation stands.
        activation_default: What it is where the config does not say.
        tied_by_default: Whether embeddings are tied when the config does not say.
        **facts: Other fields of `Decoder`.

    Raises:
        ValueError: A field is missing or asks for something that is not built.
    """
    check_quantization(hf_config)
    config.refuse(hf_config, "attention_dropout", "set it to 0 in a copy of the checkpoint")
    activation = hf_config.get(activation_key, activation_default)
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: {activation_key!r} {activation!r} is not built; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    read = {
        "num_layers": config.positive_int(hf_config, "num_hidden_layers"),
        "hidden_size": config.positive_int(hf_config, "hidden_size"),
        "ffn_hidden_size": config.positive_int(hf_config, "intermediate_size"),
        "vocab_size": config.positive_int(hf_config, "vocab_size"),
        "max_position_embeddings": config.positive_int(hf_config, "max_position_embeddings"),
        "layernorm_epsilon": config.number(hf_config, "rms_norm_eps"),
        "is_tied": config.boolean(hf_config, "tie_word_embeddings", default=tied_by_default),
        "activation": _ACTIVATIONS[activation],
    }
    return Decoder(**(read | {"attention": attention, "rope": rope} | facts))


_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_attention(
    hf_config: Mapping[str, Any], *, head_dim: int | None = None, **facts: Any
) -> GroupedQueryAttention:
    """Reads grouped-query attention from config.json.

    Args:
        hf_config: The config.
        head_dim: Head size where the config has none; hidden size / heads if None.
        **facts: Other fields of `GroupedQueryAttention`.

    Raises:
        ValueError: Heads cannot share keys and values evenly.
    """
    num_heads = config.positive_int(hf_config, "num_attention_heads")
    num_groups = config.positive_int(hf_config, "num_key_value_heads", num_heads)
    if num_heads % num_groups:
        raise ValueError(
            f"config.json: {num_heads} attention heads cannot share {num_groups} "
            "key-value heads evenly"
        )
    default = head_dim or config.positive_int(hf_config, "hidden_size") // num_heads
    return GroupedQueryAttention(
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=config.positive_int(hf_config, "head_dim", default),
        **facts,
    )


def decoder_family(
    *, name: str, model_types: tuple[str, ...], read: Callable[[Mapping[str, Any]], Decoder]
) -> Family:
    """Makes a family of a function that reads its `Decoder` from config.json."""

    def num_next_tokens(hf_config: Mapping[str, Any]) -> int:
        layers = read(hf_config).next_tokens
        return layers.num_layers if layers else 0

    return Family(
        name=name,
        model_types=model_types,
        weight_table=lambda hf_config, num_next_tokens=0: _weight_table(
            read(hf_config), num_next_tokens
        ),
        megatron_config=lambda hf_config, num_next_tokens=0: _megatron_config(
            read(hf_config), num_next_tokens
        ),
        num_next_tokens=num_next_tokens,
    )


def _next_tokens(decoder: Decoder, num_built: int) -> NextTokens | None:
    """The layers of multi-token prediction that are built."""
    available = decoder.next_tokens.num_layers if decoder.next_tokens else 0
    if num_built > available:
        raise ValueError(
            f"--mtp_num_layers {num_built}: the model has {available} layers of multi-token "
            "prediction"
        )
    if num_built == 0 or decoder.next_tokens is None:
        return None
    if decoder.is_tied:
        raise ValueError(
            "config.json: 'tie_word_embeddings' with multi-token prediction is not built; "
            "use --mtp_num_layers 0"
        )
    return decoder.next_tokens.first(num_built)


def _weight_table(decoder: Decoder, num_next_tokens: int) -> WeightTable:
    ignored = [
        IgnoredKey(
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
            "rotary frequencies of old transformers; computed from config.json",
        )
    ]
    if decoder.is_tied:
        ignored.append(
            IgnoredKey(
                r"lm_head\.weight",
                "tie_word_embeddings: the embedding is used instead",
                copy_of="model.embed_tokens.weight",
            )
        )
    rules = [*_embedding(decoder), *_layers(decoder), *_output(decoder)]
    next_tokens = _next_tokens(decoder, num_next_tokens)
    if decoder.next_tokens:
        ignored += decoder.next_tokens.left_out(num_next_tokens)
    if next_tokens:
        rules += next_tokens.rules(
            decoder.hidden_size, layer_rules=lambda at: _next_layer(decoder, at)
        )
        rules.append(replace(_embedding(decoder)[0], place="mtp", is_duplicate=True))
    return WeightTable(
        num_layers=decoder.num_layers,
        rules=tuple(rules),
        ignored=tuple(ignored),
        forms=decoder.experts.forms if decoder.experts else (),
    )


def _embedding(decoder: Decoder) -> tuple[Rule, ...]:
    embedding = HFTensor("model.embed_tokens.weight", (decoder.vocab_size, decoder.hidden_size))
    return (
        Rule(
            megatron="embedding.word_embeddings.weight",
            hf=(embedding,),
            layout=Padded(),
            split="rows",
            place="first",
        ),
    )


def _output(decoder: Decoder) -> tuple[Rule, ...]:
    # A tied model on one pipeline stage has no output weight at all; on several, the last stage
    # has a copy of the embedding (Megatron-Core's shared embedding).
    name = "model.embed_tokens.weight" if decoder.is_tied else "lm_head.weight"
    return (
        Rule(
            megatron="decoder.final_layernorm.weight",
            hf=(HFTensor("model.norm.weight", (decoder.hidden_size,)),),
            place="last",
        ),
        Rule(
            megatron="output_layer.weight",
            hf=(HFTensor(name, (decoder.vocab_size, decoder.hidden_size)),),
            layout=Padded(),
            split="rows",
            place="last",
            is_duplicate=decoder.is_tied,
        ),
    )


def _layers(decoder: Decoder) -> list[Rule]:
    """Rules of all layers, kind by kind."""
    norms, hidden_size = decoder.norms, decoder.hidden_size
    attended = LayerNames(numbers=decoder.attention_layers)
    rules = [*decoder.attention.rules(attended, hidden_size, input_norm=norms.before_attention)]
    if decoder.delta_net:
        linear = LayerNames(numbers=decoder.delta_net.layers)
        rules += decoder.delta_net.rules(linear, hidden_size, input_norm=norms.before_attention)
    rules += _dense_mlp(decoder, LayerNames(numbers=decoder.dense_layers))
    if decoder.experts:
        sparse = LayerNames(numbers=decoder.experts.layers)
        rules += decoder.experts.rules(sparse, hidden_size, norm=norms.before_mlp)
    everywhere = LayerNames(numbers=tuple(range(decoder.num_layers)))
    return [*rules, *norms.sublayer_rules(everywhere, hidden_size)]


def _dense_mlp(decoder: Decoder, at: LayerNames) -> tuple[Rule, ...]:
    return gated_mlp_rules(
        at,
        hidden_size=decoder.hidden_size,
        width=decoder.ffn_hidden_size,
        norm=decoder.norms.before_mlp,
        is_fused=decoder.has_fused_mlp,
    )


def _next_layer(decoder: Decoder, at: LayerNames) -> list[Rule]:
    """Rules of a layer of multi-token prediction: ordinary attention, the MLP of the last layer."""
    norms, hidden_size = decoder.norms, decoder.hidden_size
    rules = [*decoder.attention.rules(at, hidden_size, input_norm=norms.before_attention)]
    if decoder.experts and decoder.num_layers - 1 in decoder.experts.layers:
        rules += decoder.experts.rules(at, hidden_size, norm=norms.before_mlp)
    else:
        rules += _dense_mlp(decoder, at)
    return [*rules, *norms.sublayer_rules(at, hidden_size)]


def _megatron_config(decoder: Decoder, num_next_tokens: int) -> MegatronConfig:
    transformer: dict[str, Any] = {
        "num_layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "ffn_hidden_size": decoder.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": decoder.layernorm_epsilon,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        **decoder.attention.transformer(decoder.num_layers),
    }
    if decoder.has_zero_centered_norms:
        transformer["layernorm_zero_centered_gamma"] = True
    if decoder.experts:
        transformer |= decoder.experts.transformer(decoder.num_layers)
    if decoder.delta_net:
        transformer |= decoder.delta_net.transformer()
    if _next_tokens(decoder, num_next_tokens):
        transformer["mtp_num_layers"] = num_next_tokens
    return MegatronConfig(
        transformer=transformer | dict(decoder.transformer or {}),
        activation=decoder.activation,
        gpt=GPTArguments(
            vocab_size=decoder.vocab_size,
            max_position_embeddings=decoder.max_position_embeddings,
            rope=decoder.rope,
            window_rope=decoder.window_rope,
            is_tied=decoder.is_tied,
            embedding_scale=decoder.embedding_scale,
        ),
        layers=LayerArguments(
            has_sublayer_norms=decoder.norms.has_sublayer_norms,
            delta_net_layers=decoder.delta_net.layers if decoder.delta_net else (),
            is_rope_interleaved=decoder.rope.is_interleaved,
            group_scores=decoder.experts.group_scores if decoder.experts else None,
        ),
    )
