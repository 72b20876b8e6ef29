"""Chunks cover every parameter once, ranks share them, and a part of a parameter is made alone."""

import re

import pytest
import torch

from mtrain.bridge.converted import converted
from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.checkpoint.torch_dist.streaming import units
from mtrain.checkpoint.torch_dist.streaming.units import plan_units, units_of_rank
from mtrain.lora.adapter_weights import adapter_weights
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import adapter_table
from tests.lora.peft_folders import random_values, uniform_plan, write_adapter
from tests.megatron import read_config
from tests.tiny import make_checkpoint

FAMILIES = ("llama3_tied", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed")
SMALL = 1000
LINEARS = ("embed_tokens", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=[*FAMILIES, "adapter", "adapter_mixed"])
def stored(request, tmp_path_factory):
    """The weights of a model or of an adapter, and their table."""
    name = request.param.replace("adapter", "qwen3_moe")
    root = tmp_path_factory.mktemp(request.param)
    folder = make_checkpoint(root / "hf", name)
    table = weight_table(read_config(folder))
    if name == request.param:
        return table, open_checkpoint(folder)
    lora = uniform_plan(table, *LINEARS, modules_to_save=("lm_head.weight",))
    write_adapter(root / "adapter", lora, table, random_values(lora, table))
    of_adapter = adapter_table(table, lora)
    return of_adapter, adapter_weights(read_adapter(root / "adapter", table), of_adapter)


def cut_into(monkeypatch, num_bytes: int) -> None:
    monkeypatch.setattr(units, "_CHUNK_BYTES", num_bytes)


def filled_tensors(planned, source):
    """Global tensors put together from their chunks; how often each place was written."""
    values, counts = {}, {}
    for unit in planned:
        sharded = unit.sharded()
        if sharded.key not in values:
            values[sharded.key] = torch.full(sharded.global_shape, float("nan"))
            counts[sharded.key] = torch.zeros(sharded.global_shape, dtype=torch.int64)
        made = unit.make(source)
        box = tuple(
            slice(start, start + size)
            for start, size in zip(sharded.global_offset, made.shape, strict=True)
        )
        assert made.shape == (*[1] * sharded.prepend_axis_num, *sharded.local_shape)
        values[sharded.key][box] = made
        counts[sharded.key][box] += 1
    return values, counts


def test_units_cover_every_parameter_once_however_they_are_cut(stored, monkeypatch) -> None:
    table, weights = stored
    with weights.open() as source:
        whole, whole_counts = filled_tensors(plan_units(table, weights), source)
        cut_into(monkeypatch, SMALL)
        small_units = plan_units(table, weights)
        parts, part_counts = filled_tensors(small_units, source)
    assert len(small_units) > len(whole)
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert (whole_counts[key] == 1).all()
        assert (part_counts[key] == 1).all()
        assert not value.isnan().any()
        assert torch.equal(parts[key], value)
    # What is tied is stored once; only projections without an adapter (here k_proj) are zeros.
    num_values = sum(torch.Size(shape).numel() for shape in hf_tensors(table).values())
    assert sum(int(value.count_nonzero()) for value in whole.values()) == num_values


@pytest.mark.parametrize("world_size", [1, 3, 200])
def test_ranks_take_disjoint_runs_that_together_are_all(stored, monkeypatch, world_size) -> None:
    table, weights = stored
    cut_into(monkeypatch, SMALL)
    planned = plan_units(table, weights)
    shares = [
        units_of_rank(planned, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert [unit for share in shares for unit in share] == planned
    sizes = [sum(unit.num_bytes for unit in share) for share in shares]
    largest = max(unit.num_bytes for unit in planned)
    assert max(sizes) <= sum(sizes) / world_size + largest


def test_rows_are_cut_into_equal_parts(stored, monkeypatch) -> None:
    """As Megatron-Core wants them."""
    table, weights = stored
    cut_into(monkeypatch, SMALL)
    planned = plan_units(table, weights)
    rows = {}
    for unit in planned:
        rows.setdefault((unit.parameter.key(stacked=False), unit.expert), []).append(unit)
    cut = 0
    for of_parameter in rows.values():
        shape = of_parameter[0].parameter.shape
        size, others = of_parameter[0].shape[0], of_parameter[0].shape[1:]
        assert {unit.shape for unit in of_parameter} == {(size, *others)}
        assert others == shape[1:]
        assert [unit.start for unit in of_parameter] == list(range(0, shape[0], size))
        assert size * len(of_parameter) == shape[0]
        assert of_parameter[0].num_bytes <= SMALL
        cut += len(of_parameter) > 1
    assert cut


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((8, 25), 8),
        ((100, 50), 5),
        ((6, 100), 2),
        ((131, 50), 1),
        ((1,), 1),
        ((250,), 250),
        ((500,), 250),
        # A prime number of rows, and single rows were too small.
        ((131, 4), 131),
    ],
)
def test_a_chunk_has_as_many_rows_as_fit(monkeypatch, shape, rows) -> None:
    cut_into(monkeypatch, SMALL)
    assert units._rows_at_once(shape, itemsize=4) == rows


def test_tensors_of_a_parameter_in_several_dtypes_are_stored_in_one_that_holds_all(
    tmp_path,
) -> None:
    folder = make_checkpoint(tmp_path / "hf", "qwen2")
    weights = open_checkpoint(folder)
    table = weight_table(read_config(folder))
    dtypes = {name: "BF16" if ".q_proj." in name else "F32" for name in weights.tensors}
    dtypes |= {name: "F16" for name in weights.tensors if ".o_proj." in name}
    found = {
        re.sub(r"\.\d+\.", ".", unit.parameter.key(stacked=False)): unit.dtype
        for unit in plan_units(table, converted(weights, dtypes))
    }
    assert found["decoder.layers.self_attention.linear_qkv.weight"] == torch.float32
    assert found["decoder.layers.self_attention.linear_proj.weight"] == torch.float16


def names_of_states(table, weights) -> list[str]:
    """Names without the numbers of layers."""
    states = [state for unit in plan_units(table, weights) for state in unit.empty_states()]
    keys = [state.unique_key for state in states]
    assert len(set(keys)) == len(keys)
    return sorted({re.sub(r"layers\.\d+\.", "layers.", state.key) for state in states})


ATTENTION = [
    "decoder.layers.self_attention.core_attention._extra_state",
    "decoder.layers.self_attention.linear_proj._extra_state",
    "decoder.layers.self_attention.linear_qkv._extra_state",
]
MLP = ["decoder.layers.mlp.linear_fc1._extra_state", "decoder.layers.mlp.linear_fc2._extra_state"]
QK_NORMS = [
    "decoder.layers.self_attention.k_layernorm._extra_state",
    "decoder.layers.self_attention.q_layernorm._extra_state",
]
EXPERTS = [
    "decoder.layers.mlp.experts.experts.linear_fc1._extra_state",
    "decoder.layers.mlp.experts.experts.linear_fc2._extra_state",
    "decoder.layers.pre_mlp_layernorm._extra_state",
]
FINAL = ["decoder.final_layernorm._extra_state"]
STATES = {
    "llama3_tied": [*ATTENTION, *MLP, *FINAL],
    "qwen2": [*ATTENTION, *MLP, *FINAL],
    "qwen3": [*ATTENTION, *MLP, *QK_NORMS, *FINAL],
    "qwen3_moe": [*ATTENTION, *EXPERTS, *QK_NORMS, *FINAL],
    "qwen3_moe_mixed": [*ATTENTION, *EXPERTS, *MLP, *QK_NORMS, *FINAL],
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk_bytes", [SMALL, 2**24])
def test_modules_of_transformer_engine_have_an_empty_state(
    tmp_path, monkeypatch, name, chunk_bytes
) -> None:
    """Not the router, the embedding and the output layer; one each, however weights are cut."""
    folder = make_checkpoint(tmp_path / "hf", name)
    table = weight_table(read_config(folder))
    cut_into(monkeypatch, chunk_bytes)
    assert names_of_states(table, open_checkpoint(folder)) == sorted(STATES[name])
