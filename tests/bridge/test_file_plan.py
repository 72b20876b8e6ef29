import time
from dataclasses import replace
from math import prod

import pytest

from mtrain.bridge.file_plan import cut_by_size, file_name, fixed_dtypes, plan_files
from mtrain.bridge.plan import hf_tensors, plan_rank, weight_table
from mtrain.bridge.sources import TensorShape
from mtrain.bridge.storage.arrangement import arrangements
from mtrain.bridge.storage.forms import stacked_experts
from mtrain.bridge.storage.stored_as import Carried, StoredAs
from mtrain.parallel import ParallelLayout
from tests.tiny import TINY, tiny_config

LAYOUTS = [
    {},
    {"world_size": 4},
    {"world_size": 8, "tp_size": 2, "pp_size": 2},
    {"world_size": 8, "tp_size": 2, "cp_size": 2},
    {"world_size": 4, "pp_size": 2, "vpp_size": 2, "ep_size": 2},
    {"world_size": 8, "tp_size": 2, "ep_size": 4, "etp_size": 1},
    {"world_size": 8, "tp_size": 1, "ep_size": 2, "etp_size": 2},
    {"world_size": 4, "tp_size": 2, "ep_size": 2, "etp_size": 2},
]


def files_for(name, layout, *, max_shard_size=50_000):
    table = weight_table(tiny_config(name))
    return plan_files(table, layout=layout, dtype="F32", max_shard_size=max_shard_size)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_tensor_is_in_one_file_whose_group_holds_all_of_it(name, sizes):
    """T24"""
    layout = ParallelLayout(**sizes)
    table = weight_table(tiny_config(name))
    held = []
    for rank in range(layout.world_size):
        plan = plan_rank(table, layout=layout, rank=rank)
        held.append(
            {piece.hf_name: p.split_over for p in plan if not p.is_duplicate for piece in p.pieces}
        )
    files = files_for(name, layout)
    names = [name for file in files for name, _, _ in file.tensors]
    assert sorted(names) == sorted(hf_tensors(table))
    for file in files:
        size = layout.tp_size if file.group == "tp" else layout.etp_size
        at = [layout.coordinates(rank) for rank in file.members]
        index = [c.tp_rank if file.group == "tp" else c.etp_rank for c in at]
        assert index == list(range(size))
        assert file.writer in file.members
        for tensor, _, _ in file.tensors:
            assert all(tensor in held[rank] for rank in file.members)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_files_stay_below_the_limit_unless_one_tensor_is_larger(sizes):
    files = files_for("qwen3_moe", ParallelLayout(**sizes))
    for file in files:
        assert file.num_bytes == sum(4 * prod(shape) for _, _, shape in file.tensors)
        assert file.num_bytes <= 50_000
    for file in files_for("qwen3_moe", ParallelLayout(**sizes), max_shard_size=1):
        assert len(file.tensors) == 1


def test_names_are_those_of_the_hub():
    (file,) = files_for("qwen3_moe", ParallelLayout(), max_shard_size=10**9)
    assert file.name == "model.safetensors"
    names = [file.name for file in files_for("llama", ParallelLayout(world_size=2, pp_size=2))]
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert names[-1] == f"model-{len(names):05}-of-{len(names):05}.safetensors"


def test_one_rank_writes_the_tensors_in_the_order_of_the_model():
    files = files_for("qwen3_moe", ParallelLayout())
    names = [name for file in files for name, _, _ in file.tensors]
    assert names == list(hf_tensors(weight_table(tiny_config("qwen3_moe"))))


def test_data_parallel_copies_share_the_work():
    files = files_for("llama", ParallelLayout(world_size=4, tp_size=2))
    assert len(files) > 4
    load = {rank: sum(f.num_bytes for f in files if f.writer == rank) for rank in range(4)}
    assert max(load.values()) - min(load.values()) <= 50_000


def test_experts_share_files_with_the_rest_where_one_group_holds_both():
    for sizes in ({}, {"world_size": 2, "tp_size": 2, "etp_size": 2}):
        files = files_for("qwen3_moe", ParallelLayout(**sizes), max_shard_size=10**9)
        assert [file.group for file in files] == ["tp"]


def stacked_form(table):
    """All experts of a layer in one tensor a projection."""
    forms = stacked_experts("model.layers.{layer}.mlp.experts.")
    return StoredAs(arrangements=tuple(a for form in forms for a in arrangements(table, form)))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_stacked_experts_have_a_writer_whose_group_holds_all_of_them(sizes):
    layout, table = ParallelLayout(**sizes), weight_table(tiny_config("qwen3_moe"))
    form = stacked_form(table)
    files = plan_files(table, layout=layout, dtype="F32", max_shard_size=50_000, form=form)
    entries = {name: shape for file in files for name, _, shape in file.entries}
    assert {name for name in entries if ".experts." in name} == {a.name for a in form.arrangements}
    gathered = [name for file in files for name, _, _ in file.tensors]
    assert sorted(gathered) == sorted(hf_tensors(table))
    for file in files:
        assert file.num_bytes == sum(4 * prod(shape) for _, _, shape in file.entries)
        if all(one.is_plain for one in file.stored):
            continue
        at = [layout.coordinates(rank) for rank in file.members]
        if layout.ep_size > 1:
            assert file.group == "ep"
            places = sorted((c.ep_rank, c.etp_rank) for c in at)
            size = layout.ep_size * layout.etp_size
            assert len(set(places)) == len(places) == size
            assert len({(c.pp_rank, c.edp_rank) for c in at}) == 1


def test_a_tensor_whose_dtype_is_fixed_keeps_it():
    table = weight_table(tiny_config("qwen3_moe"))
    router = next(rule for rule in table.rules if rule.megatron.endswith("router.weight"))
    (tensor,) = router.hf
    fixed = replace(router, hf=(replace(tensor, dtype="F32"),))
    table = replace(table, rules=tuple(fixed if rule is router else rule for rule in table.rules))
    names = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)}
    assert fixed_dtypes(table) == dict.fromkeys(names, "F32")
    files = plan_files(table, layout=ParallelLayout(), dtype="BF16", max_shard_size=10**9)
    for entries in ([e for f in files for e in f.entries], [t for f in files for t in f.tensors]):
        assert {name for name, dtype, _ in entries if dtype == "F32"} == names


def test_copies_go_to_the_ranks_with_the_least_to_write():
    table = weight_table(tiny_config("qwen3_moe"))
    copied = {f"extra.{index}": TensorShape("BF16", (100, 10)) for index in range(40)}
    form = StoredAs(carried=Carried(tensors=copied, source=None))
    layout = ParallelLayout(world_size=4, tp_size=2)
    files = plan_files(table, layout=layout, dtype="F32", max_shard_size=10_000, form=form)
    copies = [file for file in files if file.group == "copied"]
    assert [name for file in copies for name, _, _ in file.entries] == list(copied)
    assert {len(file.entries) for file in copies} == {5}
    assert len({file.writer for file in copies}) > 1
    assert len({file.name for file in files}) == len(files)


def test_a_thousand_ranks_are_planned_in_seconds():
    layout = ParallelLayout(world_size=1024, tp_size=4, pp_size=4, ep_size=4, etp_size=1)
    start = time.monotonic()
    files = files_for("qwen3_moe", layout)
    assert time.monotonic() - start < 5
    assert len({file.writer for file in files}) > 16


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([3, 3, 3], [[3, 3], [3]]),
        ([6], [[6]]),
        ([6, 1], [[6], [1]]),
        # One that is too large has a part for itself, also when it is the first or the last.
        ([9, 1, 2], [[9], [1, 2]]),
        ([1, 9], [[1], [9]]),
        ([7, 8], [[7], [8]]),
        ([1, 2, 3, 0, 0, 1], [[1, 2, 3, 0, 0], [1]]),
    ],
    ids=str,
)
def test_a_list_is_cut_in_order_into_parts_below_the_limit(sizes, parts):
    cut = list(cut_by_size(((str(size), size) for size in sizes), max_size=6))
    assert [list(map(int, items)) for items, _ in cut] == parts
    assert [total for _, total in cut] == [sum(part) for part in parts]


def test_files_are_numbered_from_one_where_there_are_several():
    assert file_name(1, 1, stem="model") == "model.safetensors"
    assert file_name(1, 2, stem="model") == "model-00001-of-00002.safetensors"
    assert file_name(12, 123456, stem="x") == "x-00012-of-123456.safetensors"
