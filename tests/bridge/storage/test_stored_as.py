from dataclasses import replace

import pytest
import torch

from mtrain.bridge.rules import IgnoredKey
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.arrangement import as_it_is
from mtrain.bridge.storage.stored_as import CANONICAL, StoredAs, stored_as, stored_natively
from mtrain.bridge.storage.view import arranged
from tests.bridge.storage.checkpoints import (
    gpt_oss_table,
    qwen3_moe,
    qwen3_moe_table,
    rewritten,
    tensors_of,
)
from tests.bridge.storage.quantized import BLOCKS, quantized_copy
from tests.tiny import make_checkpoint

EXTRA = IgnoredKey(r"model\.layers\.4\..*", "not trained", is_carried=True)
TABLE = replace(qwen3_moe_table(), ignored=(EXTRA, IgnoredKey("old", "of old versions")))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Stacked experts in 8-bit floats, and a layer that the model does not have."""
    root = tmp_path_factory.mktemp("stored_as")
    plain = qwen3_moe(root / "plain", dtype="bfloat16")
    tensors = tensors_of(plain)
    tensors["model.layers.4.x_proj.weight"] = torch.randn(60, 30).bfloat16()
    tensors["model.layers.4.norm.weight"] = torch.randn(60)
    tensors["old"] = torch.zeros(1)
    return quantized_copy(rewritten(plain, root / "more", tensors), root / "quantized")


def form_of(folder, *, keeps_fp8):
    return stored_as(
        arranged(open_checkpoint(folder), TABLE, blocks=BLOCKS), TABLE, keeps_fp8=keeps_fp8
    )


def test_a_checkpoint_with_canonical_tensors_and_no_others_is_saved_as_it_is(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe_mixed")
    form = form_of(folder, keeps_fp8=False)
    assert form.is_canonical
    assert form == CANONICAL == StoredAs()


def test_8_bits_are_kept_for_those_tensors_that_had_them(quantized):
    form = form_of(quantized, keeps_fp8=True)
    stored = tensors_of(quantized)
    names = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert form.quantized.scale_dtypes == dict.fromkeys(names, "F32")
    (one,) = [one for one in form.arrangements if one.name.endswith("0.mlp.experts.down_proj")]
    assert form.entries(one, "BF16") == (
        (one.name, "F8_E4M3", (4, 64, 48)),
        (f"{one.name}_scale_inv", "F32", (4, 4, 2)),
    )
    norm = as_it_is("model.norm.weight", (64,))
    assert form.entries(norm, "BF16") == (("model.norm.weight", "BF16", (64,)),)


def test_without_being_asked_everything_is_written_in_its_dtype(quantized):
    form = form_of(quantized, keeps_fp8=False)
    assert form.quantized is None
    assert not form.is_canonical
    assert form.entries(form.arrangements[0], "BF16") == (
        (form.arrangements[0].name, "BF16", form.arrangements[0].shape),
    )


def test_what_is_copied_is_in_8_bits_where_the_rest_is(quantized):
    """A copy of 8-bit floats beside a config without quantisation could not be read."""
    start = "model.layers.4."
    kept = form_of(quantized, keeps_fp8=True).carried
    assert {name: dtype for name, dtype, _ in kept.entries} == {
        f"{start}x_proj.weight": "F8_E4M3",
        f"{start}x_proj.weight_scale_inv": "F32",
        f"{start}norm.weight": "F32",
    }
    decoded = form_of(quantized, keeps_fp8=False).carried
    assert {name: dtype for name, dtype, _ in decoded.entries} == {
        f"{start}x_proj.weight": "BF16",
        f"{start}norm.weight": "F32",
    }
    with decoded.source.open() as source:
        values = source.slices(f"{start}x_proj.weight")[:]
    assert values.dtype == torch.bfloat16


def test_8_bits_cannot_be_kept_where_there_are_none(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe_mixed")
    with pytest.raises(
        ValueError, match=r"--fp8_export true: .* has no weights in 8-bit"
    ) as caught:
        form_of(folder, keeps_fp8=True)
    assert "\n" not in str(caught.value)


def test_weights_from_elsewhere_are_stored_as_hugging_face_does():
    assert stored_natively(qwen3_moe_table()) == CANONICAL
    holder = stored_natively(gpt_oss_table()).by_canonical()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert holder[name].name == "model.layers.1.mlp.experts.gate_up_proj"
