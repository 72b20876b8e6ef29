import pytest
import torch

from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.decoded import decoded
from mtrain.bridge.storage.quantization import Fp8Blocks
from tests.bridge.standin import write_checkpoint

BLOCKS = Fp8Blocks(rows=4, columns=4)
FP8 = {
    "x.weight": torch.ones(6, 9).to(torch.float8_e4m3fn),
    "x.weight_scale_inv": torch.full((2, 3), 0.5),
}
FP4 = {
    "e_blocks": torch.full((2, 3, 1, 16), 0x22, dtype=torch.uint8),
    "e_scales": torch.full((2, 3, 1), 128, dtype=torch.uint8),
}
PLAIN = {"norm": torch.arange(3.0), "ids": torch.arange(4, dtype=torch.uint8)}


def decode(folder, tensors):
    return decoded(open_checkpoint(write_checkpoint(folder, tensors)), BLOCKS)


def test_quantised_tensors_are_shown_as_bfloat16_and_others_as_they_are(tmp_path):
    weights, faults = decode(tmp_path, FP8 | FP4 | PLAIN)
    assert faults == {}
    assert {name: (t.dtype, t.shape) for name, t in weights.tensors.items()} == {
        "x.weight": ("BF16", (6, 9)),
        # 3 rows of 32, shown transposed as gpt-oss has them.
        "e": ("BF16", (2, 32, 3)),
        "norm": ("F32", (3,)),
        "ids": ("U8", (4,)),
    }
    with weights.open() as source:
        assert torch.equal(source.slices("x.weight")[:], torch.full((6, 9), 0.5).bfloat16())
        assert torch.equal(source.slices("e")[:], torch.full((2, 32, 3), 2.0).bfloat16())
        assert torch.equal(source.slices("norm")[:], PLAIN["norm"])


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"x.weight_scale_inv": None}, "missing", "x.weight_scale_inv"),
        ({"x.weight": None}, "missing", "x.weight"),
        ({"e_scales": None}, "missing", "e_scales"),
        ({"e_blocks": None}, "missing", "e_blocks"),
        (
            {"x.weight_scale_inv": torch.ones(2, 2)},
            "wrong shape",
            "x.weight_scale_inv has (2, 2), expected is (2, 3) for blocks of 4 x 4",
        ),
        (
            {"x.weight_scale_inv": torch.ones(2, 3, dtype=torch.int32)},
            "dtype not supported",
            "x.weight_scale_inv (I32)",
        ),
        (
            {"e_scales": torch.ones(2, 3, 2, dtype=torch.uint8)},
            "wrong shape",
            "e_scales has (2, 3, 2), expected is (2, 3, 1)",
        ),
        (
            {"e_blocks": torch.ones(2, 3, 1, 8, dtype=torch.uint8)},
            "wrong shape",
            "e_blocks has (2, 3, 1, 8), expected is [..., rows, blocks, 16]",
        ),
        (
            {"x.weight": torch.ones(9).to(torch.float8_e4m3fn)},
            "wrong shape",
            "x.weight has (9,), and only matrices have factors of blocks",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_half_of_a_quantised_tensor_is_told_by_its_other_half(tmp_path, changes, kind, text):
    tensors = {k: v for k, v in (FP8 | FP4 | changes).items() if v is not None}
    _, faults = decode(tmp_path, tensors)
    assert faults == {kind: [text]}


def test_factors_of_a_tensor_that_is_not_quantised_are_left_to_the_ledger(tmp_path):
    weights, faults = decode(tmp_path, FP8 | {"x.weight": torch.ones(6, 9)})
    assert faults == {}
    assert weights.codes == {}
    assert set(weights.tensors) == {"x.weight", "x.weight_scale_inv"}
