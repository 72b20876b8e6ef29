"""Plans as pure arithmetic: coverage over many layouts, and the published sizes."""

import subprocess
import sys
import time
from math import prod

import numpy as np
import pytest

from mtrain.bridge.plan import hf_tensors, locate_tensors, plan_rank, weight_table
from mtrain.bridge.rules import HFTensor, Padded, Rule, Spaced, WeightTable
from mtrain.parallel import ParallelLayout
from tests.tiny import TINY, tiny_config

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}
QWEN3_30B = {
    **QWEN3_8B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
LAYOUTS = [
    {},
    {"world_size": 4, "tp_size": 4},
    {"world_size": 8, "tp_size": 2, "pp_size": 2},
    {"world_size": 4, "pp_size": 4},
    {"world_size": 4, "pp_size": 2, "vpp_size": 2},
    {"world_size": 2, "pp_size": 2, "num_layers_in_first_stage": 1},
    {"world_size": 8, "tp_size": 2, "ep_size": 4, "etp_size": 1},
    {"world_size": 4, "tp_size": 1, "ep_size": 2, "etp_size": 2},
    {"world_size": 16, "tp_size": 2, "pp_size": 2, "ep_size": 2, "etp_size": 2, "vpp_size": 2},
    {"world_size": 8, "tp_size": 2, "cp_size": 2},
]


def rows_of(span):
    starts = span.start + np.arange(span.count) * span.step
    return (starts[:, None] + np.arange(span.size)).ravel()


def add_boxes(array, box):
    array[np.ix_(*(rows_of(span) for span in box))] += 1


def count_owners(table, layout):
    """How often each element of each Hugging Face tensor is held by a first copy."""
    counts = {name: np.zeros(shape, int) for name, shape in hf_tensors(table).items()}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        for parameter in plan_rank(table, layout=layout, rank=rank):
            is_expert = any(piece.expert is not None for piece in parameter.pieces)
            is_copy = at.edp_rank > 0 if is_expert else (at.dp_rank > 0 or at.cp_rank > 0)
            shard = at.etp_rank if is_expert else at.tp_rank
            is_replica = parameter.split_over is None and shard > 0
            if not (is_copy or is_replica or parameter.is_duplicate):
                for piece in parameter.pieces:
                    add_boxes(counts[piece.hf_name], piece.hf)
    return counts


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_element_has_one_owner(name, sizes):
    """T23, T24"""
    table = weight_table(tiny_config(name))
    for tensor, count in count_owners(table, ParallelLayout(**sizes)).items():
        assert (count == 1).all(), tensor


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_parameter_is_filled_once_but_for_padding(name, sizes):
    """T23"""
    layout = ParallelLayout(**sizes)
    for rank in range(layout.world_size):
        plan = plan_rank(weight_table(tiny_config(name)), layout=layout, rank=rank)
        assert len({(p.chunk, p.name) for p in plan}) == len(plan)
        for parameter in plan:
            counts = np.zeros(parameter.shape, int)
            for piece in parameter.pieces:
                add_boxes(counts if piece.expert is None else counts[piece.expert], piece.local)
            assert counts.max() == 1 or parameter.num_padding == prod(parameter.shape)
            assert (counts == 0).sum() == parameter.num_padding
            assert (
                not parameter.num_padding
                or "word_emb" in parameter.name
                or "outp" in parameter.name
            )


def test_a_thousand_ranks_cover_everything_in_seconds():
    """T24"""
    config = tiny_config("qwen3_moe", num_hidden_layers=16, num_experts=16, intermediate_size=128)
    layout = ParallelLayout(
        world_size=1024, tp_size=4, pp_size=8, vpp_size=2, ep_size=8, etp_size=2
    )
    start = time.monotonic()
    counts = count_owners(weight_table(config), layout)
    assert all((count == 1).all() for count in counts.values())
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("config", "number"), [(QWEN3_8B, 399), (QWEN3_30B, 18_867)])
def test_published_sizes_expand_in_a_second(config, number):
    """T24"""
    start = time.monotonic()
    table = weight_table(config)
    assert len(hf_tensors(table)) == number
    plan_rank(table, layout=ParallelLayout(), rank=0)
    assert time.monotonic() - start < 1


def test_stored_names_differ_in_the_norms_alone():
    table = weight_table(tiny_config("qwen3_moe_mixed"))
    names = {
        uses_stored_names: {
            parameter.name
            for parameter in plan_rank(
                table, layout=ParallelLayout(), rank=0, uses_stored_names=uses_stored_names
            )
        }
        for uses_stored_names in (True, False)
    }
    layer = "decoder.layers.{}.".format
    assert names[True] - names[False] == {
        *(layer(i) + "self_attention.linear_qkv.layer_norm_weight" for i in range(4)),
        layer(1) + "mlp.linear_fc1.layer_norm_weight",
    }
    assert names[False] - names[True] == {
        *(layer(i) + "input_layernorm.weight" for i in range(4)),
        layer(1) + "pre_mlp_layernorm.weight",
    }


def test_layer_numbers_count_from_the_first_layer_of_the_chunk():
    layout = ParallelLayout(world_size=2, pp_size=2, vpp_size=2)
    plan = plan_rank(weight_table(tiny_config("llama")), layout=layout, rank=1)
    sources = {
        (p.chunk, p.name): p.pieces[0].hf_name
        for p in plan
        if p.name.endswith("linear_proj.weight")
    }
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert sources == {
        (0, name): "model.layers.1.self_attn.o_proj.weight",
        (1, name): "model.layers.3.self_attn.o_proj.weight",
    }


@pytest.mark.parametrize(("pp_size", "expected"), [(1, []), (2, ["output_layer.weight"])])
def test_a_tied_model_has_a_second_embedding_on_the_last_of_several_stages(pp_size, expected):
    layout = ParallelLayout(world_size=pp_size, pp_size=pp_size)
    plan = plan_rank(weight_table(tiny_config("llama3_tied")), layout=layout, rank=pp_size - 1)
    duplicates = [parameter for parameter in plan if parameter.is_duplicate]
    assert [parameter.name for parameter in duplicates] == expected
    assert all(p.pieces[0].hf_name == "model.embed_tokens.weight" for p in duplicates)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_the_order_and_the_shapes_of_tensors_do_not_depend_on_the_layout(sizes):
    table = weight_table(tiny_config("qwen3_moe"))
    homes = list(locate_tensors(table, layout=ParallelLayout(**sizes)))
    assert [(home.name, home.shape) for home in homes] == list(hf_tensors(table).items())


@pytest.mark.parametrize(
    ("name", "changes", "sizes", "message"),
    [
        ("qwen3_moe", {"num_experts": 3}, {"ep_size": 2}, "experts.linear_fc1.weight: 3 rows"),
        ("llama", {"intermediate_size": 90}, {"tp_size": 4}, "linear_fc1.weight: 90 rows"),
        ("qwen3_moe", {"moe_intermediate_size": 30}, {"etp_size": 4}, "fc1.weight: 30 rows"),
        ("llama", {}, {"pp_size": 3}, "4 layers cannot be spread"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_the_parameter(name, changes, sizes, message):
    layout = ParallelLayout(world_size=prod(sizes.values()), **sizes)
    with pytest.raises(ValueError, match=message):
        plan_rank(weight_table(tiny_config(name, **changes)), layout=layout, rank=0)


def fill(rule, sources, *, tp_size, rank):
    """The one parameter of a rank, filled from tensors by name; elements not filled are -1."""
    layout = ParallelLayout(world_size=tp_size, tp_size=tp_size)
    table = WeightTable(num_layers=1, rules=(rule,))
    (parameter,) = plan_rank(table, layout=layout, rank=rank)
    array = np.full(parameter.shape, -1)
    for piece in parameter.pieces:
        target = array if piece.expert is None else array[piece.expert]
        box = np.ix_(*map(rows_of, piece.hf))
        target[np.ix_(*map(rows_of, piece.local))] = sources[piece.hf_name][box]
    assert parameter.num_padding == (array == -1).sum()
    return array


def numbers(*shape, start=0):
    return start + np.arange(prod(shape)).reshape(shape)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_narrower_sources_leave_padding_on_the_right(tp_size):
    sources = {"a": numbers(4, 3), "b": numbers(2, 5, start=100), "c": numbers(2, 4, start=200)}
    tensors = tuple(HFTensor(name, array.shape) for name, array in sources.items())
    rule = Rule(megatron="w", hf=tensors, split="rows", place="first")
    padded = [
        np.pad(array, ((0, 0), (0, 5 - array.shape[1])), constant_values=-1)
        for array in sources.values()
    ]
    for rank in range(tp_size):
        expected = np.concatenate([np.split(array, tp_size)[rank] for array in padded])
        np.testing.assert_array_equal(fill(rule, sources, tp_size=tp_size, rank=rank), expected)


def test_sources_of_different_width_and_height_may_be_stacked_experts():
    sources = {
        f"{name}{expert}": numbers(*shape, start=100 * expert + start)
        for expert in range(2)
        for name, shape, start in (("a", (1, 3), 0), ("b", (2, 2), 50))
    }
    rule = Rule(
        megatron="w",
        hf=(HFTensor("a{expert}", (1, 3)), HFTensor("b{expert}", (2, 2))),
        layout=Spaced(2),
        layers=(0,),
        num_experts=2,
    )
    expected = [
        [[0, 1, 2], [-1, -1, -1], [50, 51, -1], [52, 53, -1]],
        [[100, 101, 102], [-1, -1, -1], [150, 151, -1], [152, 153, -1]],
    ]
    for rank in range(2):
        np.testing.assert_array_equal(fill(rule, sources, tp_size=2, rank=rank), expected)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_split_columns_may_be_padded(tp_size):
    sources = {"a": numbers(3, 131)}
    rule = Rule(
        megatron="w",
        hf=(HFTensor("a", (3, 131)),),
        layout=Padded(),
        split="columns",
        place="first",
    )
    shards = [fill(rule, sources, tp_size=tp_size, rank=rank) for rank in range(tp_size)]
    assert len({shard.shape for shard in shards}) == 1
    together = np.concatenate(shards, axis=1)
    assert together.shape[1] - 131 < tp_size
    np.testing.assert_array_equal(together[:, :131], sources["a"])
    assert (together[:, 131:] == -1).all()


def test_planning_needs_no_torch():
    code = (
        "import sys; from mtrain.bridge.plan import *; from mtrain.bridge.file_plan import *;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
