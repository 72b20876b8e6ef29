"""Loading against the formulas of Megatron-Core, every rank of a layout in turn, no processes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.load import load_weights
from mtrain.bridge.plan import plan_rank, weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.stages import chunk_layers
from mtrain.parallel import ParallelLayout
from tests.bridge.standin import make_chunks, random_tensors, write_checkpoint
from tests.tiny import LLAMA_LIKE, tiny_config

LAYOUTS = [
    {},
    {"world_size": 4, "tp_size": 4},
    {"world_size": 4, "tp_size": 2, "pp_size": 2},
    {"world_size": 4, "pp_size": 2, "vpp_size": 2, "ep_size": 2},
    {"world_size": 4, "tp_size": 2, "ep_size": 4, "etp_size": 1},
    {"world_size": 4, "tp_size": 1, "ep_size": 2, "etp_size": 2},
]


def load_rank(folder, name, layout, rank, *, dtype=torch.float32, **changes):
    table = weight_table(tiny_config(name, **changes))
    plan = plan_rank(table, layout=layout, rank=rank)
    chunks = make_chunks(plan, num_chunks=layout.num_chunks, dtype=dtype)
    ignored = load_weights(chunks, open_checkpoint(folder), table=table, layout=layout, rank=rank)
    return chunks, ignored


def megatron_layer(hf, config, layer, layout, at):
    """Parameters of a layer on one rank, written down from Megatron-Core's conventions."""
    prefix = f"model.layers.{layer}."
    groups = config["num_key_value_heads"]

    def tensor(name):
        return hf[prefix + name]

    def rows(whole):
        return whole.chunk(layout.tp_size)[at.tp_rank]

    def fused(kind):
        parts = [tensor(f"self_attn.{name}_proj.{kind}") for name in "qkv"]
        parts = [part.unflatten(0, (groups, -1)) for part in parts]
        return rows(torch.cat(parts, dim=1).flatten(0, 1))

    def gated(name, size, rank):
        halves = [tensor(f"{name}.{half}_proj.weight") for half in ("gate", "up")]
        return torch.cat([half.chunk(size)[rank] for half in halves])

    def columns(name, size, rank):
        return tensor(name).chunk(size, dim=1)[rank]

    expected = {
        "input_layernorm.weight": tensor("input_layernorm.weight"),
        "pre_mlp_layernorm.weight": tensor("post_attention_layernorm.weight"),
        "self_attention.linear_qkv.weight": fused("weight"),
        "self_attention.linear_proj.weight": columns(
            "self_attn.o_proj.weight", layout.tp_size, at.tp_rank
        ),
    }
    if prefix + "self_attn.q_proj.bias" in hf:
        expected["self_attention.linear_qkv.bias"] = fused("bias")
    for which in "qk":
        if f"{prefix}self_attn.{which}_norm.weight" in hf:
            name = f"self_attention.{which}_layernorm.weight"
            expected[name] = tensor(f"self_attn.{which}_norm.weight")
    if prefix + "mlp.gate.weight" not in hf:
        expected["mlp.linear_fc1.weight"] = gated("mlp", layout.tp_size, at.tp_rank)
        expected["mlp.linear_fc2.weight"] = columns(
            "mlp.down_proj.weight", layout.tp_size, at.tp_rank
        )
        return expected
    num_local = config["num_experts"] // layout.ep_size
    local = [f"mlp.experts.{at.ep_rank * num_local + i}" for i in range(num_local)]
    expected["mlp.router.weight"] = tensor("mlp.gate.weight")
    expected["mlp.experts.linear_fc1.weight"] = torch.stack(
        [gated(name, layout.etp_size, at.etp_rank) for name in local]
    )
    expected["mlp.experts.linear_fc2.weight"] = torch.stack(
        [columns(f"{name}.down_proj.weight", layout.etp_size, at.etp_rank) for name in local]
    )
    return expected


def padded_rows(whole, layout, at):
    missing = -len(whole) % layout.tp_size
    return torch.cat([whole, whole.new_zeros(missing, whole.shape[1])]).chunk(layout.tp_size)[
        at.tp_rank
    ]


def expected_chunks(hf, config, layout, rank):
    at = layout.coordinates(rank)
    chunks = []
    num_layers = config["num_hidden_layers"]
    for layers in chunk_layers(num_layers, layout=layout, pp_rank=at.pp_rank):
        chunk = {
            f"decoder.layers.{layer - layers.start}.{name}": value
            for layer in layers
            for name, value in megatron_layer(hf, config, layer, layout, at).items()
        }
        embedding = hf["model.embed_tokens.weight"]
        if layers.start == 0:
            chunk["embedding.word_embeddings.weight"] = padded_rows(embedding, layout, at)
        if layers.stop == num_layers:
            chunk["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
            if not config["tie_word_embeddings"] or layout.pp_size > 1:
                head = hf.get("lm_head.weight", embedding)
                chunk["output_layer.weight"] = padded_rows(head, layout, at)
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_rank_holds_what_megatron_expects(tmp_path, name, sizes):
    """T24, with more tensor-parallel ranks than query groups and an odd vocabulary."""
    layout = ParallelLayout(**sizes)
    hf = random_tensors(name)
    write_checkpoint(tmp_path, hf, num_files=3)
    for rank in range(layout.world_size):
        chunks, _ = load_rank(tmp_path, name, layout, rank)
        expected = expected_chunks(hf, tiny_config(name), layout, rank)
        for chunk, values in zip(chunks, expected, strict=True):
            parameters = dict(chunk.named_parameters())
            assert parameters.keys() == values.keys()
            for key, value in values.items():
                assert torch.equal(parameters[key], value), (rank, key)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_values_take_the_dtype_of_the_parameter(tmp_path, stored, wanted):
    hf = random_tensors("llama", dtype=stored)
    write_checkpoint(tmp_path, hf)
    (chunk,), _ = load_rank(tmp_path, "llama", ParallelLayout(), 0, dtype=wanted)
    weight = chunk.get_parameter("decoder.layers.0.mlp.linear_fc2.weight")
    assert weight.dtype == wanted
    assert torch.equal(weight, hf["model.layers.0.mlp.down_proj.weight"].to(wanted))


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def rename(tensors):
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def duplicate(tensors):
    copy = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    tensors["model.layers.4.mlp.up_proj.weight"] = copy


def reshape(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].reshape(64, 96)


def swap(tensors):
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    tensors[up], tensors[down] = tensors[down], tensors[up]


@pytest.mark.parametrize("fault", [drop, rename, duplicate, reshape, swap])
def test_a_faulty_checkpoint_is_refused_alike_on_every_rank(tmp_path, fault):
    """T23: also on the ranks that need none of the faulty tensors."""
    hf = random_tensors("qwen2")
    fault(hf)
    write_checkpoint(tmp_path, hf, num_files=2)
    layout = ParallelLayout(world_size=4, tp_size=2, pp_size=2)
    messages = set()
    for rank in range(4):
        with pytest.raises(ValueError, match=r"does not fit its config.json: ") as caught:
            load_rank(tmp_path, "qwen2", layout, rank)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "model.layers." in messages.pop()


def test_tensors_of_one_shape_in_each_others_files_are_found(tmp_path):
    """T23: what no shape can show, the index does."""
    write_checkpoint(tmp_path, random_tensors("qwen2"), num_files=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gate = "model.layers.1.mlp.gate_proj.weight"
    index["weight_map"][gate] = f"{1 - int(index['weight_map'][gate][0])}.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"does not hold tensor '{gate}'"):
        load_rank(tmp_path, "qwen2", ParallelLayout(), 0)


def test_a_parameter_of_the_model_that_no_tensor_fills_is_refused(tmp_path):
    """T23"""
    write_checkpoint(tmp_path, random_tensors("llama"))
    table = weight_table(tiny_config("llama"))
    plan = plan_rank(table, layout=ParallelLayout(), rank=0)
    (chunk,) = make_chunks(plan, num_chunks=1, dtype=torch.float32)
    chunk.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="no rule fills: extra"):
        load_weights(
            [chunk],
            open_checkpoint(tmp_path),
            table=table,
            layout=ParallelLayout(),
            rank=0,
        )


def test_a_head_on_disk_of_a_tied_model_must_be_the_embedding(tmp_path):
    """T24"""
    hf = random_tensors("llama3_tied")
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, hf)
    _, ignored = load_rank(tmp_path, "llama3_tied", ParallelLayout(), 0)
    assert list(ignored) == ["lm_head.weight"]
    hf["lm_head.weight"][130, 63] += 1
    write_checkpoint(tmp_path, hf)
    with pytest.raises(ValueError, match=r"lm_head.weight should be a copy of model.embed_tokens"):
        load_rank(tmp_path, "llama3_tied", ParallelLayout(), 0)


def test_a_file_without_alignment_is_read_all_the_same(tmp_path):
    """Old writers did not pad the header."""
    hf = random_tensors("llama")
    write_checkpoint(tmp_path, hf)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    (chunk,), _ = load_rank(tmp_path, "llama", ParallelLayout(), 0)
    weight = chunk.get_parameter("decoder.layers.3.mlp.linear_fc2.weight")
    assert torch.equal(weight, hf["model.layers.3.mlp.down_proj.weight"])


def test_loading_leaves_the_files_as_they_are(tmp_path):
    hf = random_tensors("llama")
    save_file(hf, tmp_path / "model.safetensors")
    (chunk,), _ = load_rank(tmp_path, "llama", ParallelLayout(), 0)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.zero_()
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[key], hf[key]) for key in hf)
