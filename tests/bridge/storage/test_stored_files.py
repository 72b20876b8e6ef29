"""What was loaded from another form is saved in it, over all layouts, to the byte."""

import json
from dataclasses import replace

import pytest
import torch

from mtrain.bridge.load import load_weights
from mtrain.bridge.plan import plan_rank
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.safetensors_writer import DeferredWriter
from mtrain.bridge.save import lookup_in, save_weights
from mtrain.bridge.slices import tensors_by_name
from mtrain.bridge.storage.arrangement import as_it_is, native_arrangements
from mtrain.bridge.storage.stored_as import CANONICAL, stored_as
from mtrain.bridge.storage.stored_files import AssembledFile, CopiedFile
from mtrain.bridge.storage.view import arranged
from mtrain.bridge.written import record_file
from mtrain.parallel import ParallelLayout
from tests.bridge.standin import make_chunks
from tests.bridge.storage.checkpoints import (
    assert_same_bytes,
    gpt2,
    gpt2_table,
    gpt_oss,
    gpt_oss_table,
    load_and_save,
    qwen3_moe,
    qwen3_moe_table,
    rewritten,
    tensors_of,
)
from tests.bridge.storage.quantized import BLOCKS, quantized_copy
from tests.ranks import run_ranks

DENSE = [
    {},
    {"world_size": 2},
    {"world_size": 2, "tp_size": 2},
    {"world_size": 4, "tp_size": 2, "pp_size": 2},
]
EXPERTS = [
    {"world_size": 4, "ep_size": 4},
    {"world_size": 4, "tp_size": 2, "ep_size": 2},
    {"world_size": 4, "tp_size": 2, "ep_size": 2, "etp_size": 2},
    {"world_size": 4, "ep_size": 2, "etp_size": 2},
    {"world_size": 4, "pp_size": 2, "ep_size": 2},
    {"world_size": 4, "ep_size": 2},
]
MODELS = {
    "qwen3_moe": (qwen3_moe, qwen3_moe_table),
    "gpt_oss": (gpt_oss, gpt_oss_table),
    "gpt2": (gpt2, gpt2_table),
}
CASES = [
    *(("qwen3_moe", "float32", sizes) for sizes in [*DENSE, *EXPERTS]),
    *(("gpt_oss", "bfloat16", sizes) for sizes in [*DENSE, *EXPERTS]),
    *(("gpt2", "float32", sizes) for sizes in DENSE),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Makes each checkpoint once."""
    root = tmp_path_factory.mktemp("sources")

    def get(name, dtype):
        folder = root / f"{name}-{dtype}"
        if not folder.exists():
            options = {} if name == "gpt2" else {"dtype": dtype}
            MODELS[name][0](folder, **options)
        return folder

    return get


@pytest.mark.parametrize(("name", "dtype", "sizes"), CASES, ids=str)
def test_load_then_save_gives_the_same_bytes_in_the_same_form(
    sources, tmp_path, name, dtype, sizes
):
    """In buckets that cut tensors, into several files, some of them copies of the source."""
    source, table = sources(name, dtype), MODELS[name][1]()
    answers = run_ranks(
        ParallelLayout(**sizes), load_and_save, table, source, tmp_path, getattr(torch, dtype)
    )
    assert_same_bytes(tmp_path, source)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert open_checkpoint(tmp_path).notes == ()
    records = [file for of_rank in answers for file in of_rank]
    assert {file.name for file in records} == {path.name for path in tmp_path.iterdir()}
    for file in records:
        assert record_file(tmp_path, tmp_path / file.name).digest == file.digest


@pytest.mark.parametrize("sizes", [DENSE[0], DENSE[3], EXPERTS[2], EXPERTS[5]], ids=str)
@pytest.mark.parametrize("is_stacked", [False, True], ids=["one by one", "stacked"])
def test_8_bit_weights_that_were_not_trained_are_saved_to_the_byte(tmp_path, sizes, is_stacked):
    """Values, factors and what is not quantised; blocks at the edges are smaller."""
    source = qwen3_moe(tmp_path / "plain", is_original=not is_stacked, dtype="bfloat16")
    quantized = quantized_copy(source, tmp_path / "quantized")
    names = {name for name in tensors_of(quantized) if name.endswith("_scale_inv")}
    assert any("experts" in name for name in names)
    target = tmp_path / "saved"
    target.mkdir()
    run_ranks(
        ParallelLayout(**sizes),
        _save_fp8,
        qwen3_moe_table(),
        quantized,
        target,
    )
    assert_same_bytes(target, quantized)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    stored = tensors_of(quantized)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


def _save_fp8(state, *arguments):
    load_and_save(state, *arguments, torch.bfloat16, keeps_fp8=True, blocks=BLOCKS)


def test_8_bit_weights_are_saved_in_bfloat16_when_nobody_asks_for_8_bits(tmp_path):
    source = qwen3_moe(tmp_path / "plain", is_original=True, dtype="bfloat16")
    quantized = quantized_copy(source, tmp_path / "quantized")
    target = tmp_path / "saved"
    target.mkdir()
    run_ranks(ParallelLayout(), _save_bf16, qwen3_moe_table(), quantized, target)
    saved, plain = tensors_of(target), tensors_of(source)
    assert saved.keys() == plain.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(saved[name].float(), plain[name].float(), rtol=0.07, atol=0.01)
    assert not torch.equal(saved[name], plain[name])


def _save_bf16(state, *arguments):
    load_and_save(state, *arguments, torch.bfloat16, blocks=BLOCKS)


def test_a_copied_file_has_the_bytes_of_the_source(tmp_path):
    tensors = {
        "a": torch.randn(7, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    (tmp_path / "config.json").write_text("{}")
    source = rewritten(tmp_path, tmp_path / "source", tensors)
    checkpoint = open_checkpoint(source)
    entries = [(name, one.dtype, one.shape) for name, one in checkpoint.tensors.items()]
    (tmp_path / "out").mkdir()
    written = CopiedFile(tmp_path / "out" / "x.safetensors", entries, checkpoint).written
    assert written.digest == record_file(tmp_path / "out", tmp_path / "out/x.safetensors").digest
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("size", [1, 5, 16, 1000])
def test_tensors_may_arrive_in_parts_of_any_size(tmp_path, size):
    """And slabs without elements are nothing to wait for."""
    (stacked,) = [
        one
        for one in native_arrangements(gpt_oss_table())
        if one.name.endswith("0.mlp.experts.down_proj")
    ]
    shapes = {"first": (3, 2), "none": (0, 5), "last": (4,)}
    plain = [as_it_is(name, shape) for name, shape in shapes.items()]
    stored = [plain[0], stacked, plain[1], plain[2]]
    values = {name: torch.randn(shape) for one in stored for name, shape in one.canonical}
    tensors = [(name, "F32", shape) for one in stored for name, shape in one.canonical]
    entries = [(one.name, "F32", one.shape) for one in stored]
    data = torch.cat([values[name].flatten() for name, _, _ in tensors]).view(torch.uint8)
    with AssembledFile(
        DeferredWriter(tmp_path / "x.safetensors", entries), stored, tensors, CANONICAL
    ) as file:
        for part in data.split(size * 7):
            file.append(part)
    assert set(file.written.tensors) == {one.name for one in stored}
    found = tensors_of(tmp_path)
    for name in shapes:
        assert torch.equal(found[name], values[name])
    experts = [values[names[0]].t() for names in stacked.slabs]
    assert torch.equal(found[stacked.name], torch.stack(experts))


def _save_mixed(state, source, target):
    """Half precision, and experts' biases in float32."""
    table = _mixed_table()
    plan = plan_rank(table, layout=state.layout, rank=state.rank)
    chunks = make_chunks(plan, num_chunks=1, dtype=torch.bfloat16)
    for name, parameter in chunks[0].named_parameters():
        if name.endswith("linear_fc1.bias"):
            parameter.data = parameter.data.float()
    weights = arranged(open_checkpoint(source), table)
    load_weights(chunks, weights, table=table, layout=state.layout, rank=state.rank)
    save_weights(
        lookup_in(tensors_by_name(chunks)),
        target,
        table=table,
        state=state,
        dtype=torch.bfloat16,
        max_shard_size=20_000,
        bucket_bytes=3_000,
        form=stored_as(weights, table, keeps_fp8=False),
    )()


def _mixed_table():
    table = gpt_oss_table()
    rules = [
        replace(rule, hf=tuple(replace(tensor, dtype="F32") for tensor in rule.hf))
        if rule.megatron.endswith("linear_fc1.bias")
        else rule
        for rule in table.rules
    ]
    return replace(table, rules=tuple(rules))


@pytest.mark.parametrize("sizes", [DENSE[0], EXPERTS[2]], ids=str)
def test_tensors_whose_dtype_is_fixed_are_saved_in_it(sources, tmp_path, sizes):
    plain = sources("gpt_oss", "bfloat16")
    tensors = {
        name: torch.randn(tensor.shape) if name.endswith("gate_up_proj_bias") else tensor
        for name, tensor in tensors_of(plain).items()
    }
    source, target = rewritten(plain, tmp_path / "source", tensors), tmp_path / "target"
    target.mkdir()
    run_ranks(ParallelLayout(**sizes), _save_mixed, source, target)
    assert_same_bytes(target, source)
