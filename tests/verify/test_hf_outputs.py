import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtrain.bridge.storage.fp8_blocks import Fp8Slices
from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.verify.hf_outputs import check_class, hf_outputs, judge_device
from mtrain.verify.layer_records import router_margins
from mtrain.verify.texts import encode_texts
from tests.bridge.storage.checkpoints import rewritten, tensors_of
from tests.bridge.storage.quantized import quantized_copy
from tests.lora.peft_folders import save_with_peft
from tests.tiny import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapter")
    save_with_peft(folder, output, r=4, target_modules=["q_proj", "down_proj"])
    return output


@pytest.fixture(scope="module")
def texts(folder):
    return encode_texts(folder, vocab_size=131)[:2]


def outputs_of(folder, texts, **options):
    return hf_outputs(folder, texts, dtype=torch.float32, device=CPU, **options)


def rewrite(source, target, name, change):
    """Copies a folder with its tensors changed."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != name:
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / name)
    change(tensors)
    save_file(tensors, target / name, metadata={"format": "pt"})
    return target


def test_outputs_are_those_of_the_layers(folder, texts):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text, ours in zip(texts, outputs_of(folder, texts), strict=True):
        with torch.no_grad():
            expected = model(text.input_ids[None], output_hidden_states=True)
        torch.testing.assert_close(ours.logits, expected.logits[0])
        # Of transformers' own list the first is the embedding, and the last is normalised.
        torch.testing.assert_close(ours.hidden_states[0], expected.hidden_states[1][0])
        last = model.model.norm(ours.hidden_states[-1])
        torch.testing.assert_close(last, expected.hidden_states[-1][0])


def test_margins_are_those_of_the_routers_and_infinite_elsewhere(folder, texts, tmp_path):
    for ours in outputs_of(folder, texts):
        assert ours.router_margins.shape == ours.hidden_states.shape[:2]
        assert ours.router_margins.isinf().all()
    mixed = make_checkpoint(tmp_path, "qwen3_moe_mixed")  # layer 1 has no experts
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    for text, ours in zip(texts, outputs_of(mixed, texts), strict=True):
        with torch.no_grad():
            logits = model(text.input_ids[None], output_router_logits=True).router_logits
        expected = torch.stack([router_margins(one, 2) for one in logits])
        torch.testing.assert_close(ours.router_margins[[0, 2, 3]], expected, rtol=0, atol=1e-5)
        assert ours.router_margins[1].isinf().all()


@pytest.mark.parametrize("name", ["qwen3", "glm4_moe"])
def test_half_precision_outputs_are_those_of_the_class(name, texts, tmp_path):
    """Nothing but weights is rounded: neither rotary frequencies nor biases that choose experts."""
    folder = make_checkpoint(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    for text, ours in zip(
        texts, hf_outputs(folder, texts, dtype=torch.bfloat16, device=CPU), strict=True
    ):
        with torch.no_grad():
            expected = model(text.input_ids[None]).logits[0]
        assert torch.equal(ours.logits, expected.float())


def test_half_precision_outputs_are_float32_on_the_cpu(folder, texts):
    (one, _) = hf_outputs(folder, texts, dtype=torch.bfloat16, device=CPU)
    assert one.hidden_states.dtype == one.logits.dtype == torch.float32
    assert torch.equal(one.logits, one.logits.bfloat16().float())


def test_weights_are_rounded_first_where_those_of_the_other_model_were(folder, texts):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    with torch.no_grad():
        expected = model(texts[0].input_ids[None]).logits[0]
    rounded = outputs_of(folder, texts, stored_dtype=torch.bfloat16)[0].logits
    torch.testing.assert_close(rounded, expected)
    assert (rounded - outputs_of(folder, texts)[0].logits).abs().max() > 1e-3


def test_8_bit_weights_are_loaded_as_what_they_stand_for(texts, tmp_path):
    blocks = Fp8Blocks(rows=16, columns=16)
    options = {"num_hidden_layers": 2, "dtype": "bfloat16"}
    source = make_checkpoint(tmp_path / "source", "qwen3", **options)
    quantized = quantized_copy(source, tmp_path / "quantized", blocks)
    stored = tensors_of(quantized)
    values = {
        name: Fp8Slices(tensor, stored[f"{name}_scale_inv"], tensor.shape, blocks)[:]
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    plain = rewritten(source, tmp_path / "plain", values)
    options = {"stored_dtype": torch.bfloat16}
    for ours, theirs in zip(
        outputs_of(quantized, texts, **options), outputs_of(plain, texts, **options), strict=True
    ):
        assert torch.equal(ours.logits, theirs.logits)


def test_an_adapter_is_put_on_the_model(folder, adapter, texts):
    plain = outputs_of(folder, texts)
    adapted = outputs_of(folder, texts, adapter_folder=adapter)
    assert adapted[0].hidden_states.shape == plain[0].hidden_states.shape
    assert (adapted[0].hidden_states[0] - plain[0].hidden_states[0]).abs().max() > 1e-3


@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_a_checkpoint_that_does_not_fit_its_class_is_refused(fault, folder, texts, tmp_path):
    name = "model.layers.1.self_attn.q_norm.weight"

    def change(tensors):
        tensor = tensors.pop(name) if fault == "missing" else tensors[name]
        if fault == "left over":
            tensors["model.layers.1.self_attn.q_norm.bias"] = tensor.clone()

    broken = rewrite(folder, tmp_path / "broken", "model.safetensors", change)
    with pytest.raises(ValueError, match=rf"{fault} model\.layers\.1\.self_attn\.q_norm\."):
        outputs_of(broken, texts)


@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_an_adapter_that_does_not_fit_the_model_is_refused(fault, folder, adapter, texts, tmp_path):
    def change(tensors):
        name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_A" in name)
        tensor = tensors.pop(name) if fault == "missing" else tensors[name]
        if fault == "left over":
            tensors[name.replace("q_proj", "o_proj")] = tensor.clone()

    broken = rewrite(adapter, tmp_path / "broken", "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=rf"{fault} .*layers\.1\.self_attn\."):
        outputs_of(folder, texts, adapter_folder=broken)


def test_code_of_a_checkpoint_is_not_run(folder, texts, tmp_path):
    """T25."""
    target = rewrite(folder, tmp_path / "code", "model.safetensors", lambda _: None)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (target / "config.json").write_text(json.dumps(config))
    (target / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError):
        outputs_of(target, texts)


@pytest.mark.parametrize(
    ("free_bytes", "dtype", "chosen"),
    [
        (6 * 2**30, torch.bfloat16, "cuda"),
        (6 * 2**30, torch.float32, "cpu"),
        (8 * 2**30, torch.float32, "cuda"),
    ],
)
def test_the_judge_runs_on_the_gpu_where_it_has_room(
    free_bytes, dtype, chosen, tmp_path, monkeypatch
):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * 2**30)  # takes no space on the disk
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free_bytes, 2**40))
    gpu = torch.device("cuda", 0)
    assert judge_device(tmp_path, dtype=dtype, device=gpu).type == chosen
    assert judge_device(tmp_path, dtype=dtype, device=CPU) == CPU


def test_a_model_type_without_a_class_is_refused_with_what_cannot_be_compared():
    check_class("deepseek_v3")
    with pytest.raises(ValueError, match=r"no class for model type 'mimo'.*multi-token prediction"):
        check_class("mimo")
