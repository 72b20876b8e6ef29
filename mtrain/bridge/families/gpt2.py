"""GPT-2: learned positions, norms with biases, biases everywhere, an MLP without a gate.

The dropout that a config.json names is that of its first training and is not read. Files hold the
weights of linears transposed (see `StorageForm`); here they are `[out, in]`.
"""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.layers import LayerNames
from mtrain.bridge.family import Family, GPTArguments, MegatronConfig
from mtrain.bridge.hf_config import boolean, number, positive_int, refuse
from mtrain.bridge.rules import (
    HFTensor,
    IgnoredKey,
    Interleaved,
    Padded,
    Regrouped,
    Rule,
    WeightTable,
)
from mtrain.bridge.spans import Span
from mtrain.bridge.storage.forms import transposed, without_prefix
from mtrain.bridge.storage.quantization import check_quantization

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_IGNORED = (
    IgnoredKey(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", "causal masks of old transformers"),
    IgnoredKey(
        r"lm_head\.weight",
        "tie_word_embeddings: the embedding is used instead",
        copy_of="transformer.wte.weight",
    ),
)


def _check(hf_config: Mapping[str, Any]) -> None:
    check_quantization(hf_config)
    refuse(hf_config, "add_cross_attention", "attention to an encoder")
    refuse(hf_config, "scale_attn_by_inverse_layer_idx", "scores that depend on the layer")
    refuse(hf_config, "reorder_and_upcast_attn", "another order of rounding")
    for key in ("scale_attn_weights", "tie_word_embeddings"):
        if not boolean(hf_config, key, default=True):
            raise ValueError(f"config.json: {key!r} false is not built for gpt2")
    activation = hf_config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: 'activation_function' {activation!r} is not built; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )


def _sizes(hf_config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width of the residual stream, width of the MLP, heads."""
    hidden_size = positive_int(hf_config, "n_embd")
    num_heads = positive_int(hf_config, "n_head")
    if hidden_size % num_heads:
        raise ValueError(f"config.json: 'n_embd' {hidden_size} is no multiple of {num_heads} heads")
    return hidden_size, positive_int(hf_config, "n_inner", 4 * hidden_size), num_heads


def _weight_table(hf_config: Mapping[str, Any], num_next_tokens: int = 0) -> WeightTable:
    _check(hf_config)
    assert num_next_tokens == 0
    hidden_size, width, num_heads = _sizes(hf_config)
    num_layers = positive_int(hf_config, "n_layer")
    at = LayerNames(numbers=tuple(range(num_layers)), hf="transformer.h.{layer}.")
    rules = [
        *_outside(hf_config, hidden_size),
        *_norm(at, "self_attention.linear_qkv", "input_layernorm", "ln_1", hidden_size),
        *_projections(at, hidden_size, num_heads),
        *_linear(at, "self_attention.linear_proj", "attn.c_proj", hidden_size, hidden_size, "in"),
        *_norm(at, "mlp.linear_fc1", "pre_mlp_layernorm", "ln_2", hidden_size),
        *_linear(at, "mlp.linear_fc1", "mlp.c_fc", width, hidden_size, "out"),
        *_linear(at, "mlp.linear_fc2", "mlp.c_proj", hidden_size, width, "in"),
    ]
    linears = [
        rule.hf[0].name for rule in rules if rule.place == "layers" and len(rule.hf[0].shape) > 1
    ]
    forms = transposed(*linears)
    names = [tensor.name for rule in rules for tensor in rule.hf]
    return WeightTable(
        num_layers=num_layers,
        rules=tuple(rules),
        ignored=_IGNORED,
        forms=(*forms, *without_prefix("transformer.", names, forms)),
    )


def _outside(hf_config: Mapping[str, Any], hidden_size: int) -> list[Rule]:
    """Rules of what is in no layer."""
    words = HFTensor("transformer.wte.weight", (positive_int(hf_config, "vocab_size"), hidden_size))
    positions = HFTensor(
        "transformer.wpe.weight", (positive_int(hf_config, "n_positions"), hidden_size)
    )
    embedding = {"hf": (words,), "layout": Padded(), "split": "rows"}
    return [
        Rule(megatron="embedding.word_embeddings.weight", place="first", **embedding),
        Rule(megatron="embedding.position_embeddings.weight", hf=(positions,), place="first"),
        *(
            Rule(
                megatron=f"decoder.final_layernorm.{kind}",
                hf=(HFTensor(f"transformer.ln_f.{kind}", (hidden_size,)),),
                place="last",
            )
            for kind in ("weight", "bias")
        ),
        Rule(megatron="output_layer.weight", place="last", is_duplicate=True, **embedding),
    ]


def _norm(at: LayerNames, linear: str, plain: str, hf: str, hidden_size: int) -> list[Rule]:
    return [
        at.rule(
            f"{linear}.layer_norm_{kind}",
            [(f"{hf}.{kind}", (hidden_size,))],
            plain=f"{plain}.{kind}",
        )
        for kind in ("weight", "bias")
    ]


def _projections(at: LayerNames, hidden_size: int, num_heads: int) -> list[Rule]:
    """Queries, keys and values of all heads, one below the other in one tensor."""
    parts = tuple((0, Span(part * hidden_size, hidden_size)) for part in range(3))
    return [
        at.rule(
            f"self_attention.linear_qkv.{kind}",
            [(f"attn.c_attn.{kind}", (3 * hidden_size, *columns))],
            layout=Regrouped(Interleaved(num_heads), parts),
            split="rows",
        )
        for kind, columns in (("weight", (hidden_size,)), ("bias", ()))
    ]


def _linear(
    at: LayerNames, megatron: str, hf: str, out_size: int, in_size: int, split: str
) -> list[Rule]:
    """A linear with a bias, split along its output or its input."""
    is_column = split == "out"
    return [
        at.rule(
            f"{megatron}.weight",
            [(f"{hf}.weight", (out_size, in_size))],
            split="rows" if is_column else "columns",
        ),
        at.rule(
            f"{megatron}.bias",
            [(f"{hf}.bias", (out_size,))],
            split="rows" if is_column else None,
        ),
    ]


def _megatron_config(hf_config: Mapping[str, Any], num_next_tokens: int = 0) -> MegatronConfig:
    _check(hf_config)
    assert num_next_tokens == 0
    hidden_size, width, num_heads = _sizes(hf_config)
    return MegatronConfig(
        transformer={
            "num_layers": positive_int(hf_config, "n_layer"),
            "hidden_size": hidden_size,
            "ffn_hidden_size": width,
            "num_attention_heads": num_heads,
            "num_query_groups": num_heads,
            "kv_channels": hidden_size // num_heads,
            "normalization": "LayerNorm",
            "layernorm_epsilon": number(hf_config, "layer_norm_epsilon", 1e-5),
            "gated_linear_unit": False,
            "add_bias_linear": True,
            "add_qkv_bias": True,
        },
        activation=_ACTIVATIONS[hf_config.get("activation_function", "gelu_new")],
        gpt=GPTArguments(
            vocab_size=positive_int(hf_config, "vocab_size"),
            max_position_embeddings=positive_int(hf_config, "n_positions"),
            rope=None,
            is_tied=True,
        ),
    )


GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    weight_table=_weight_table,
    megatron_config=_megatron_config,
    num_next_tokens=lambda _hf_config: 0,
)
