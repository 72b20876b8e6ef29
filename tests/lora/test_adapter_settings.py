"""adapter_config.json: what PEFT writes is read; what is unsound or not built is one line (T26)."""

import json
import os

import peft
import pytest

from mtrain.lora.adapter_settings import MAX_CONFIG_BYTES, MAX_RANK, read_settings, scale_ratio

SOUND = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def write(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps(SOUND | changes))
    return folder


def test_what_peft_writes_is_read(tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=True,
        lora_dropout=0.25,
        target_modules=["q_proj"],
        target_parameters=["mlp.gate.weight"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 3.5},
        modules_to_save=["lm_head"],
        base_model_name_or_path="org/name",
    )
    config.save_pretrained(tmp_path)
    settings = read_settings(tmp_path)
    assert (settings.rank, settings.alpha, settings.use_rslora) == (4, 10.0, True)
    assert settings.dropout == 0.25
    assert settings.target_parameters == ("mlp.gate.weight",)
    assert settings.modules_to_save == ("lm_head",)
    assert settings.base == "org/name"
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert list(settings.ranks_and_alphas(names).values()) == [(4, 10.0), (2, 3.5)]


def test_a_targeted_parameter_is_looked_up_by_its_own_name(tmp_path):
    settings = read_settings(write(tmp_path, target_parameters=["gate.weight"]))
    assert settings.lookup_name("model.layers.0.mlp.gate") == "model.layers.0.mlp.gate.weight"
    assert settings.lookup_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert settings.lookup_name("model.layers.0.mlp.nogate") == "model.layers.0.mlp.nogate"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora.* DoRA"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"bias": "lora_only"}, "'bias' is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "ADALORA"}, "'peft_type' is 'ADALORA'; only LORA"),
        ({"peft_type": None}, "'peft_type' is None"),
        ({"peft_type": ["LORA"]}, "'peft_type'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"megatron_config": {"tp": 1}}, "megatron_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', which changes the base"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"r": 0}, "'r' must be a rank from 1 to"),
        ({"r": -1}, "'r' must be"),
        ({"r": True}, "'r' must be"),
        ({"r": 8.0}, "'r' must be"),
        ({"r": MAX_RANK + 1}, "'r' must be"),
        ({"r": None}, "'r' must be"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' must be a number"),
        ({"lora_alpha": float("inf")}, "'lora_alpha' must be a number"),
        ({"lora_alpha": 10**400}, "'lora_alpha' must be a number"),
        ({"lora_alpha": "16"}, "'lora_alpha' must be a number"),
        ({"lora_alpha": None}, "'lora_alpha' must be a number"),
        ({"lora_dropout": "0.1"}, "'lora_dropout' must be a number from 0 to 1"),
        ({"lora_dropout": 2}, "'lora_dropout' must be"),
        ({"use_rslora": "false"}, "'use_rslora' must be true or false"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' must be an object"),
        ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern': 'q_proj' must be a rank"),
        ({"alpha_pattern": {"q_proj": {}}}, "'alpha_pattern': 'q_proj' must be a number"),
        ({"target_parameters": "gate"}, "'target_parameters' must be a list of names"),
        ({"modules_to_save": [1]}, "'modules_to_save' must be a list of names"),
        ({"modules_to_save": [""]}, "'modules_to_save' must be a list of names"),
        ({"base_model_name_or_path": {}}, "'base_model_name_or_path' must be text"),
    ],
    ids=str,
)
def test_what_is_not_built_or_not_sound_is_refused(tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        read_settings(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'adapter_config.json'}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_how_factors_began_does_not_matter_where_the_base_stays(tmp_path, start):
    assert read_settings(write(tmp_path, init_lora_weights=start)).rank == 8


def test_fields_of_later_versions_are_left_alone(tmp_path):
    assert read_settings(write(tmp_path, some_new_field=7, peft_version="9")).rank == 8


def test_the_name_of_the_base_is_never_opened(tmp_path):
    trap = tmp_path / "base"
    os.mkfifo(trap)  # opening it would wait for ever
    assert read_settings(write(tmp_path, base_model_name_or_path=str(trap))).base == str(trap)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"r": 1, "r": 2}', "occurs twice"),
        (b"[" * 100_000, "not valid JSON|nested too deeply"),
        (b"\xff\xfe", "not valid JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
    ids=["empty", "list", "twice", "deep", "bytes", "large"],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, reason):
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        read_settings(tmp_path)


def test_a_folder_without_a_config_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json, so it is no PEFT adapter"):
        read_settings(tmp_path)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_settings(tmp_path)


def test_a_hostile_pattern_names_the_file(tmp_path):
    settings = read_settings(write(tmp_path, alpha_pattern={"(.*)*(.*)*(.*)*x": 1}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: .* takes more than"):
        settings.ranks_and_alphas(["model.layers.0.self_attn.q_proj"])


def test_a_part_of_the_rank_keeps_the_scale():
    assert 8 * scale_ratio(2, 4, use_rslora=False) / 2 == 8 / 4
    ratio = scale_ratio(2, 4, use_rslora=True)
    assert 8 * ratio / 2**0.5 == pytest.approx(8 / 4**0.5, rel=1e-15)
