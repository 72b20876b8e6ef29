"""Which modules get an adapter, by names; for dense models PEFT is the judge."""

import subprocess
import sys
import time

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtrain.bridge.plan import weight_table
from mtrain.config.tuner import TunerConfig
from mtrain.lora.plan import Adapter, module_name
from mtrain.lora.targets import choose_targets
from tests.bridge.test_plan import QWEN3_30B
from tests.tiny import DENSE, LLAMA_LIKE, tiny_config

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
LAYER = "decoder.layers.{layer}."
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
EXPERTS = {
    f"mlp.experts.{expert}.{name}"
    for expert in range(4)
    for name in ("gate_proj", "up_proj", "down_proj")
}


def choose(name, **tuner):
    return choose_targets(weight_table(tiny_config(name)), TunerConfig(**tuner))


def adapted(lora):
    """Full names of the Hugging Face modules with an adapter."""
    return [
        module_name(tensor).replace("{layer}", str(layer)).replace("{expert}", str(expert))
        for linear in lora.linears
        for layer in linear.layers or (None,)
        for tensor, adapter in zip(linear.rule.hf, linear.adapters, strict=True)
        if adapter
        for expert in range(linear.rule.num_experts or 1)
    ]


def in_layers(names, layers=range(4)):
    return {f"model.layers.{layer}.{name}" for layer in layers for name in names}


def model_of(name):
    fields = tiny_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields)
        )


def adapted_by_peft(name, target_modules, **options):
    model = model_of(name)
    model.config.tie_word_embeddings = False  # or it warns; the targets stay the same
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=target_modules, **options), low_cpu_mem_usage=True
    )
    return {
        key.removeprefix("base_model.model.")
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("name", [name for name in DENSE if name in LLAMA_LIKE])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *(
            ({"target_modules": tuple(targets)}, targets)
            for targets in (
                ["q_proj"],
                ["q_proj", "v_proj", "down_proj"],
                ["self_attn.k_proj", "model.layers.0.mlp.up_proj", "3.mlp.gate_proj"],
                ["layers.3.mlp.down_proj", "layers.3.mlp.up_proj", "o_proj"],
                ["model.embed_tokens", "q_proj"],
            )
        ),
        *(
            ({"target_regex": regex}, regex)
            for regex in (
                r".*_proj",
                r".*layers\.[13]\.self_attn\.(q|v)_proj",
                r"model\.layers\.\d+\.mlp\.(up|down)_proj|model\.embed_tokens",
            )
        ),
    ],
    ids=str,
)
def test_dense_models_are_adapted_where_peft_adapts_them(name, ours, theirs):
    modules = adapted(choose(name, **ours))
    assert len(modules) == len(set(modules))
    assert set(modules) == adapted_by_peft(name, theirs)


def test_the_head_is_adapted_where_peft_adapts_it():
    ours = choose("llama", target_modules=("lm_head", "k_proj"))
    assert set(adapted(ours)) == adapted_by_peft("llama", ["lm_head", "k_proj"])


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (
            ("all-linear",),
            in_layers(ATTENTION) | in_layers(EXPERTS, (0, 2, 3)) | in_layers(MLP, (1,)),
        ),
        (("all-router",), in_layers({"mlp.gate"}, (0, 2, 3))),
        (("gate",), in_layers({"mlp.gate"}, (0, 2, 3))),
        (("all-embedding", "o_proj"), {"model.embed_tokens"} | in_layers({"self_attn.o_proj"})),
        (
            ("all-router", "all-linear", "lm_head"),
            in_layers(ATTENTION)
            | in_layers(EXPERTS | {"mlp.gate"}, (0, 2, 3))
            | in_layers(MLP, (1,))
            | {"lm_head"},
        ),
        (
            ("gate_proj",),
            in_layers({f"mlp.experts.{expert}.gate_proj" for expert in range(4)}, (0, 2, 3))
            | in_layers({"mlp.gate_proj"}, (1,)),
        ),
        (
            tuple(f"layers.2.mlp.experts.{expert}.down_proj" for expert in range(4)),
            in_layers({f"mlp.experts.{expert}.down_proj" for expert in range(4)}, (2,)),
        ),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # sets have no fixed order
)
def test_shorthands_and_names_choose_among_experts_routers_and_the_rest(target_modules, expected):
    assert set(adapted(choose("qwen3_moe_mixed", target_modules=target_modules))) == expected


@pytest.mark.parametrize(
    ("megatron", "expected"),
    [
        ("linear_qkv", in_layers(ATTENTION - {"self_attn.o_proj"})),
        ("linear_proj", in_layers({"self_attn.o_proj"})),
        ("router", in_layers({"mlp.gate"}, (0, 2, 3))),
        ("word_embeddings", {"model.embed_tokens"}),
        ("output_layer", {"lm_head"}),
        (
            "linear_fc2",
            in_layers({f"mlp.experts.{expert}.down_proj" for expert in range(4)}, (0, 2, 3))
            | in_layers({"mlp.down_proj"}, (1,)),
        ),
        ("mlp.linear_fc1", in_layers({"mlp.gate_proj", "mlp.up_proj"}, (1,))),
        (
            "decoder.layers.3.self_attention.linear_qkv",
            in_layers(ATTENTION - {"self_attn.o_proj"}, (3,)),
        ),
    ],
)
def test_a_megatron_name_stands_for_all_projections_of_the_linear(megatron, expected):
    assert set(adapted(choose("qwen3_moe_mixed", target_modules=(megatron,)))) == expected


def test_layers_that_are_alike_are_one_entry_in_the_order_of_the_table():
    lora = choose(
        "qwen3",
        target_modules=("v_proj", "layers.2.self_attn.q_proj", "layers.0.mlp.down_proj", "lm_head"),
        lora_rank=4,
        lora_alpha=2.0,
        use_rslora=True,
    )
    v = Adapter(rank=4, alpha=2.0, use_rslora=True)
    found = [
        (linear.rule.megatron.split(".")[-2], linear.adapters, linear.layers)
        for linear in lora.linears
    ]
    assert found == [
        ("linear_qkv", (None, None, v), (0, 1, 3)),
        ("linear_qkv", (v, None, v), (2,)),
        ("linear_fc2", (v,), (0,)),
        ("output_layer", (v,), ()),
    ]


def test_a_rank_above_the_sides_of_a_projection_is_taken():
    assert choose("qwen3", lora_rank=1000).linears[0].rank == 1000


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ({"freeze_parameters": ("decoder.layers.0.", "model.layers.2.")}, {1, 3}),
        ({"freeze_parameters_regex": r"layers\.[12]\."}, {0, 3}),
        ({"freeze_parameters": ("model.layers.3",), "freeze_parameters_regex": "s.0"}, {1, 2}),
    ],
)
def test_frozen_layers_get_no_adapter(frozen, expected):
    assert set(adapted(choose("qwen3", **frozen))) == in_layers(ATTENTION | MLP, expected)


def test_a_frozen_projection_leaves_the_others_of_its_linear():
    lora = choose("qwen2", freeze_parameters_regex=r"k_proj\.weight|linear_fc2")
    assert set(adapted(lora)) == in_layers(
        ATTENTION | MLP - {"mlp.down_proj"} - {"self_attn.k_proj"}
    ) - in_layers({"self_attn.k_proj"})


def test_a_frozen_bias_or_norm_changes_nothing():
    narrowed = choose("qwen2", freeze_parameters_regex=r"bias|norm")
    assert adapted(narrowed) == adapted(choose("qwen2"))


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (("lm_head",), {"output_layer.weight": ()}),
        (
            ("norm", "embed_tokens"),
            {"embedding.word_embeddings.weight": (), "decoder.final_layernorm.weight": ()},
        ),
        (
            ("input_layernorm",),
            {LAYER + "self_attention.linear_qkv.layer_norm_weight": (0, 1, 2, 3)},
        ),
        (("layers.2.self_attn.q_norm",), {LAYER + "self_attention.q_layernorm.weight": (2,)}),
        (("mlp.gate",), {LAYER + "mlp.router.weight": (0, 2, 3)}),
        (
            ("post_attention_layernorm",),
            {
                LAYER + "mlp.linear_fc1.layer_norm_weight": (1,),
                LAYER + "pre_mlp_layernorm.weight": (0, 2, 3),
            },
        ),
    ],
    ids=str,
)
def test_modules_to_save_are_trained_whole(modules, expected):
    lora = choose("qwen3_moe_mixed", modules_to_save=modules)
    assert {rule.megatron: rule.layers for rule in lora.modules_to_save} == expected


def test_all_of_a_fused_linear_can_be_saved_with_its_biases():
    lora = choose(
        "qwen2", target_modules=("o_proj",), modules_to_save=("q_proj", "k_proj", "v_proj")
    )
    assert [rule.megatron.split("self_attention.")[1] for rule in lora.modules_to_save] == [
        "linear_qkv.weight",
        "linear_qkv.bias",
    ]


def refusal(name, **tuner):
    with pytest.raises(ValueError) as caught:
        choose(name, **tuner)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "target",
    ["qproj", "proj", "norm", "mlp", "all-router", "layers.4.mlp.up_proj", "ayers.3.mlp.up_proj"],
)
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(target):
    message = refusal("qwen3", target_modules=("q_proj", target))
    assert message == (
        f"--target_modules '{target}' matches nothing; there are: embed_tokens q_proj k_proj "
        "v_proj o_proj gate_proj up_proj down_proj lm_head (Hugging Face), word_embeddings "
        "linear_qkv linear_proj linear_fc1 linear_fc2 output_layer (Megatron), all-linear "
        "all-embedding; or longer ends of a name, as model.layers.0.self_attn.q_proj"
    )


def test_what_there_is_includes_routers_but_no_tied_head():
    message = refusal("qwen3_moe", target_modules=("x",))
    assert all(f" {word} " in message for word in ("gate", "router", "all-router"))
    assert "lm_head" not in refusal("qwen3_tied", target_modules=("x",))


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ({"target_modules": ()}, "no linear is left to get an adapter"),
        ({"target_regex": "q_proj"}, "'q_proj' matches no whole name of a linear; there are: "),
        ({"target_regex": "q_proj"}, "model.layers.*.self_attn.q_proj, "),
        ({"target_regex": "(q_"}, "--target_regex '(q_' is not a regular expression: missing )"),
        ({"target_regex": ".*", "target_modules": ("q_proj",)}, "drop one of them"),
        ({"freeze_parameters": ("model.", "lm_head")}, "no linear is left to get an adapter"),
        ({"freeze_parameters": ("layers.0",)}, "_parameters 'layers.0' matches no parameter; "),
        ({"freeze_parameters": ("layers.0",)}, "there are: model.embed_tokens.weight, model.la"),
        ({"freeze_parameters_regex": "moe"}, "_regex 'moe' matches no parameter"),
        ({"freeze_parameters_regex": "["}, "--freeze_parameters_regex '[' is not a regular"),
        ({"freeze_parameters_ratio": 0.5}, "--freeze_parameters_ratio has no meaning with LoRA"),
        ({"trainable_parameters": ("model.norm",)}, "--trainable_parameters has no meaning"),
        ({"trainable_parameters_regex": "x"}, "--trainable_parameters_regex has no meaning"),
    ],
    ids=str,
)
def test_a_choice_that_leaves_nothing_or_means_nothing_is_refused(tuner, message):
    assert message in refusal("qwen3", **tuner)


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ({"modules_to_save": ("layernorm",)}, "'layernorm' matches nothing; there are: embed_"),
        ({"modules_to_save": ("layernorm",)}, " q_norm k_norm post_attention_layernorm gate_"),
        ({"modules_to_save": ("up_proj",)}, "a part of linear_fc1, which is one parameter"),
        ({"modules_to_save": ("up_proj",)}, "(gate_proj, up_proj): name gate_proj too, or none"),
        ({"modules_to_save": ("q_proj", "layers.1.k_proj")}, "matches nothing"),
        ({"modules_to_save": ("self_attn.o_proj",)}, "o_proj is in --modules_to_save and gets an"),
        (
            {"modules_to_save": ("norm",), "freeze_parameters_regex": "norm"},
            "norm is in --modules_to_save and frozen by --freeze_parameters",
        ),
    ],
    ids=str,
)
def test_modules_that_cannot_be_saved_are_refused(tuner, message):
    assert message in refusal("qwen3", target_modules=("o_proj",), **tuner)


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ({"target_modules": ("lm_head",)}, "--target_modules chooses lm_head"),
        ({"target_modules": ("q_proj", "output_layer")}, "--target_modules chooses lm_head"),
        ({"target_regex": ".*"}, "--target_regex chooses lm_head"),
        ({"modules_to_save": ("lm_head",)}, "--modules_to_save lm_head: "),
        ({"modules_to_save": ("model.embed_tokens",)}, "--modules_to_save embed_tokens: "),
    ],
    ids=str,
)
def test_the_head_of_a_tied_model_is_refused_by_all_its_names(tuner, message):
    for name in ("llama3_tied", "qwen2_tied", "qwen3_tied"):
        assert message in refusal(name, **tuner)
        assert "(tie_word_embeddings)" in refusal(name, **tuner)


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (
            {"target_modules": ("experts.3.gate_proj",)},
            "gate_proj of 1 of the 4 experts in layer 0",
        ),
        ({"target_regex": r".*2.*\.[0-2]\.up_proj"}, "up_proj of 3 of the 4 experts in layer 2"),
        ({"freeze_parameters_regex": r"1\.mlp\.experts\.0"}, "of 1 of the 4 experts in layer 1"),
        ({"modules_to_save": ("0.down_proj",)}, "down_proj of 1 of the 4 experts in layer 0"),
        ({"modules_to_save": ("down_proj",)}, "down_proj: PEFT cannot hold whole experts"),
    ],
    ids=str,
)
def test_what_cannot_be_done_with_experts_is_refused(tuner, message):
    assert message in refusal("qwen3_moe", **tuner)


@pytest.mark.parametrize(
    "tuner",
    [{}, {"target_regex": r".*_proj"}, {"freeze_parameters_regex": "embed"}],
    ids=str,
)
def test_the_largest_models_take_a_second(tuner):
    start = time.process_time()
    lora = choose_targets(weight_table(QWEN3_30B), TunerConfig(**tuner))
    assert len(adapted(lora)) == 48 * (4 + 128 * 3)
    assert time.process_time() - start < 1.5


def test_choosing_needs_no_torch():
    code = "import sys, mtrain.lora.targets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
