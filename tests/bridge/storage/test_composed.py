from dataclasses import replace

import pytest
import torch

from mtrain.bridge.convert import write_weights
from mtrain.bridge.converted import converted
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.arrangement import Arrangement
from mtrain.bridge.storage.composed import ComposedSlices, composed
from mtrain.bridge.storage.stored_as import CANONICAL, stored_as, stored_natively
from mtrain.bridge.storage.view import arranged
from tests.bridge.storage.checkpoints import (
    OTHERS,
    assert_same_bytes,
    gpt2,
    gpt2_table,
    gpt_oss,
    gpt_oss_table,
    qwen3_moe,
    qwen3_moe_table,
    tensors_of,
)
from tests.bridge.storage.quantized import BLOCKS, quantized_copy

MODELS = {
    "qwen3_moe": (qwen3_moe, qwen3_moe_table),
    "gpt_oss": (gpt_oss, gpt_oss_table),
    "gpt2": (gpt2, gpt2_table),
}


def export(folder, table, target, *, keeps_fp8=False, max_shard_size=50_000):
    """What `megatron export` does: canonical tensors in their dtypes, put back into their form."""
    weights = arranged(open_checkpoint(folder), table, blocks=BLOCKS)
    dtypes = {name: weights.tensors[name].dtype for name in hf_tensors(table)}
    result = composed(converted(weights, dtypes), stored_as(weights, table, keeps_fp8=keeps_fp8))
    target.mkdir()
    for rank in range(2):
        write_weights(result, target, max_shard_size=max_shard_size, rank=rank, world_size=2)
    return result


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_read(tmp_path, name):
    make, table = MODELS[name]
    source = make(tmp_path / "source")
    result = export(source, table(), tmp_path / "out")
    assert_same_bytes(tmp_path / "out", source)
    assert result.folder == source
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("is_original", [True, False], ids=["one by one", "stacked"])
def test_8_bits_are_written_to_the_byte(tmp_path, is_original):
    plain = qwen3_moe(tmp_path / "plain", is_original=is_original, dtype="bfloat16")
    source = quantized_copy(plain, tmp_path / "quantized")
    export(source, qwen3_moe_table(), tmp_path / "out", keeps_fp8=True)
    assert_same_bytes(tmp_path / "out", source)


def test_a_changed_weight_gets_a_new_factor_and_its_neighbours_keep_theirs(tmp_path):
    plain = qwen3_moe(tmp_path / "plain", dtype="bfloat16")
    source = quantized_copy(plain, tmp_path / "quantized")
    weights = arranged(open_checkpoint(source), qwen3_moe_table(), blocks=BLOCKS)
    name, stored = "model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts."
    with weights.open() as values:
        changed = {n: values.slices(n)[:] for n in hf_tensors(qwen3_moe_table())}
    changed[name][0, 0] = 1000.0
    form = stored_as(weights, qwen3_moe_table(), keeps_fp8=True)
    with composed(_Held(weights, changed), form).open() as files:
        scales = files.slices(f"{stored}gate_up_proj_scale_inv")[:]
    before = tensors_of(source)[f"{stored}gate_up_proj_scale_inv"]
    # Rows of `up` begin at 48; blocks have 20 rows.
    assert (scales != before).nonzero().tolist() == [[1, 2, 0]]
    assert scales[1, 2, 0] == 1000 / 448


class _Held:
    """Tensors in memory with the names and dtypes of a checkpoint."""

    def __init__(self, weights, tensors):
        self.folder, self.tensors = weights.folder, {n: weights.tensors[n] for n in tensors}
        self._values = tensors

    def open(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def slices(self, name):
        return self._values[name]


def test_a_copy_has_the_values_that_are_written_and_not_those_that_were_read(tmp_path):
    source = qwen3_moe(tmp_path / "source", is_original=True)
    weights = arranged(open_checkpoint(source), qwen3_moe_table())
    with weights.open() as values:
        changed = {n: values.slices(n)[:] * 2 for n in hf_tensors(qwen3_moe_table())}
    form = replace(CANONICAL, copies=(("again", "lm_head.weight"),))
    result = composed(_Held(weights, changed), form)
    assert not form.is_canonical
    assert list(result.tensors)[-2:] == ["lm_head.weight", "again"]
    with result.open() as files:
        assert torch.equal(files.slices("again")[1:3], changed["lm_head.weight"][1:3])


def test_a_canonical_form_changes_nothing(tmp_path):
    weights = open_checkpoint(qwen3_moe(tmp_path, is_original=True))
    assert composed(weights, CANONICAL) is weights


def test_weights_without_a_source_are_written_in_the_native_form(tmp_path):
    """As from a torch_dist folder, which has nothing to copy."""
    source = gpt_oss(tmp_path / "source")
    table = replace(gpt_oss_table(), ignored=(replace(OTHERS, is_carried=False),))
    weights = arranged(open_checkpoint(source), table)
    dtypes = {name: weights.tensors[name].dtype for name in hf_tensors(table)}
    result = composed(converted(weights, dtypes), stored_natively(table))
    stored = tensors_of(source)
    assert set(result.tensors) == {name for name in stored if ".experts." in name}
    with result.open() as files:
        for name in result.tensors:
            assert torch.equal(files.slices(name)[:], stored[name])


@pytest.mark.parametrize("order", ["concatenated", "interleaved"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_stacked", [False, True])
def test_parts_are_those_of_the_whole(order, is_transposed, is_stacked):
    rows = (3, 3) if order == "interleaved" else (3, 5)
    names = (("a0", "b0"), ("a1", "b1"), ("a2", "b2")) if is_stacked else (("a0", "b0"),)
    stored = Arrangement(
        name="x",
        slabs=names,
        part_shapes=tuple((count, 4) for count in rows),
        order=order,
        is_transposed=is_transposed,
        is_stacked=is_stacked,
    )
    tensors = {name: torch.randn(shape) for name, shape in stored.canonical}
    slices = ComposedSlices(stored, tensors.__getitem__)
    whole = slices[:]
    assert whole.shape == stored.shape
    first = whole[0] if is_stacked else whole
    first = first.t() if is_transposed else first
    assert torch.equal(first[stored.first_row(1) :: stored.row_step][: rows[1]], tensors["b0"])
    ends = [(start, stop) for start in range(4) for stop in range(start, 5)]
    for start, stop in ends:
        assert torch.equal(slices[start:stop], whole[start:stop])
        assert torch.equal(slices[:, start:stop], whole[:, start:stop])
        assert torch.equal(slices[start:stop, 1:3], whole[start:stop, 1:3])
        if is_stacked:
            assert torch.equal(slices[1:2, :, start:stop], whole[1:2, :, start:stop])
