"""The table that Llama-like decoders share; a family file says where it departs from it.

`Decoder` holds the facts of one model, read from its config.json. `decoder_family` makes a family
of a function that reads them. Megatron names are those of Megatron-Core's GPTModel, with the
experts stacked in one parameter a layer (mtrain's own expert module).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtrain.bridge import hf_config as config
from mtrain.bridge.family import Family, GPTArguments, Llama3Rope, MegatronConfig
from mtrain.bridge.rules import (
    HFTensor,
    IgnoredKey,
    Interleaved,
    Padded,
    Rule,
    WeightTable,
)

_L = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_EXPERT = _H + "mlp.experts.{expert}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture-of-experts part of a decoder.

    Attributes:
        num_experts: Experts in each such layer.
        ffn_hidden_size: Width of one expert.
        topk: Experts that a token goes to.
        renormalises: Whether the weights of a token's experts sum to one.
        layers: Layers that have experts; the others are dense.
    """

    num_experts: int
    ffn_hidden_size: int
    topk: int
    renormalises: bool
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The facts about one model that decide its weights and its configuration."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: Llama3Rope | None
    is_tied: bool
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    experts: Experts | None = None

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with an ordinary MLP."""
        sparse = self.experts.layers if self.experts else ()
        return tuple(layer for layer in range(self.num_layers) if layer not in sparse)


def read_decoder(
    hf_config: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    has_qkv_bias: bool = False,
    has_qk_norm: bool = False,
    experts: Experts | None = None,
) -> Decoder:
    """Reads a decoder from config.json.

    Args:
        hf_config: The config.
        head_dim: Head size where the config has none; hidden size / heads if None.
        has_qkv_bias: Query, key and value projections have a bias.
        has_qk_norm: Queries and keys are normalised, head by head.
        experts: Mixture of experts, if it is one.

    Raises:
        ValueError: A field is missing or asks for something that is not built.
    """
    config.refuse(hf_config, "quantization_config", "use the checkpoint that is not quantised")
    config.refuse(hf_config, "attention_dropout", "set it to 0 in a copy of the checkpoint")
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json: 'hidden_act' {activation!r} is not built; supported: silu")
    hidden_size = config.positive_int(hf_config, "hidden_size")
    num_heads = config.positive_int(hf_config, "num_attention_heads")
    num_query_groups = config.positive_int(hf_config, "num_key_value_heads", num_heads)
    if num_heads % num_query_groups:
        raise ValueError(
            f"config.json: {num_heads} attention heads cannot share {num_query_groups} "
            "key-value heads evenly"
        )
    return Decoder(
        num_layers=config.positive_int(hf_config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.positive_int(hf_config, "intermediate_size"),
        num_attention_heads=num_heads,
        num_query_groups=num_query_groups,
        kv_channels=config.positive_int(
            hf_config, "head_dim", head_dim or hidden_size // num_heads
        ),
        vocab_size=config.positive_int(hf_config, "vocab_size"),
        max_position_embeddings=config.positive_int(hf_config, "max_position_embeddings"),
        layernorm_epsilon=config.number(hf_config, "rms_norm_eps"),
        rotary_base=config.rotary_base(hf_config),
        rope_scaling=config.rope_scaling(hf_config),
        is_tied=config.boolean(hf_config, "tie_word_embeddings", default=False),
        has_qkv_bias=has_qkv_bias,
        has_qk_norm=has_qk_norm,
        experts=experts,
    )


def decoder_family(
    *, name: str, model_types: tuple[str, ...], read: Callable[[Mapping[str, Any]], Decoder]
) -> Family:
    """Makes a family of a function that reads its `Decoder` from config.json."""
    return Family(
        name=name,
        model_types=model_types,
        weight_table=lambda hf_config: _weight_table(read(hf_config)),
        megatron_config=lambda hf_config: _megatron_config(read(hf_config)),
    )


def _weight_table(decoder: Decoder) -> WeightTable:
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
    rules = (
        *_embedding(decoder),
        *_attention(decoder),
        *_dense_mlp(decoder),
        *(_experts(decoder, decoder.experts) if decoder.experts else ()),
        *_output(decoder),
    )
    return WeightTable(num_layers=decoder.num_layers, rules=rules, ignored=tuple(ignored))


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


def _attention(decoder: Decoder) -> tuple[Rule, ...]:
    hidden_size, head_dim = decoder.hidden_size, decoder.kv_channels
    num_heads, num_groups = decoder.num_attention_heads, decoder.num_query_groups
    heads = {"q_proj": num_heads, "k_proj": num_groups, "v_proj": num_groups}
    layers = tuple(range(decoder.num_layers))
    rules = [
        Rule(
            megatron=_L + "self_attention.linear_qkv.layer_norm_weight",
            plain=_L + "input_layernorm.weight",
            hf=(HFTensor(_H + "input_layernorm.weight", (hidden_size,)),),
            layers=layers,
        ),
        Rule(
            megatron=_L + "self_attention.linear_qkv.weight",
            hf=tuple(
                HFTensor(f"{_H}self_attn.{name}.weight", (count * head_dim, hidden_size))
                for name, count in heads.items()
            ),
            layout=Interleaved(num_groups),
            split="rows",
            layers=layers,
        ),
        Rule(
            megatron=_L + "self_attention.linear_proj.weight",
            hf=(HFTensor(_H + "self_attn.o_proj.weight", (hidden_size, num_heads * head_dim)),),
            split="columns",
            layers=layers,
        ),
    ]
    if decoder.has_qkv_bias:
        bias = Rule(
            megatron=_L + "self_attention.linear_qkv.bias",
            hf=tuple(
                HFTensor(f"{_H}self_attn.{name}.bias", (count * head_dim,))
                for name, count in heads.items()
            ),
            layout=Interleaved(num_groups),
            split="rows",
            layers=layers,
        )
        rules.append(bias)
    if decoder.has_qk_norm:
        rules += [
            Rule(
                megatron=f"{_L}self_attention.{which}_layernorm.weight",
                hf=(HFTensor(f"{_H}self_attn.{which}_norm.weight", (head_dim,)),),
                layers=layers,
            )
            for which in ("q", "k")
        ]
    return tuple(rules)


def _dense_mlp(decoder: Decoder) -> tuple[Rule, ...]:
    hidden_size, width, layers = decoder.hidden_size, decoder.ffn_hidden_size, decoder.dense_layers
    return (
        Rule(
            megatron=_L + "mlp.linear_fc1.layer_norm_weight",
            plain=_L + "pre_mlp_layernorm.weight",
            hf=(HFTensor(_H + "post_attention_layernorm.weight", (hidden_size,)),),
            layers=layers,
        ),
        Rule(
            megatron=_L + "mlp.linear_fc1.weight",
            hf=(
                HFTensor(_H + "mlp.gate_proj.weight", (width, hidden_size)),
                HFTensor(_H + "mlp.up_proj.weight", (width, hidden_size)),
            ),
            split="rows",
            layers=layers,
        ),
        Rule(
            megatron=_L + "mlp.linear_fc2.weight",
            hf=(HFTensor(_H + "mlp.down_proj.weight", (hidden_size, width)),),
            split="columns",
            layers=layers,
        ),
    )


def _experts(decoder: Decoder, experts: Experts) -> tuple[Rule, ...]:
    hidden_size, width, num_experts = (
        decoder.hidden_size,
        experts.ffn_hidden_size,
        experts.num_experts,
    )
    return (
        Rule(
            megatron=_L + "pre_mlp_layernorm.weight",
            hf=(HFTensor(_H + "post_attention_layernorm.weight", (hidden_size,)),),
            layers=experts.layers,
        ),
        Rule(
            megatron=_L + "mlp.router.weight",
            hf=(HFTensor(_H + "mlp.gate.weight", (num_experts, hidden_size)),),
            layers=experts.layers,
        ),
        Rule(
            megatron=_L + "mlp.experts.linear_fc1.weight",
            hf=(
                HFTensor(_EXPERT + "gate_proj.weight", (width, hidden_size)),
                HFTensor(_EXPERT + "up_proj.weight", (width, hidden_size)),
            ),
            split="rows",
            layers=experts.layers,
            num_experts=num_experts,
        ),
        Rule(
            megatron=_L + "mlp.experts.linear_fc2.weight",
            hf=(HFTensor(_EXPERT + "down_proj.weight", (hidden_size, width)),),
            split="columns",
            layers=experts.layers,
            num_experts=num_experts,
        ),
    )


def _megatron_config(decoder: Decoder) -> MegatronConfig:
    transformer: dict[str, Any] = {
        "num_layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "ffn_hidden_size": decoder.ffn_hidden_size,
        "num_attention_heads": decoder.num_attention_heads,
        "num_query_groups": decoder.num_query_groups,
        "kv_channels": decoder.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": decoder.layernorm_epsilon,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": decoder.has_qkv_bias,
        "qk_layernorm": decoder.has_qk_norm,
    }
    if decoder.experts:
        transformer |= _moe_config(decoder.experts, num_layers=decoder.num_layers)
    return MegatronConfig(
        transformer=transformer,
        activation="silu",
        gpt=GPTArguments(
            vocab_size=decoder.vocab_size,
            max_position_embeddings=decoder.max_position_embeddings,
            rotary_base=decoder.rotary_base,
            rope_scaling=decoder.rope_scaling,
            is_tied=decoder.is_tied,
        ),
    )


def _moe_config(experts: Experts, *, num_layers: int) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.topk,
        "moe_router_score_function": "softmax",
        # Softmax over the chosen experts alone gives weights that sum to one; softmax over all of
        # them before choosing does not.
        "moe_router_pre_softmax": not experts.renormalises,
        # A list makes Megatron-Core's checkpoints have a name for each layer instead of an axis.
        "moe_layer_freq": 1
        if len(experts.layers) == num_layers
        else [int(layer in experts.layers) for layer in range(num_layers)],
    }
