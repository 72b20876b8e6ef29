"""Tiny checkpoints in other forms, written by transformers, and tables of what is in them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.load import load_weights
from mtrain.bridge.plan import plan_rank, weight_table
from mtrain.bridge.rules import HFTensor, IgnoredKey, Interleaved, Rule, WeightTable
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.save import lookup_in, save_weights
from mtrain.bridge.slices import tensors_by_name
from mtrain.bridge.storage.forms import StorageForm, stacked_experts, transposed
from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.bridge.storage.stored_as import stored_as
from mtrain.bridge.storage.view import arranged
from tests.bridge.standin import make_chunks
from tests.tiny import tiny_config

EXPERTS = "model.layers.{layer}.mlp.experts."
OTHERS = IgnoredKey(r"(?!.*\.experts\.).*", "not part of this table", is_carried=True)
HIDDEN, WIDTH, NUM_EXPERTS, NUM_LAYERS = 32, 48, 4, 2


def write_model(folder: Path, *, is_original: bool = False, **fields: Any) -> Path:
    """A random model as transformers has it in memory (experts stacked), or as published."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, fields.pop("dtype", "float32"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, save_original_format=is_original)
    return folder


def qwen3_moe(folder: Path, **changes: Any) -> Path:
    """Qwen3-MoE with stacked experts."""
    return write_model(folder, **tiny_config("qwen3_moe_mixed", **changes))


def qwen3_moe_table(**changes: Any) -> WeightTable:
    """The table of the family, with the form of stacked experts."""
    table = weight_table(tiny_config("qwen3_moe_mixed", **changes))
    return replace(table, forms=stacked_experts(EXPERTS))


def gpt_oss(folder: Path, **changes: Any) -> Path:
    """Tiny gpt-oss."""
    fields = {
        "model_type": "gpt_oss",
        "vocab_size": 131,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
    }
    return write_model(folder, **{**fields, **changes})


def expert_rules() -> tuple[Rule, ...]:
    """Experts with biases; that of the second projection is whole on every rank."""

    def rule(megatron: str, *hf: tuple[str, tuple[int, ...]], split: str | None) -> Rule:
        return Rule(
            megatron=f"decoder.layers.{{layer}}.mlp.experts.{megatron}",
            hf=tuple(HFTensor(f"{EXPERTS}{{expert}}.{name}", shape) for name, shape in hf),
            split=split,  # type: ignore[arg-type]
            layers=tuple(range(NUM_LAYERS)),
            num_experts=NUM_EXPERTS,
        )

    matrix, vector = (WIDTH, HIDDEN), (WIDTH,)
    return (
        rule(
            "linear_fc1.weight",
            ("gate_proj.weight", matrix),
            ("up_proj.weight", matrix),
            split="rows",
        ),
        rule("linear_fc1.bias", ("gate_proj.bias", vector), ("up_proj.bias", vector), split="rows"),
        rule("linear_fc2.weight", ("down_proj.weight", matrix[::-1]), split="columns"),
        rule("linear_fc2.bias", ("down_proj.bias", (HIDDEN,)), split=None),
    )


def gpt_oss_table() -> WeightTable:
    """The experts of gpt-oss; everything else is copied."""
    return WeightTable(
        num_layers=NUM_LAYERS,
        rules=expert_rules(),
        ignored=(OTHERS,),
        forms=stacked_experts(
            EXPERTS, order="interleaved", is_transposed=True, is_native=True, has_bias=True
        ),
    )


def gpt2(folder: Path) -> Path:
    """Tiny GPT-2."""
    sizes = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}
    return write_model(folder, model_type="gpt2", vocab_size=131, **sizes)


def gpt2_table() -> WeightTable:
    """The matrices of GPT-2's layers; query, key and value are one stored tensor."""
    start = "transformer.h.{layer}."
    qkv = tuple(f"{start}attn.{name}.weight" for name in ("q", "k", "v"))
    plain = {
        "attn.c_proj": ((32, 32), "columns"),
        "mlp.c_fc": ((128, 32), "rows"),
        "mlp.c_proj": ((32, 128), "columns"),
    }
    layers = tuple(range(NUM_LAYERS))
    rules = [
        Rule(
            megatron="decoder.layers.{layer}.qkv",
            hf=tuple(HFTensor(name, (32, 32)) for name in qkv),
            layout=Interleaved(4),
            split="rows",
            layers=layers,
        ),
        *(
            Rule(
                megatron=f"decoder.layers.{{layer}}.{name}",
                hf=(HFTensor(f"{start}{name}.weight", shape),),
                split=split,  # type: ignore[arg-type]
                layers=layers,
            )
            for name, (shape, split) in plain.items()
        ),
    ]
    return WeightTable(
        num_layers=NUM_LAYERS,
        rules=tuple(rules),
        ignored=(
            IgnoredKey(r".*\.(wte|wpe|ln_1|ln_2|ln_f)\..*|.*\.bias", "copied", is_carried=True),
        ),
        forms=(
            StorageForm(
                stored=f"{start}attn.c_attn.weight", parts=qkv, is_transposed=True, is_native=True
            ),
            *transposed(*(f"{start}{name}.weight" for name in plain)),
        ),
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the files of a folder."""
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def rewritten(source: Path, folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A checkpoint with other tensors, and with other entries in its config.json."""
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_bytes(folder: Path, other: Path, *, without: tuple[str, ...] = ()) -> None:
    """The same tensors, to the bit."""
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys() - set(without)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def load_and_save(
    state, table, source, target, dtype, *, keeps_fp8=False, blocks=None, max_shard_size=20_000
):
    """Loads a checkpoint into parameters of this rank and saves it again, in small pieces."""
    layout = state.layout
    plan = plan_rank(table, layout=layout, rank=state.rank)
    chunks = make_chunks(plan, num_chunks=layout.num_chunks, dtype=dtype)
    weights = arranged(open_checkpoint(source), table, blocks=blocks or Fp8Blocks())
    load_weights(chunks, weights, table=table, layout=layout, rank=state.rank)
    return save_weights(
        lookup_in(tensors_by_name(chunks)),
        target,
        table=table,
        state=state,
        dtype=dtype,
        max_shard_size=max_shard_size,
        bucket_bytes=3_000,
        form=stored_as(weights, table, keeps_fp8=keeps_fp8),
    )()
