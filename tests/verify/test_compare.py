from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtrain.bridge.safetensors_folder import Checkpoint, open_checkpoint
from mtrain.bridge.safetensors_header import read_header
from mtrain.verify.compare import Comparison, compare_checkpoints
from tests.tiny import make_checkpoint

NAN, INF = float("nan"), float("inf")


def stored(path: Path, **tensors: torch.Tensor) -> Checkpoint:
    save_file(tensors, path)
    return Checkpoint(folder=path.parent, tensors=read_header(path))


def compare_two(folder: Path, a: torch.Tensor, b: torch.Tensor, **options) -> Comparison:
    (result,) = compare_checkpoints(stored(folder / "a", x=a), stored(folder / "b", x=b), **options)
    return result


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(60.0).view(5, 12),
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.tensor([NAN, -0.0, INF]),
        torch.arange(7).bfloat16(),
        torch.tensor([True, False]),
        torch.arange(6).to(torch.float8_e4m3fn),
        torch.arange(5),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_the_same_bits_are_equal(tmp_path, tensor):
    assert compare_two(tmp_path, tensor, tensor.clone()) == Comparison(name="x", verdict="equal")


@pytest.mark.parametrize("block_bytes", [1, 100, 10**6])
def test_different_elements_are_counted_in_blocks_of_any_size(tmp_path, block_bytes):
    a = torch.arange(60.0).view(5, 12)
    b = a.clone()
    b[0, 3] += 0.25
    b[4, 11] -= 2
    result = compare_two(tmp_path, a, b, block_bytes=block_bytes)
    text = "2 of 60 elements differ, at most by 2"
    assert result == Comparison(name="x", verdict="different", text=text)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ([0.0, 1.0], [-0.0, 1.0], "1 of 2 elements differ, at most by 0"),
        ([NAN, 1.0], [1.0, 1.0], "1 of 2 elements differ, at most by nan"),
        ([INF, 1.0], [INF, 1.5], "1 of 2 elements differ, at most by 0.5"),
        ([INF, 1.0], [-INF, 1.0], "1 of 2 elements differ, at most by inf"),
    ],
)
def test_equal_is_a_matter_of_bits(tmp_path, a, b, text):
    result = compare_two(tmp_path, torch.tensor(a), torch.tensor(b))
    assert (result.verdict, result.text) == ("different", text)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_another_dtype_is_told_from_other_values(tmp_path, wide, narrow):
    a = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(wide)
    b = a.to(narrow)
    for pair in ((a, b), (b, a)):
        result = compare_two(tmp_path, *pair)
        assert result.verdict == "other dtype"
        assert " in A, " in result.text
    # The next value that the narrow dtype has.
    b.view(torch.uint8 if narrow.itemsize == 1 else torch.int16)[3, 4] ^= 1
    result = compare_two(tmp_path, a, b)
    assert result.verdict == "different"
    assert "1 of 63 elements differ" in result.text


def test_the_dtypes_are_named(tmp_path):
    a = torch.tensor([1.1, NAN, INF])
    assert compare_two(tmp_path, a, a.bfloat16()).text == "F32 in A, BF16 in B"
    result = compare_two(tmp_path, a, a.bfloat16() + 1)
    assert result.text == "F32 in A, BF16 in B: 1 of 3 elements differ, at most by 0.9922"
    assert compare_two(tmp_path, torch.arange(3), torch.arange(3.0)).verdict == "other dtype"


def test_other_shapes_and_missing_tensors_are_named(tmp_path):
    first = stored(tmp_path / "a", x=torch.zeros(2, 3), only=torch.zeros(4), same=torch.ones(1))
    second = stored(tmp_path / "b", x=torch.zeros(3, 2), same=torch.ones(1), new=torch.zeros(()))
    found = {result.name: result for result in compare_checkpoints(first, second)}
    assert {name: (result.verdict, result.text) for name, result in found.items()} == {
        "x": ("other shape", "[2, 3] in A, [3, 2] in B"),
        "only": ("only in A", "F32 [4]"),
        "new": ("only in B", "F32 []"),
        "same": ("equal", ""),
    }


def test_a_checkpoint_equals_itself_in_other_files(tmp_path):
    one = make_checkpoint(tmp_path / "one", "qwen3_moe_mixed")
    many = make_checkpoint(tmp_path / "many", "qwen3_moe_mixed", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    found = list(compare_checkpoints(open_checkpoint(one), open_checkpoint(many)))
    assert {result.verdict for result in found} == {"equal"}
    assert len(found) == len(open_checkpoint(one).tensors)


def test_numbers_of_less_than_a_byte_are_refused(tmp_path):
    path = tmp_path / "a"
    header = b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    checkpoint = Checkpoint(folder=tmp_path, tensors=read_header(path))
    with pytest.raises(ValueError, match="x is F4: not compared here"):
        list(compare_checkpoints(checkpoint, checkpoint))
