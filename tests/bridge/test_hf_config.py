import pytest

from mtrain.bridge.family import Llama3Rope
from mtrain.bridge.hf_config import (
    boolean,
    number,
    positive_int,
    refuse,
    refuse_sliding_window,
    rope_scaling,
    rotary_base,
)

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_fields_and_defaults():
    assert positive_int({"a": 3}, "a") == 3
    assert positive_int({"a": None}, "a", 4) == 4
    assert number({"a": 1}, "a") == 1.0
    assert number({}, "a", 0.5) == 0.5
    assert boolean({"a": True}, "a", default=False)
    assert not boolean({"a": None}, "a", default=False)


@pytest.mark.parametrize("value", ["3", 3.0, True, 0, -1, [3]])
def test_what_is_no_positive_integer_is_refused_by_name(value):
    with pytest.raises(ValueError, match="'hidden_size' must be a whole number above zero, got"):
        positive_int({"hidden_size": value}, "hidden_size")


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"config.json has no 'hidden_size'"):
        positive_int({}, "hidden_size")
    with pytest.raises(ValueError, match=r"config.json has no 'rms_norm_eps'"):
        number({"rms_norm_eps": None}, "rms_norm_eps")


@pytest.mark.parametrize("value", ["1e-6", True, [1.0]])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match="'rms_norm_eps' must be a number"):
        number({"rms_norm_eps": value}, "rms_norm_eps")


def test_what_is_no_boolean_is_refused_by_name():
    with pytest.raises(ValueError, match="'tie_word_embeddings' must be true or false, got 'yes'"):
        boolean({"tie_word_embeddings": "yes"}, "tie_word_embeddings", default=False)


def test_refuse_says_why():
    refuse({"mlp_bias": False}, "mlp_bias", "biases in the MLP")
    with pytest.raises(ValueError, match=r"'mlp_bias' is True, .* biases in the MLP"):
        refuse({"mlp_bias": True}, "mlp_bias", "biases in the MLP")


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
)
def test_both_spellings_of_the_rotary_scaling_are_read(config):
    assert rotary_base(config) == 5e5
    assert rope_scaling(config) == Llama3Rope(**LLAMA3)


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 1000000, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "default"}}, 1e6),
    ],
)
def test_no_scaling(config, base):
    assert rotary_base(config) == base
    assert rope_scaling(config) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not built; supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not built"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
        ({"rope_scaling": "llama3"}, "'rope_scaling' must be an object"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "'partial_rot"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "is not built"),
    ],
)
def test_other_rotary_embeddings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        rope_scaling(config)


def test_a_window_passes_if_no_sequence_is_longer():
    config = {"max_position_embeddings": 4096, "layer_types": ["full_attention"]}
    refuse_sliding_window(config, window=None)
    refuse_sliding_window(config, window=4096)
    with pytest.raises(ValueError, match="'sliding_window' is 4095: attention over a sliding"):
        refuse_sliding_window(config, window=4095)
    with pytest.raises(ValueError, match="'sliding_window' is '4096'"):
        refuse_sliding_window(config, window="4096")
    with pytest.raises(ValueError, match=r"'layer_types' has .*'sliding_attention'"):
        refuse_sliding_window(
            {**config, "layer_types": ["full_attention", "sliding_attention"]}, window=None
        )
