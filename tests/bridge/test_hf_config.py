import math

import pytest

from mtrain.bridge.family import Llama3Rope, Rope
from mtrain.bridge.hf_config import (
    boolean,
    number,
    positive_int,
    refuse,
    rope,
    rotary_base,
    sliding_window,
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
    assert rope(config, head_dim=64) == Rope(base=5e5, dim=64, scaling=Llama3Rope(**LLAMA3))


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
    assert rope(config, head_dim=64) == Rope(base=base, dim=64)


def test_part_of_a_head_turns_where_the_family_has_that():
    config = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    assert rope(config, head_dim=64, partial=0.5).dim == 48
    assert rope({}, head_dim=64, partial=0.5).dim == 32
    assert rope({"partial_rotary_factor": 0.25}, head_dim=64, partial=0.5).dim == 16


def test_yarn_infers_its_attention_factor_as_transformers_does():
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    config = {"max_position_embeddings": 163840, "rope_scaling": yarn}
    assert rope(config, head_dim=64).scaling.attention_factor == 0.1 * math.log(40) + 1
    both = {**yarn, "mscale": 0.707, "mscale_all_dim": 0.707}
    assert rope({**config, "rope_scaling": both}, head_dim=64).scaling.attention_factor == 1.0
    given = {**yarn, "attention_factor": 1.5, "truncate": False, "beta_fast": None}
    scaling = rope({**config, "rope_scaling": given}, head_dim=64).scaling
    assert (scaling.attention_factor, scaling.rounds, scaling.beta_fast) == (1.5, False, 32.0)


def test_longrope_counts_from_the_length_beside_its_settings():
    config = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1, 2.0], "long_factor": [3, 4]},
    }
    scaling = rope(config, head_dim=4, kinds=("longrope",)).scaling
    assert scaling.original_max_position_embeddings == 4096
    assert scaling.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    assert scaling.long_factor == (3.0, 4.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not built; supp"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not built"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'original_max|no 'low_freq"),
        ({"rope_scaling": "llama3"}, "'rope_scaling' must be an object"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "'partial_rot"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "is not built"),
    ],
)
def test_other_rotary_embeddings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        rope(config, head_dim=64)


def test_a_window_counts_if_a_sequence_may_be_longer():
    config = {"max_position_embeddings": 4096, "num_hidden_layers": 2}
    assert sliding_window(config, window=None) == {}
    assert sliding_window(config, window=4096) == {}
    assert sliding_window(config, window=4095) == {"window": 4095, "windowed_layers": (0, 1)}
    assert sliding_window(config, window=64, windowed=[1])["windowed_layers"] == (1,)
    kept = sliding_window(config, window=4096, is_kept=True)
    assert kept == {"window": 4096, "windowed_layers": (0, 1)}
    kinds = {**config, "layer_types": ["sliding_attention", "full_attention"]}
    assert sliding_window(kinds, window=64)["windowed_layers"] == (0,)


@pytest.mark.parametrize(
    ("changes", "window", "message"),
    [
        ({}, "4096", "'sliding_window' must be a whole number above zero, got '4096'"),
        ({"layer_types": ["full_attention"]}, 8, "1 'layer_types' for 2 layers"),
        ({"layer_types": ["linear_attention"] * 2}, 8, r"'layer_types' has \['linear_attention'\]"),
    ],
)
def test_windows_that_make_no_sense_are_refused(changes, window, message):
    config = {"max_position_embeddings": 4096, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match=message):
        sliding_window({**config, **changes}, window=window)
