"""What we write loads in PEFT with nothing missing or unexpected, and means the same there."""

import json
import warnings

import peft
import pytest
import torch

from mtrain.bridge.plan import weight_table
from mtrain.lora.peft_config import adapter_config, per_expert_problem
from mtrain.lora.plan import Adapter
from tests.lora.peft_folders import (
    changes_of,
    hf_model,
    in_float64,
    load_with_peft,
    logits_of,
    make_plan,
    merged_by_hand,
    random_values,
    table_of,
    uniform_plan,
    weights_of,
    write_adapter,
)
from tests.tiny import make_checkpoint, tiny_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)
LAYER = "model.layers.{layer}."
SCORE_BIAS = "mlp.gate.e_score_correction_bias"
DENSE = weight_table(tiny_config("qwen3"))
MOE = weight_table(tiny_config("qwen3_moe"))
MIXED = weight_table(tiny_config("qwen3_moe_mixed"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            # The fourth layer of Qwen3-Next is the first with attention.
            num_layers = 4 if name == "qwen3_next_moe" else 3
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_checkpoint(folder, name, num_hidden_layers=num_layers)
        return made[name]

    return get


def everywhere(leaves, **adapter):
    one = Adapter(**{"rank": 4, "alpha": 6.0} | adapter)
    return lambda name, layer: one if name.split(".")[-2] in leaves else None


def uneven(name, layer):
    """Other ranks and alphas for every projection, and for one layer; gate and up at one scale."""
    leaf = name.split(".")[-2]
    if leaf == "norm":
        return None
    rank = {"q_proj": 8, "gate_proj": 2, "up_proj": 6, "down_proj": 3, "gate": 5}.get(leaf, 4)
    rank += layer == 2
    scale = 5.0 if leaf == "down_proj" else 1.0
    return Adapter(rank=rank, alpha=rank * scale if ".experts." in name else 8.0)


def some_layers(name, layer):
    return Adapter(rank=4, alpha=2.0 + layer) if layer in (0, 2) else None


def all_linears(name, layer):
    others = ("embed_tokens", "lm_head", "wte", "gate", "router")
    return None if name.split(".")[-2] in others else Adapter(rank=4, alpha=6.0)


def linears_and_router(name, layer):
    """Router with a rank and alpha of its own."""
    is_router = name.split(".")[-2] in ("gate", "router")
    return Adapter(rank=3, alpha=5.0) if is_router else all_linears(name, layer)


CASES = [
    ("qwen2", "per_expert", everywhere(ALL), ()),
    ("qwen2", "fused", everywhere(ALL, use_rslora=True), ("lm_head.weight", "model.norm.weight")),
    ("qwen2", "per_expert", everywhere(("q_proj", "embed_tokens", "lm_head"), alpha=2.5), ()),
    ("qwen2", "per_expert", uneven, ()),
    ("qwen2", "per_expert", some_layers, ("model.embed_tokens.weight",)),
    ("qwen3_tied", "per_expert", everywhere(("v_proj", "embed_tokens")), ("model.norm.weight",)),
    *(
        (name, layout, choose, saved)
        for name in ("qwen3_moe", "qwen3_moe_mixed")
        for layout in ("per_expert", "fused")
        for choose, saved in [
            (everywhere(ALL), ("lm_head.weight",)),
            (everywhere((*ALL, "gate"), use_rslora=True), ()),
            (everywhere(("q_proj", "down_proj")), ()),
            (everywhere(("q_proj", "gate")), ()),
            (uneven, ()),
        ]
    ),
    ("qwen3_moe", "fused", everywhere(("gate_proj", "up_proj")), ()),
    ("qwen3_moe", "fused", everywhere(("gate_proj",)), ()),
    ("qwen3_moe_mixed", "fused", everywhere(("up_proj", "down_proj")), ()),
    ("qwen3_moe", "fused", some_layers, ()),
    *((name, "per_expert", all_linears, ()) for name in ("glm4", "gemma3", "phi3", "gpt2")),
    ("gpt2", "per_expert", everywhere(("c_attn", "wte")), ("transformer.wpe.weight",)),
    ("phi3", "per_expert", some_layers, ("lm_head.weight",)),
    *(
        (name, layout, linears_and_router, ())
        for name in ("deepseek_v3", "mixtral", "glm4_moe", "qwen3_next_moe")
        for layout in ("per_expert", "fused")
    ),
    ("qwen2_moe", "fused", linears_and_router, ()),
    ("qwen2_moe", "per_expert", everywhere(("q_proj", "gate", "shared_expert_gate")), ()),
    ("gpt_oss_moe", "fused", linears_and_router, ("model.norm.weight",)),
    ("gpt_oss_moe", "per_expert", everywhere(("q_proj", "router")), ("lm_head.weight",)),
    ("deepseek_v3", "fused", all_linears, (f"{LAYER}mlp.gate.weight", f"{LAYER}{SCORE_BIAS}")),
    ("mixtral", "per_expert", all_linears, (f"{LAYER}block_sparse_moe.gate.weight",)),
    (
        "qwen2_moe",
        "fused",
        everywhere(("o_proj",)),
        (f"{LAYER}mlp.shared_expert_gate.weight", f"{LAYER}mlp.shared_expert.down_proj.weight"),
    ),
]


@pytest.mark.parametrize(("name", "layout", "choose", "saved"), CASES)
def test_peft_loads_all_of_it_and_gives_our_logits(folders, tmp_path, name, layout, choose, saved):
    folder, table = folders(name), table_of(folders(name))
    lora = make_plan(table, choose, modules_to_save=saved)
    values = random_values(lora, table)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, lora, table, values, layout=layout, dropout=0.1, base=str(folder))
    before = weights_of(hf_model(folder))
    changes = changes_of(lora, values.__getitem__, table, before)
    # In float32 the sums are rounded, which gated delta nets turn into 1e-5 of logits of 2.
    exact = changes_of(
        lora,
        lambda name: values[name].double(),
        table,
        {name: weight.double() for name, weight in before.items()},
    )
    expected = logits_of(merged_by_hand(folder, exact, dtype=torch.float64))
    model = load_with_peft(folder, adapter)
    in_float64(model.base_model.model)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-12, atol=1e-12)
    assert (expected - logits_of(hf_model(folder))).abs().max() > 1e-2
    model = load_with_peft(folder, adapter)
    merged = weights_of(model.merge_and_unload())
    for weight, change in changes.items():
        torch.testing.assert_close(merged[weight] - before[weight], change, rtol=1e-5, atol=2e-6)
        before.pop(weight)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert all(torch.equal(merged[weight], before[weight]) for weight in before.keys() - tied)


def config_of(table, choose, *, saved=(), layout="per_expert", dropout=0.1, base="org/name"):
    lora = make_plan(table, choose, modules_to_save=saved)
    return adapter_config(lora, table, base=base, layout=layout, dropout=dropout)


def test_peft_knows_every_field_and_needs_no_other(tmp_path):
    config = config_of(MOE, uneven, saved=("lm_head.weight",))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, peft.LoraConfig)
    theirs = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in loaded.to_dict().items()
    }
    for name, value in config.items():
        assert theirs[name] == (sorted(value) if name == "target_modules" else value), name
    defaults = peft.LoraConfig().to_dict()
    assert all(theirs[name] == defaults[name] for name in theirs.keys() - config.keys())


def test_modules_are_named_by_their_last_name_where_that_is_enough():
    config = config_of(DENSE, everywhere(ALL))
    assert config["target_modules"] == list(ALL)
    assert config["target_parameters"] is None
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == "org/name"
    assert config["task_type"] == "CAUSAL_LM"


def test_modules_are_named_by_more_where_others_have_the_same_last_name():
    config = config_of(
        DENSE, lambda name, layer: everywhere(("q_proj",))(name, layer) if layer == 2 else None
    )
    assert config["target_modules"] == ["layers.2.self_attn.q_proj"]
    config = config_of(DENSE, everywhere(("q_proj",)), saved=("model.norm.weight",))
    assert config["modules_to_save"] == ["model.norm"]  # not also q_norm


def test_what_differs_from_most_is_in_the_patterns():
    config = config_of(
        DENSE,
        lambda name, layer: (
            Adapter(rank=8 if "q_proj" in name else 4, alpha=1.5 if layer == 3 else 6.0)
            if "_proj" in name
            else None
        ),
    )
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == {"q_proj": 8}
    assert config["alpha_pattern"]["layers.3.self_attn.q_proj"] == 1.5
    assert len(config["alpha_pattern"]) == 7


def test_experts_one_by_one_are_named_as_linears_and_the_router_as_a_parameter():
    config = config_of(MOE, everywhere((*ALL, "gate")))
    assert config["target_modules"] == list(ALL)
    assert config["target_parameters"] == ["mlp.gate.weight"]
    assert config["rank_pattern"] == {}
    assert config["lora_dropout"] == 0.0


def test_fused_experts_are_named_as_parameters_with_twice_the_rank():
    config = config_of(MOE, everywhere(ALL), layout="fused")
    assert config["target_modules"] == list(ATTENTION)
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config["rank_pattern"] == {"mlp.experts.gate_up_proj": 8}
    assert config["alpha_pattern"] == {"mlp.experts.gate_up_proj": 12}


def test_dropout_stays_where_no_parameter_is_adapted():
    assert config_of(MOE, everywhere(ATTENTION))["lora_dropout"] == 0.1
    assert config_of(MOE, everywhere(("gate",)))["lora_dropout"] == 0.0


def test_gate_and_up_of_experts_with_two_scales_are_refused():
    def choose(name, layer):
        return Adapter(rank=4, alpha=2.0 if "gate_proj" in name else 3.0)

    for layout in ("per_expert", "fused"):
        with pytest.raises(ValueError, match=r"experts of layer 0 .* scales \[0\.5, 0\.75\]"):
            config_of(MOE, choose, layout=layout)


def test_what_peft_cannot_save_whole_is_refused():
    with pytest.raises(ValueError, match="experts cannot be among the modules to save"):
        saved = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
        config_of(MOE, everywhere(ATTENTION), saved=(saved,))
    tied = weight_table(tiny_config("qwen3_tied"))
    with pytest.raises(ValueError, match="uses it as output layer too"):
        config_of(tied, everywhere(ATTENTION), saved=("model.embed_tokens.weight",))


@pytest.mark.parametrize(
    ("table", "choose", "loads"),
    [
        (DENSE, some_layers, True),
        (MOE, everywhere(ALL), True),
        (MIXED, everywhere(ALL), True),
        (MOE, everywhere(ATTENTION), True),
        (MOE, everywhere(("down_proj",)), True),
        (MOE, everywhere(("gate_proj", "up_proj")), False),
        (MOE, everywhere(("gate_proj", "down_proj")), False),
        (MOE, some_layers, False),
    ],
)
def test_it_is_known_which_experts_peft_would_not_load_one_by_one(table, choose, loads):
    problem = per_expert_problem(make_plan(table, choose), table, model_type="qwen3_moe")
    assert (problem is None) == loads


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss_moe"])
def test_it_is_known_of_which_models_peft_loads_no_experts_one_by_one(folders, tmp_path, name):
    """If loading fails no more, PEFT has learnt it, and `per_expert_problem` can forget it."""
    folder, table = folders(name), table_of(folders(name))
    model_type = tiny_config(name)["model_type"]
    attention = make_plan(table, everywhere(ATTENTION))
    assert per_expert_problem(attention, table, model_type=model_type) is None
    lora = make_plan(table, all_linears)
    problem = per_expert_problem(lora, table, model_type=model_type)
    assert (
        problem == f"PEFT does not load experts of a {model_type} model that are stored one by one"
    )
    write_adapter(tmp_path / "adapter", lora, table, random_values(lora, table))
    with pytest.raises((AssertionError, ValueError)):
        load_with_peft(folder, tmp_path / "adapter")


@pytest.mark.parametrize("leaves", [("gate_proj", "up_proj"), ("up_proj",)])
def test_peft_does_not_load_those_experts_indeed(folders, tmp_path, leaves):
    """If this fails, PEFT has learnt it, and `per_expert_problem` can go."""
    folder = folders("qwen3_moe")
    lora = uniform_plan(table_of(folder), *leaves)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, lora, table_of(folder), random_values(lora, table_of(folder)))
    with pytest.raises((AssertionError, ValueError)):
        load_with_peft(folder, adapter)
