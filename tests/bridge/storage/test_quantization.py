import pytest

from mtrain.bridge.storage.quantization import (
    Fp8Blocks,
    check_quantization,
    fp8_blocks,
    without_quantization,
)

DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def config(settings):
    return {"model_type": "qwen3", "quantization_config": settings}


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        DEEPSEEK,
        # What transformers and Qwen write.
        {"quant_method": "fp8", "weight_block_size": [64, 32], "modules_to_not_convert": ["x"]},
        {"quant_method": "fp8"},
        {**DEEPSEEK, "scale_fmt": "ue8m0"},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    ],
    ids=str,
)
def test_what_can_be_read_passes(settings):
    check_quantization(config(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"load_in_8bit": True}, "quant_method None"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method 'fbgemm_fp8'"),
        ({**DEEPSEEK, "weight_block_size": None}, "weight_block_size None"),
        ({**DEEPSEEK, "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({**DEEPSEEK, "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
        ({**DEEPSEEK, "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({**DEEPSEEK, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**DEEPSEEK, "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ("fp8", "must be an object, got 'fp8'"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_in_one_line(settings, message):
    for check in (check_quantization, fp8_blocks):
        with pytest.raises(ValueError, match=message) as caught:
            check(config(settings))
        assert "\n" not in str(caught.value)


def test_the_size_of_blocks_is_that_of_the_config_or_128():
    assert fp8_blocks({}) == fp8_blocks(config(DEEPSEEK)) == Fp8Blocks(rows=128, columns=128)
    assert fp8_blocks(config({"quant_method": "fp8"})) == Fp8Blocks()
    other = {**DEEPSEEK, "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}
    assert fp8_blocks(config(other)) == Fp8Blocks(rows=64, columns=32, has_power_scales=True)


def test_there_is_a_factor_for_a_block_that_is_cut_short():
    assert Fp8Blocks().scale_shape((576, 7168)) == (5, 56)
    assert Fp8Blocks().scale_shape((4, 128, 129)) == (4, 1, 2)


def test_a_config_without_quantisation_is_otherwise_the_same():
    before = config(DEEPSEEK)
    assert without_quantization(before) == {"model_type": "qwen3"}
    assert before == config(DEEPSEEK)
    assert without_quantization({"a": 1}) == {"a": 1}
