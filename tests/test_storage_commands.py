"""Whole commands on checkpoints in other forms: stacked experts, 8-bit and 4-bit weights.

Ranks share tensors and experts; transformers is the judge of what is written.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.cli import demo
from mtrain.verify.files import check_files
from tests.bridge.storage.checkpoints import assert_same_bytes, rewritten, tensors_of, write_model
from tests.bridge.storage.quantized import quantized_copy
from tests.machine import WORDS, Done, Machine
from tests.megatron import read_config
from tests.tiny import tiny_config

# What transformers reads has no smaller blocks at the edges.
BLOCKS = Fp8Blocks(rows=16, columns=16)
TP_EP = ("--tensor_model_parallel_size", "2", "--expert_model_parallel_size", "2")
PROOF = ("--test_convert_precision", "true")
STEPS = (
    *WORDS,
    *("--train_iters", "2", "--micro_batch_size", "1", "--global_batch_size", "2"),
    *("--max_length", "96", "--packing", "true", "--add_version", "false"),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    """Models with all forms of experts, each with a tokenizer."""
    home = tmp_path_factory.mktemp("home")
    sizes = {"dtype": "bfloat16", "vocab_size": demo.VOCAB_SIZE, "num_hidden_layers": 2}
    for name, is_original in (("plain", True), ("stacked", False)):
        config = tiny_config("qwen3_moe", **sizes)
        demo.write_tokenizer(write_model(home / name, is_original=is_original, **config))
        quantized_copy(home / name, home / f"{name}-fp8", BLOCKS)
        demo.write_tokenizer(home / f"{name}-fp8")
    config = tiny_config("gpt_oss_moe", **sizes)
    demo.write_tokenizer(write_model(home / "gpt_oss", **config))
    return Machine(home, home / "plain")


def done_well(done: Done) -> Done:
    assert done.code == 0, done.stderr
    return done


def export(machine: Machine, source: Path, out: Path, *words: str, num_ranks: int = 2) -> Done:
    layout = TP_EP if num_ranks > 1 else ()
    where = ("--model", str(source), "--output_dir", str(out), *layout)
    return machine.megatron("export", *where, *words, num_ranks=num_ranks)


def logits(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What transformers makes of a checkpoint, of which no weight is missing or left over."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(found.values()), found
    return model(torch.arange(12)[None]).logits


# transformers reads 8-bit experts that are stacked on a GPU alone, so those have no judge here.
FP8_FORMS = [("plain-fp8", PROOF), ("stacked-fp8", ())]


@pytest.mark.parametrize(("name", "proof"), FP8_FORMS, ids=["plain", "stacked"])
def test_8_bit_weights_are_exported_as_bfloat16(machine, tmp_path, name, proof) -> None:
    """As transformers reads them, and passing the precision test."""
    source, out = machine.home / name, tmp_path / "out"
    done_well(export(machine, source, out, "--to_hf", "true", *proof))
    assert not proof or json.loads((out / "precision.json").read_text())["passed"]
    config = read_config(out)
    assert "quantization_config" not in config
    assert config == {k: v for k, v in read_config(source).items() if k != "quantization_config"}
    stored = tensors_of(out)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert stored.keys() == tensors_of(machine.home / name.removesuffix("-fp8")).keys()
    # No block has rows of gate and of up, so the values of the two are the same.
    assert torch.equal(logits(out), logits(machine.home / "plain-fp8"))
    assert check_files(out) == []


@pytest.mark.parametrize(("name", "proof"), FP8_FORMS, ids=["plain", "stacked"])
def test_8_bit_weights_are_exported_as_they_are_when_asked_for(
    machine, tmp_path, name, proof
) -> None:
    source, out = machine.home / name, tmp_path / "out"
    done_well(export(machine, source, out, "--to_hf", "true", "--fp8_export", "true", *proof))
    assert not proof or json.loads((out / "precision.json").read_text())["passed"]
    assert_same_bytes(out, source)
    assert read_config(out) == read_config(source)
    assert check_files(out) == []


def test_8_bit_weights_go_to_megatron_and_verify_knows_them_there(machine, tmp_path) -> None:
    source, out = machine.home / "plain-fp8", tmp_path / "out"
    done_well(export(machine, source, out, "--to_mcore", "true", *PROOF))
    assert json.loads((out / "precision.json").read_text())["passed"]
    assert "quantization_config" not in read_config(out)
    assert machine.megatron("verify", str(source), str(out)).code == 0
    assert machine.megatron("verify", str(machine.home / "stacked-fp8"), str(out)).code == 0
    assert machine.megatron("verify", str(machine.home / "plain"), str(out)).code == 1


def test_gpt_oss_comes_back_from_megatron_in_the_only_form_that_it_has(machine, tmp_path) -> None:
    source = machine.home / "gpt_oss"
    done_well(export(machine, source, tmp_path / "mcore", "--to_mcore", "true"))
    words = ("--mcore_model", str(tmp_path / "mcore"), "--output_dir", str(tmp_path / "hf"))
    done_well(machine.megatron("export", *words, "--to_hf", "true"))
    assert_same_bytes(tmp_path / "hf", source)


def test_4_bit_experts_of_gpt_oss_are_exported_as_transformers_reads_them(
    machine, tmp_path
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_of(machine.home / "gpt_oss")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, in_size, out_size = tensors.pop(name).shape
        shape = (num_experts, out_size, in_size // 32)
        for suffix, size, (low, high) in (
            ("_blocks", (*shape, 16), (0, 256)),
            ("_scales", shape, (118, 124)),
        ):
            tensors[name + suffix] = torch.randint(
                low, high, size, generator=generator, dtype=torch.uint8
            )
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    source = rewritten(
        machine.home / "gpt_oss", tmp_path / "fp4", tensors, quantization_config=settings
    )
    demo.write_tokenizer(source)
    out = tmp_path / "out"
    done_well(export(machine, source, out, "--to_hf", "true"))
    assert "quantization_config" not in read_config(out)
    assert tensors_of(out).keys() == tensors_of(machine.home / "gpt_oss").keys()
    assert torch.equal(logits(out), logits(source))


def test_a_run_on_stacked_experts_saves_them_stacked_and_goes_on_from_them(
    machine, tmp_path
) -> None:
    source, out = machine.home / "stacked", tmp_path / "out"
    words = ("--model", str(source), "--output_dir", str(out), *STEPS, *TP_EP)
    done_well(machine.sft(*words, "--save_steps", "1", num_ranks=2))
    first, last = out / "checkpoint-1", out / "checkpoint-2"
    for folder in (first, last):
        assert check_files(folder) == []
        weights = tensors_of(folder)
        assert weights.keys() >= tensors_of(source).keys()
    assert logits(last).isfinite().all()
    again = ("--resume_from_checkpoint", str(first), "--output_dir", str(tmp_path / "again"))
    done_well(machine.sft(*words, *again, num_ranks=2))
    assert_same_bytes(tmp_path / "again" / "checkpoint-2", last)


@pytest.mark.parametrize("is_async", ["false", "true"])
def test_a_run_on_8_bit_weights_saves_8_bits_when_asked_to(machine, tmp_path, is_async) -> None:
    source, out = machine.home / "plain-fp8", tmp_path / "out"
    words = ("--model", str(source), "--output_dir", str(out), *STEPS, *TP_EP)
    saving = ("--fp8_export", "true", "--no_save_optim", "true", "--async_save", is_async)
    done_well(machine.sft(*words, *saving, "--lr", "1e-3", num_ranks=2))
    saved = out / "checkpoint-2"
    assert check_files(saved) == []
    ours, theirs = tensors_of(saved), tensors_of(source)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(ours[name].float(), theirs[name].float())
    assert read_config(saved)["quantization_config"] == read_config(source)["quantization_config"]
    assert logits(saved).isfinite().all()


def test_layers_of_next_tokens_that_are_not_trained_are_in_what_is_saved(machine, tmp_path) -> None:
    """In exports and in checkpoints of runs, and the index and the manifest know them."""
    config = tiny_config("deepseek_v3", dtype="bfloat16", vocab_size=demo.VOCAB_SIZE)
    plain = write_model(tmp_path / "plain", is_original=True, **config)
    start = f"model.layers.{config['num_hidden_layers']}."
    extra = {
        f"{start}eh_proj.weight": torch.randn(64, 128).bfloat16(),
        f"{start}enorm.weight": torch.randn(64),
    }
    tensors = tensors_of(plain) | extra
    source = rewritten(plain, tmp_path / "source", tensors, num_nextn_predict_layers=1)
    demo.write_tokenizer(source)
    alone = ("--mtp_num_layers", "0")
    done_well(export(machine, source, tmp_path / "hf", "--to_hf", "true", *alone))
    assert_same_bytes(tmp_path / "hf", source)
    words = ("--model", str(source), "--output_dir", str(tmp_path / "run"), *STEPS, *TP_EP)
    done_well(machine.sft(*words, *alone, "--max_shard_size", "100KB", num_ranks=2))
    saved = tmp_path / "run" / "checkpoint-2"
    ours = tensors_of(saved)
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in extra.items())
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert check_files(saved) == []


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("export", ("--to_hf", "true", "--fp8_export", "true"), "has no weights in 8-bit floats"),
        ("export", ("--to_mcore", "true", "--fp8_export", "true"), "torch_dist has no 8-bit"),
        ("sft", (*STEPS, "--fp8_export", "true"), "cannot go on bit for bit from 8-bit weights"),
        (
            "sft",
            (*STEPS, "--fp8_export", "true", "--tuner_type", "lora"),
            "an adapter is not saved in 8 bits",
        ),
    ],
    ids=["no source", "mcore", "with state", "adapter"],
)
def test_8_bits_are_refused_where_they_make_no_sense(
    machine, tmp_path, command, words, message
) -> None:
    where = ("--model", str(machine.model), "--output_dir", str(tmp_path / "out"))
    done = machine.megatron(command, *where, *words)
    assert done.code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_line(machine, tmp_path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    tensors = tensors_of(machine.model)
    source = rewritten(machine.model, tmp_path / "bnb", tensors, quantization_config=settings)
    done = export(machine, source, tmp_path / "out", "--to_hf", "true", num_ranks=1)
    assert done.code == 2
    assert "quant_method 'bitsandbytes', which cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1
