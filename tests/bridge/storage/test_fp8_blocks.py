import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from mtrain.bridge.storage.fp8_blocks import Fp8Slices, QuantizedSlices, quantize
from mtrain.bridge.storage.quantization import Fp8Blocks
from tests.bridge.storage.quantized import dequantize_slowly, quantize_slowly

EVEN, ODD = Fp8Blocks(rows=16, columns=8), Fp8Blocks(rows=20, columns=28)
KEYS = [
    slice(None),
    slice(3, 4),
    slice(19, 41),
    slice(7, 7),
    (slice(0, 5), slice(27, 29)),
    (slice(38, 48), slice(60, 64)),
    (slice(None), slice(5, 5)),
]


class Quantizer:
    """What the operations of transformers ask a quantizer for."""

    def __init__(self, **settings):
        self.quantization_config = FineGrainedFP8Config(**settings)


def matrix(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


def quantized(values, blocks, *, kept=None, scale_dtype=torch.float32):
    return quantize(values, blocks, kept=kept, scale_dtype=scale_dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", [(48, 64), (3, 48, 64)], ids=str)
def test_values_are_those_of_transformers(shape):
    quantizer = Quantizer(weight_block_size=(16, 8))
    pair = Fp8Quantize(quantizer)._quantize_one("x.weight", matrix(*shape))
    values, scales = pair["x.weight"], pair["x.weight_scale_inv"]
    expected = Fp8Dequantize(quantizer)._dequantize_one(values, scales, torch.bfloat16)
    assert torch.equal(Fp8Slices(values, scales, shape, EVEN)[:], expected)


def test_factors_and_values_are_within_a_rounding_of_those_of_transformers():
    """It divides twice for a factor, so the last bit of one may differ."""
    values = matrix(48, 64)
    theirs = Fp8Quantize(Quantizer(weight_block_size=(16, 8)))._quantize_one("x", values)
    ours, scales = quantized(values, EVEN)
    torch.testing.assert_close(scales, theirs["x_scale_inv"], rtol=1e-6, atol=0)
    different = ours.view(torch.uint8) != theirs["x"].view(torch.uint8)
    assert different.float().mean() < 0.01


def test_powers_of_two_are_those_of_transformers_to_the_bit():
    settings = {"weight_block_size": (16, 8), "scale_fmt": "ue8m0"}
    values = matrix(48, 64)
    theirs = Fp8Quantize(Quantizer(**settings))._quantize_one("x", values)
    blocks = Fp8Blocks(rows=16, columns=8, has_power_scales=True)
    ours, scales = quantized(values, blocks, scale_dtype=torch.float8_e8m0fnu)
    assert same_bits(scales, theirs["x_scale_inv"])
    assert same_bits(ours, theirs["x"])
    again = Fp8Slices(ours, scales, (48, 64), blocks)[:]
    assert torch.equal(again, Fp8Dequantize(Quantizer())._dequantize_one(ours, scales))


def test_blocks_at_the_edges_may_be_smaller():
    values = matrix(48, 64)
    ours, expected = quantized(values, ODD), quantize_slowly(values, ODD)
    assert same_bits(ours[0], expected[0])
    assert same_bits(ours[1], expected[1])
    assert torch.equal(Fp8Slices(*ours, (48, 64), ODD)[:], dequantize_slowly(*expected, ODD))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_parts_are_those_of_the_whole(key):
    values, scales = quantized(matrix(48, 64), ODD)
    slices = Fp8Slices(values, scales, (48, 64), ODD)
    assert torch.equal(slices[key], slices[:][key])
    kept = torch.rand(scales.shape) + 0.5
    for given in (None, kept):
        options = {"kept": given, "scale_dtype": torch.float32}
        parts = QuantizedSlices(matrix(48, 64), (48, 64), ODD, gives_scales=False, **options)
        assert same_bits(parts[key], parts[:][key])


@pytest.mark.parametrize("key", [slice(None), slice(1, 3), (slice(0, 2), slice(2, 3))], ids=str)
def test_parts_of_factors_are_those_of_the_whole(key):
    _, scales = quantized(matrix(48, 64), ODD)
    asked = QuantizedSlices(
        matrix(48, 64), (48, 64), ODD, kept=None, scale_dtype=torch.float32, gives_scales=True
    )
    assert torch.equal(asked[key], scales[key])


def test_many_rows_are_quantised_a_few_at_a_time(monkeypatch):
    from mtrain.bridge.storage import fp8_blocks

    values = matrix(2, 90, 64)
    expected = quantized(values, ODD)
    monkeypatch.setattr(fp8_blocks, "_NUM_AT_ONCE", 3000)
    ours = quantized(values, ODD)
    assert same_bits(ours[0], expected[0])
    assert same_bits(ours[1], expected[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [1.0, 0.77, 1e-3])
def test_a_block_that_did_not_change_keeps_its_bits_and_another_one_does_not(seed, factor):
    """Also where the factor is not the one that would be chosen here."""
    _, chosen = quantize_slowly(matrix(48, 64, seed=seed), ODD)
    scales = chosen * factor
    spread = scales.repeat_interleave(20, 0).repeat_interleave(28, 1)[:48, :64]
    stored = (matrix(48, 64, seed=seed) / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = Fp8Slices(stored, scales, (48, 64), ODD)[:]
    ours = quantized(values, ODD, kept=scales)
    assert same_bits(ours[0], stored)
    assert same_bits(ours[1], scales)
    values[0, 0] = 1e4
    after, new_scales = quantized(values, ODD, kept=scales)
    fresh, fresh_scales = quantized(values, ODD)
    assert new_scales[0, 0] == fresh_scales[0, 0] != scales[0, 0]
    assert same_bits(after[:20, :28], fresh[:20, :28])
    assert same_bits(new_scales.flatten()[1:], scales.flatten()[1:])
    assert same_bits(after[20:], stored[20:])


def test_zeros_stay_zeros_and_their_sign():
    values = torch.zeros(20, 56)
    values[0, 1] = -0.0
    ours, scales = quantized(values, ODD)
    assert torch.equal(scales, torch.ones(1, 2))
    back = Fp8Slices(ours, scales, (20, 56), ODD)[:]
    assert torch.equal(back, torch.zeros(20, 56).bfloat16())
    assert torch.signbit(back[0, 1])


def test_the_error_is_at_most_half_a_step_of_8_bit_floats():
    values = matrix(128, 256)
    ours, scales = quantized(values, Fp8Blocks())
    back = ours.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    largest = values.view(1, 128, 2, 128).abs().amax(dim=(1, 3)).repeat_interleave(128, 1)
    bound = torch.maximum(values.abs() / 16, largest / 448 * 2**-10)
    assert ((back - values).abs() <= bound * 1.0001).all()
