"""Multi-token prediction as transformers runs it, and as it is put together of parts in tests."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from mtrain.bridge.storage.fp8_blocks import Fp8Slices
from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.verify import hf_next_tokens
from mtrain.verify.hf_outputs import hf_outputs
from mtrain.verify.texts import encode_texts
from tests.bridge.storage.checkpoints import rewritten, tensors_of
from tests.bridge.storage.quantized import quantized_copy
from tests.next_tokens import (
    make_checkpoint_with_next_tokens,
    names_left_out,
    with_second_layer,
)

JUDGED = ("deepseek_v3", "glm4_moe", "qwen3_next_moe")


def outputs_of(folder, *, dtype=torch.float32, num_texts=2, **options):
    texts = encode_texts(folder, vocab_size=131)[:num_texts]
    options = {"num_next_tokens": 1, "device": torch.device("cpu")} | options
    options["left_out"] = names_left_out(folder)
    return texts, hf_outputs(folder, texts, dtype=dtype, **options)


@pytest.mark.parametrize("name", JUDGED)
def test_losses_are_those_of_the_reference(name, tmp_path):
    folder, reference = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    for text, found in zip(*outputs_of(folder), strict=True):
        input_ids = text.input_ids[None]
        labels = torch.cat([input_ids[:, 1:], torch.full((1, 1), -100)], dim=1)
        with torch.no_grad():
            _, expected = reference.losses(input_ids, labels)
        logits = found.next_tokens.logits[0, :-2]
        loss = torch.nn.functional.cross_entropy(logits, input_ids[0, 2:], reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        hidden = reference.model.model.norm(found.hidden_states[-1])
        torch.testing.assert_close(reference.model.lm_head(hidden), found.logits)


@pytest.mark.parametrize("name", JUDGED)
def test_a_layer_has_the_shapes_of_the_others_and_margins_of_its_router(name, tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    ((text,), (found,)) = outputs_of(folder, num_texts=1)
    num_tokens = len(text.input_ids)
    assert found.next_tokens.hidden_states.shape == (1, num_tokens, 64)
    assert found.next_tokens.logits.shape == (1, num_tokens, 131)
    assert found.next_tokens.router_margins.shape == (1, num_tokens)
    assert found.next_tokens.router_margins.isfinite().all()


def test_without_it_the_model_gives_the_same(tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    (_, with_it), (_, without) = outputs_of(folder), outputs_of(folder, num_next_tokens=0)
    for one, other in zip(with_it, without, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.hidden_states, other.hidden_states)
        assert other.next_tokens is None


def test_only_as_many_layers_run_as_are_asked_for(tmp_path):
    one, _ = make_checkpoint_with_next_tokens(tmp_path / "one", "glm4_moe")
    two = with_second_layer(one, tmp_path / "two")
    ((_, (first,)), (_, (of_two,)), (_, (both,))) = (
        outputs_of(one, num_texts=1),
        outputs_of(two, num_texts=1),
        outputs_of(two, num_texts=1, num_next_tokens=2),
    )
    assert torch.equal(first.next_tokens.logits, of_two.next_tokens.logits)
    assert torch.equal(both.next_tokens.logits[:1], first.next_tokens.logits)
    assert both.next_tokens.logits.shape == (2, *first.logits.shape)
    assert not torch.allclose(both.next_tokens.logits[1], both.next_tokens.logits[0], atol=0.1)


def test_files_of_several_shards_are_read(tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    _, expected = outputs_of(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{n}.safetensors": names[n::3] for n in range(3)}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: f for f, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, found = outputs_of(folder)
    assert torch.equal(found[0].next_tokens.logits, expected[0].next_tokens.logits)


def test_8_bit_weights_are_loaded_as_what_they_stand_for(tmp_path):
    blocks = Fp8Blocks(rows=8, columns=8)
    source, _ = make_checkpoint_with_next_tokens(
        tmp_path / "source", "deepseek_v3", dtype="bfloat16"
    )
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
    (_, (ours, _)), (_, (theirs, _)) = (
        outputs_of(folder, stored_dtype=torch.bfloat16) for folder in (quantized, plain)
    )
    assert torch.equal(ours.next_tokens.logits, theirs.next_tokens.logits)


def test_biases_that_choose_experts_are_not_rounded(tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    key = "model.layers.4.mlp.gate.e_score_correction_bias"
    tensors = load_file(folder / "model.safetensors")
    # The difference of the first two disappears in bfloat16, and then others are chosen.
    tensors[key] = torch.tensor([100.0, 100.01, 100.02, 100.03])
    other = rewritten(folder, tmp_path / "other", tensors)
    margins = outputs_of(other, dtype=torch.bfloat16)[1][0].next_tokens.router_margins
    rounded = rewritten(folder, tmp_path / "rounded", tensors | {key: tensors[key].round()})
    after = outputs_of(rounded, dtype=torch.bfloat16)[1][0].next_tokens.router_margins
    assert not torch.equal(margins, after)


def test_a_missing_weight_is_an_error_that_names_it(tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "glm4_moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.4.hnorm.weight"]
    broken = rewritten(folder, tmp_path / "broken", tensors)
    with pytest.raises(RuntimeError, match=r"hnorm"):
        outputs_of(broken)


def test_no_layer_is_run_by_itself(tmp_path, monkeypatch):
    """transformers 5.17 has no `forward_layer`, which `forward` of later versions calls."""
    plain, of_layer = MtpModel.forward, getattr(MtpModel, "forward_layer", None)

    def forward(model, *args, **options):
        with mock.patch.object(MtpModel, "forward_layer", of_layer, create=True):
            return plain(model, *args, **options)

    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    _, (expected,) = outputs_of(folder, num_texts=1)
    monkeypatch.delattr(MtpModel, "forward_layer", raising=False)
    monkeypatch.setattr(MtpModel, "forward", forward)
    _, (found,) = outputs_of(folder, num_texts=1)
    assert torch.equal(found.next_tokens.logits, expected.next_tokens.logits)


def test_an_old_transformers_is_named(monkeypatch):
    assert hf_next_tokens.missing_class() is None
    monkeypatch.setattr(hf_next_tokens, "MtpModel", None)
    assert hf_next_tokens.missing_class().startswith("transformers ")
