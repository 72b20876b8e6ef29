"""The layout of fused factors: the product of a rank's slices is the rank's slice of the product.

Integers, so everything is exactly equal. The judges are PEFT, for names and shapes, and the base
weights' own rules, filled with B @ A of every projection, for where rows and columns go.
"""

from math import prod

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtrain.bridge.plan import hf_tensors, locate_tensors, plan_rank, weight_table
from mtrain.bridge.rules import HFTensor
from mtrain.config.tuner import TunerConfig
from mtrain.lora.plan import (
    PEFT_PREFIX,
    AdaptedLinear,
    Adapter,
    LoraPlan,
    adapter_table,
    check_mergeable,
    factor_names,
    module_name,
)
from mtrain.lora.targets import choose_targets
from mtrain.parallel import ParallelLayout
from tests.bridge.test_plan import add_boxes, rows_of
from tests.tiny import tiny_config

ALL = ("all-linear", "all-router", "all-embedding", "lm_head")
DENSE_ALL = ("all-linear", "all-embedding", "lm_head")
SOME = ("q_proj", "v_proj", "up_proj", "layers.1.self_attn.k_proj", "layers.2.self_attn.o_proj")
LAYOUTS = {
    "one": {},
    "tp2": {"world_size": 2, "tp_size": 2},
    "tp4_more_ranks_than_groups": {"world_size": 4, "tp_size": 4},
    "tp2_pp2_vpp2": {"world_size": 4, "tp_size": 2, "pp_size": 2, "vpp_size": 2},
    "tp2_ep2": {"world_size": 2, "tp_size": 2, "ep_size": 2, "etp_size": 1},
    "ep2_etp2": {"world_size": 4, "tp_size": 1, "ep_size": 2, "etp_size": 2},
    "tp4_etp2": {"world_size": 4, "tp_size": 4, "ep_size": 2, "etp_size": 2},
}
EVERYWHERE = pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)


def uneven(lora):
    """The same targets with another rank for every projection of a linear."""
    return LoraPlan(
        linears=tuple(
            AdaptedLinear(
                rule=linear.rule,
                layers=linear.layers,
                adapters=tuple(
                    adapter and Adapter(rank=2 + 3 * index % 5, alpha=8.0)
                    for index, adapter in enumerate(linear.adapters)
                ),
            )
            for linear in lora.linears
        ),
        modules_to_save=lora.modules_to_save,
    )


def plan_of(name, *, target_modules, is_uneven=True, **tuner):
    table = weight_table(tiny_config(name))
    lora = choose_targets(table, TunerConfig(target_modules=target_modules, lora_rank=3, **tuner))
    return table, uneven(lora) if is_uneven else lora


def random_tensors(table):
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(1, 10, shape) for name, shape in sorted(hf_tensors(table).items())
    }


def filled(table, values, *, layout, rank):
    """Local parameters of a rank by (chunk, name), filled from whole tensors."""
    local = {}
    for parameter in plan_rank(table, layout=layout, rank=rank):
        array = np.zeros(parameter.shape, dtype=np.int64)
        for piece in parameter.pieces:
            target = array if piece.expert is None else array[piece.expert]
            source = values[piece.hf_name]
            target[np.ix_(*map(rows_of, piece.local))] = source[np.ix_(*map(rows_of, piece.hf))]
        local[parameter.chunk, parameter.name] = array
    return local


def products(table, lora, factors):
    """B @ A for every tensor of the model; zero where there is no adapter."""
    deltas = {name: np.zeros(shape, dtype=np.int64) for name, shape in hf_tensors(table).items()}
    for name in deltas:
        module = HFTensor(name, ())
        for is_embedding in (False, True):
            a_name, b_name = factor_names(module, is_embedding=is_embedding)
            if a_name in factors:
                delta = factors[b_name] @ factors[a_name]
                deltas[name] = delta.T if is_embedding else delta
    return deltas


def adapted_tensors(lora):
    """Full names of the weights with an adapter."""
    return {
        tensor.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))
        for linear in lora.linears
        for layer in linear.layers or (None,)
        for tensor, adapter in zip(linear.rule.hf, linear.adapters, strict=True)
        if adapter
        for expert in range(linear.rule.num_experts or 1)
    }


def owners(table, adapted):
    """A stand-in for the weights that says of every element which adapted projection it is of.

    1 for the first projection with an adapter, 2 for the next; 0 for one without.
    """
    values = {}
    for rule in table.rules:
        for layer in rule.layers or (None,):
            number = 0
            for tensor in rule.hf:
                for expert in range(rule.num_experts or 1):
                    name = tensor.name.replace("{layer}", str(layer))
                    name = name.replace("{expert}", str(expert))
                    is_adapted = name in adapted
                    values[name] = np.full(tensor.shape, number + 1 if is_adapted else 0)
                number += is_adapted
    return values


def local_product(lora_a, lora_b, row_owners):
    """What a rank adds to its weight [out, in]: every row of B meets the A of its projection."""
    rank = lora_b.shape[1]
    delta = np.zeros((len(lora_b), lora_a.shape[1]), dtype=np.int64)
    for row, owner in enumerate(row_owners):
        if owner:
            delta[row] = lora_b[row] @ lora_a[(owner - 1) * rank : owner * rank]
    return delta


def assert_product_of_slices(base, owner, lora_a, lora_b, *, is_embedding):
    """Compares one local weight, without a leading axis of experts."""
    if is_embedding:
        delta = local_product(lora_a, lora_b, np.ones(len(lora_b), dtype=int)).T
    else:
        row_owners = owner.max(axis=1)
        delta = local_product(lora_a, lora_b, row_owners)
        assert not lora_b[row_owners == 0].any(), "B has rows without an adapter"
    np.testing.assert_array_equal(delta, base)


@EVERYWHERE
@pytest.mark.parametrize(
    ("name", "target_modules"),
    [
        ("qwen2", DENSE_ALL),
        ("qwen3", SOME),
        ("qwen3_tied", ("all-linear", "all-embedding")),
        ("qwen3_moe_mixed", ALL),
        ("qwen3_moe_mixed", SOME),
        ("qwen3_moe_mixed", ("k_proj", "gate_proj", "down_proj")),
        ("phi3", DENSE_ALL),
        ("glm4", DENSE_ALL),
        ("gpt2", ("all-linear",)),
        ("deepseek_v3", ALL),
        ("qwen2_moe", ("all-linear", "all-router")),
        ("mixtral", ALL),
    ],
    ids=str,
)
def test_the_product_of_a_ranks_slices_is_its_slice_of_the_product(name, target_modules, sizes):
    table, lora = plan_of(name, target_modules=target_modules)
    check_products(table, lora, sizes)


@pytest.mark.parametrize("sizes", ["one", "tp2_pp2_vpp2", "ep2_etp2"])
@pytest.mark.parametrize(
    "target_modules", [ALL, ("in_proj_ba", "q_proj", "v_proj"), ("in_proj_qkvz", "k_proj")], ids=str
)
def test_so_it_is_where_rows_of_one_projection_lie_apart(target_modules, sizes):
    """Two key heads, so that four ranks cannot share them."""
    table, lora = plan_of("qwen3_next_moe", target_modules=target_modules)
    check_products(table, lora, LAYOUTS[sizes])


@pytest.mark.parametrize("sizes", ["one", "tp2_pp2_vpp2", "tp2_ep2"])
@pytest.mark.parametrize("name", ["deepseek_v3", "mimo"])
def test_so_it_is_in_layers_of_multi_token_prediction(name, sizes):
    """In MiMo the columns of the linear that joins embedding and hidden state are swapped."""
    config = tiny_config("qwen2" if name == "mimo" else name) | {"num_nextn_predict_layers": 1}
    table = weight_table(config | ({"model_type": "mimo"} if name == "mimo" else {}), 1)
    # Not the embedding, of which there is a copy.
    lora = choose_targets(table, TunerConfig(target_modules=("all-linear", "lm_head"), lora_rank=3))
    assert any(linear.rule.place == "mtp" for linear in lora.linears)
    check_products(table, uneven(lora), LAYOUTS[sizes])


def check_products(table, lora, sizes):
    layout = ParallelLayout(**sizes)
    factors = random_tensors(adapter_table(table, lora))
    deltas = products(table, lora, factors)
    adapted = adapted_tensors(lora)
    assert adapted == {tensor for tensor, delta in deltas.items() if delta.any()}
    for rank in range(layout.world_size):
        where = {"layout": layout, "rank": rank}
        local = filled(adapter_table(table, lora), factors, **where)
        base = filled(table, deltas, **where)
        owner = filled(table, owners(table, adapted), **where)
        for (chunk, parameter), lora_a in local.items():
            if not parameter.endswith("adapter.lora_a"):
                continue
            weight = parameter.removesuffix("adapter.lora_a") + "weight"
            lora_b = local[chunk, parameter.removesuffix("a") + "b"]
            arrays = (base[chunk, weight], owner[chunk, weight], lora_a, lora_b)
            is_embedding = "word_embeddings" in weight
            for expert in zip(*arrays, strict=True) if lora_a.ndim == 3 else (arrays,):
                assert_product_of_slices(*expert, is_embedding=is_embedding)
            base[chunk, weight] = None
        duplicates = {rule.megatron for rule in table.rules if rule.is_duplicate}
        rest = [a for (_, n), a in base.items() if a is not None and n not in duplicates]
        assert not any(array.any() for array in rest), "an adapted weight has no factors"


@EVERYWHERE
def test_every_element_of_an_adapter_has_a_place_and_padding_is_never_filled(sizes):
    table, lora = plan_of("qwen3_moe_mixed", target_modules=ALL, modules_to_save=("norm",))
    factors, layout = adapter_table(table, lora), ParallelLayout(**sizes)
    held = {name: np.zeros(shape, dtype=int) for name, shape in hf_tensors(factors).items()}
    for rank in range(layout.world_size):
        for parameter in plan_rank(factors, layout=layout, rank=rank):
            counts = np.zeros(parameter.shape, dtype=int)
            for piece in parameter.pieces:
                add_boxes(held[piece.hf_name], piece.hf)
                add_boxes(counts if piece.expert is None else counts[piece.expert], piece.local)
            assert counts.max(initial=0) <= 1
            assert prod(parameter.shape) - counts.sum() == parameter.num_padding
    for name, count in held.items():
        assert count.min() == count.max() > 0, f"{name}: some elements have more holders"


def test_factors_of_a_fused_linear_are_padded_to_the_largest_rank():
    table, lora = plan_of("qwen3", target_modules=("q_proj", "v_proj", "o_proj"))
    qkv, proj = lora.linears
    assert [adapter and adapter.rank for adapter in qkv.adapters] == [2, None, 3]
    assert (qkv.sources, qkv.rank, qkv.kind, proj.kind) == ((0, 2), 3, "column", "row")
    layout = ParallelLayout(world_size=2, tp_size=2)
    plan = plan_rank(adapter_table(table, lora), layout=layout, rank=1)
    shapes = {parameter.name: parameter.shape for parameter in plan}
    layer = "decoder.layers.3.self_attention."
    assert shapes[layer + "linear_qkv.adapter.lora_a"] == (2 * 3, 64)
    assert shapes[layer + "linear_qkv.adapter.lora_b"] == ((4 * 32 + 2 * 2 * 32) // 2, 3)
    assert shapes[layer + "linear_proj.adapter.lora_a"] == (2, 4 * 32 // 2)
    assert shapes[layer + "linear_proj.adapter.lora_b"] == (64, 2)
    assert len(shapes) == 4 * 4


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_is_that_of_peft(use_rslora):
    config = peft.LoraConfig(r=6, lora_alpha=10, use_rslora=use_rslora, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    (expected,) = model.base_model.model[0].scaling.values()
    assert Adapter(rank=6, alpha=10, use_rslora=use_rslora).scale == expected


def peft_shapes(name, **options):
    """Names and shapes of the tensors that PEFT saves for a tiny model."""
    fields = tiny_config(name)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_config(config), peft.LoraConfig(**options)
    )
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", ["glm4", "gemma3", "phi3", "gpt2"])
def test_names_and_shapes_of_all_linears_are_those_of_peft(name):
    table, lora = plan_of(name, target_modules=("all-linear",), is_uneven=False)
    expected = peft_shapes(name, r=3, target_modules="all-linear")
    assert hf_tensors(adapter_table(table, lora)) == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_names_and_shapes_are_those_of_peft(name):
    targets = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]
    table, lora = plan_of(name, target_modules=tuple(targets), modules_to_save=("lm_head",))
    ranks = {
        module_name(tensor).split(".")[-1]: adapter.rank
        for linear in lora.linears
        for tensor, adapter in zip(linear.rule.hf, linear.adapters, strict=True)
        if adapter
    }
    expected = peft_shapes(
        name, r=1, rank_pattern=ranks, target_modules=targets, modules_to_save=["lm_head"]
    )
    assert hf_tensors(adapter_table(table, lora)) == expected


def test_experts_have_factors_each_and_saved_experts_their_names():
    table, lora = plan_of(
        "qwen3_moe_mixed", target_modules=("q_proj", "down_proj"), modules_to_save=("gate",)
    )
    shapes = hf_tensors(adapter_table(table, lora))
    module = f"{PEFT_PREFIX}model.layers.2.mlp."
    assert shapes[f"{module}experts.3.down_proj.lora_A.weight"] == (2, 48)
    assert shapes[f"{module}experts.3.down_proj.lora_B.weight"] == (64, 2)
    assert shapes[f"{module}gate.weight"] == (4, 64)
    num_experts = 3 * 4
    assert len(shapes) == 2 * (4 + num_experts + 1) + 3


def test_an_adapter_lies_on_the_stages_of_its_layers():
    table, lora = plan_of(
        "qwen3", target_modules=("embed_tokens", "layers.1.mlp.up_proj", "lm_head")
    )
    layout = ParallelLayout(world_size=4, pp_size=4)
    homes = locate_tensors(adapter_table(table, lora), layout=layout)
    stages = {
        home.name.split(".")[-3 if "lora_" in home.name else -2]: home.pp_rank for home in homes
    }
    assert stages == {"model": 0, "up_proj": 1, "lm_head": 3}


def test_a_plan_without_linears_holds_the_saved_modules_alone():
    table, lora = plan_of("llama", target_modules=("q_proj",), modules_to_save=("norm",))
    saved = adapter_table(table, LoraPlan(linears=(), modules_to_save=lora.modules_to_save))
    assert hf_tensors(saved) == {PEFT_PREFIX + "model.norm.weight": (64,)}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied"])
def test_an_embedding_that_is_the_output_layer_too_is_not_merged(name):
    table = weight_table(tiny_config(name))
    check_mergeable(table, choose_targets(table, TunerConfig()))
    embedding = choose_targets(table, TunerConfig(target_modules=("all-embedding",)))
    if name == "qwen3":
        check_mergeable(table, embedding)
    else:
        with pytest.raises(ValueError, match=r"model\.embed_tokens cannot be merged.*output layer"):
            check_mergeable(table, embedding)
