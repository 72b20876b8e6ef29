"""Another precision: each value is rounded once, and what overflows is counted."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from mtrain.bridge.converted import converted
from mtrain.bridge.safetensors_folder import open_checkpoint

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored(folder, **tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


def read(weights, name):
    with weights.open() as source:
        return source.slices(name)[:]


def random_values(dtype):
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("before", TORCH)
@pytest.mark.parametrize("after", TORCH)
def test_values_are_rounded_once(tmp_path, before, after):
    values = random_values(TORCH[before])
    weights = converted(stored(tmp_path, a=values), {"a": after})
    assert (weights.tensors["a"].dtype, weights.tensors["a"].shape) == (after, (64, 8))
    assert torch.equal(read(weights, "a"), values.to(TORCH[after]))
    with weights.open() as source:
        assert torch.equal(source.slices("a")[3:9, 2:4], values[3:9, 2:4].to(TORCH[after]))
    assert not weights.overflows


@pytest.mark.parametrize("narrow", ["BF16", "F16"])
def test_widening_gives_back_what_was_narrow(tmp_path, narrow):
    """bfloat16 and float16 values are all float32 values."""
    values = random_values(TORCH[narrow])
    wide = converted(stored(tmp_path, a=values), {"a": "F32"})
    assert torch.equal(read(converted(wide, {"a": narrow}), "a"), values)


def test_the_folder_is_that_of_the_other_checkpoint_and_names_are_chosen(tmp_path):
    base = stored(tmp_path, a=torch.ones(2), b=torch.ones(3), c=torch.ones(4))
    weights = converted(base, {"c": "BF16", "a": "F32"})
    assert weights.folder == tmp_path
    assert list(weights.tensors) == ["c", "a"]
    assert weights.tensors["c"].shape == (4,)


def test_values_that_become_infinite_are_counted_by_tensor(tmp_path):
    base = stored(
        tmp_path,
        a=torch.tensor([1.0, 70000.0, -70000.0, 65504.0]),
        b=torch.tensor([65519.0, 65520.0]),
        c=torch.tensor([1e-9, 2.0]),
    )
    weights = converted(base, dict.fromkeys("abc", "F16"))
    for name in "abc":
        read(weights, name)
    assert weights.overflows == {"a": 2, "b": 1}


def test_values_that_were_infinite_before_are_not_counted(tmp_path):
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e6])
    weights = converted(stored(tmp_path, a=values), {"a": "F16"})
    assert read(weights, "a").tolist()[:2] == [math.inf, -math.inf]
    assert weights.overflows == {"a": 1}


def test_bfloat16_is_narrower_than_float32(tmp_path):
    largest = torch.tensor([torch.finfo(torch.float32).max, 3e38])
    weights = converted(stored(tmp_path, a=largest), {"a": "BF16"})
    assert read(weights, "a").isinf().tolist() == [True, False]
    assert weights.overflows == {"a": 1}


def test_float16_fits_bfloat16_and_not_the_other_way_round(tmp_path):
    half = converted(
        stored(tmp_path, a=torch.full((3,), 65504.0, dtype=torch.float16)), {"a": "BF16"}
    )
    assert read(half, "a").isfinite().all()
    assert not half.overflows
    large = torch.full((3,), 1e5, dtype=torch.bfloat16)
    weights = converted(stored(tmp_path, a=large), {"a": "F16"})
    read(weights, "a")
    assert weights.overflows == {"a": 3}


def test_no_count_is_lost_between_threads(tmp_path):
    weights = converted(stored(tmp_path, a=torch.full((400, 2), 1e6)), {"a": "F16"})
    with weights.open() as source, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda row: source.slices("a")[row : row + 1], range(400)))
    assert weights.overflows == {"a": 800}


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I8"])
def test_a_dtype_that_is_not_written_is_refused_in_one_line(tmp_path, dtype):
    with pytest.raises(ValueError) as caught:
        converted(stored(tmp_path, a=torch.ones(2)), {"a": dtype})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: a is {dtype}, which is not written; give --torch_dtype")
    assert "\n" not in message
