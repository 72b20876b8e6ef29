"""Every family against the Hugging Face class and against what its config.json may ask for."""

import re

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from mtrain.bridge.families import FAMILIES, find_family
from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.view import arranged
from tests.tiny import TINY, make_checkpoint, tiny_config

# No class of transformers has them.
REMOTE = ("kimi_k2", "mimo")
# What no class has a usable default for.
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 2}}


def class_defaults(model_type):
    """The config.json that transformers writes for a model of which nothing was said."""
    written = AutoConfig.for_model(model_type).to_dict()
    return written | {"model_type": model_type} | NEEDED.get(model_type, {})


def describe(name, **changes):
    config = tiny_config(name, **changes)
    return find_family(config).megatron_config(config)


@pytest.mark.parametrize("name", TINY)
def test_the_table_has_the_tensors_that_transformers_writes(name, tmp_path):
    """T23: names and shapes, as they are on disk or as a storage form shows them."""
    table = weight_table(tiny_config(name))
    stored = arranged(open_checkpoint(make_checkpoint(tmp_path, name)), table)
    shapes = {key: tensor.shape for key, tensor in stored.tensors.items()}
    assert shapes == hf_tensors(table)


@pytest.mark.parametrize("name", TINY)
def test_files_that_look_like_the_model_in_memory_are_read_too(name, tmp_path):
    """Stacked experts, and modules by the names that they have in the class."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "original", name))
    model.save_pretrained(tmp_path / "in_memory", save_original_format=False)
    table = weight_table(tiny_config(name))
    stored = arranged(open_checkpoint(tmp_path / "in_memory"), table)
    shapes = {key: tensor.shape for key, tensor in stored.tensors.items()}
    assert shapes == hf_tensors(table)


@pytest.mark.parametrize("name", TINY)
def test_a_config_written_by_transformers_says_the_same(name):
    fields = tiny_config(name)
    model_type = fields.pop("model_type")
    written = AutoConfig.for_model(model_type, **fields).to_dict()
    family = FAMILIES[model_type]
    assert family.megatron_config(written) == family.megatron_config(tiny_config(name))
    assert family.weight_table(written) == family.weight_table(tiny_config(name))


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"mistral", "gpt2", *REMOTE}))
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "tie_word_embeddings"])
def test_defaults_are_those_of_the_hugging_face_class(model_type, key):
    config = class_defaults(model_type)
    absent = {field: value for field, value in config.items() if field != key}
    if key == "num_key_value_heads":
        # Given as a plain number by every published config; absent means one for each head.
        config[key] = config["num_attention_heads"]
    family = FAMILIES[model_type]
    assert family.megatron_config(absent) == family.megatron_config(config)


def test_a_model_type_without_a_family_is_refused_with_a_list():
    with pytest.raises(ValueError, match="'bert', which no family supports; supported: llama, mi"):
        find_family({"model_type": "bert"})
    with pytest.raises(ValueError, match="None, which no family supports"):
        find_family({})


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' 'gelu' is not built; supported: silu"),
    ("llama", {"attention_bias": True}, "'attention_bias' is True"),
    ("llama", {"mlp_bias": True}, "'mlp_bias' is True"),
    ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not built"),
    ("llama", {"attention_dropout": 0.1}, "'attention_dropout' is 0.1, which is not built"),
    ("llama", {"hidden_size": None}, "no 'hidden_size'"),
    ("llama", {"rms_norm_eps": None}, "no 'rms_norm_eps'"),
    ("llama", {"vocab_size": "131"}, "'vocab_size' must be a whole number"),
    ("mistral", {"sliding_window": "128"}, "'sliding_window' must be a whole number"),
    ("qwen3", {"attention_bias": True}, "'attention_bias' is True"),
    ("qwen3_moe", {"attention_bias": True}, "'attention_bias' is True"),
    ("qwen3_moe", {"layer_types": ["linear_attention"] * 4}, "'layer_types' has"),
    ("mixtral", {"router_jitter_noise": 0.1}, "'router_jitter_noise' is 0.1"),
    ("deepseek_v2", {"norm_topk_prob": True}, "'norm_topk_prob' is True"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc'"),
    ("deepseek_v3", {"norm_topk_prob": False}, "'norm_topk_prob' false is not built"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "only 'sigmoid' is built for deepseek_v3"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "'moe_layer_freq' other than 1"),
    ("deepseek_v3", {"attention_bias": True}, "'attention_bias' is True"),
    ("gpt_oss_moe", {"swiglu_alpha": 1.0}, "'swiglu_alpha' other than 1.702"),
    ("gpt_oss_moe", {"attention_bias": False}, "'attention_bias' false is not built"),
    ("qwen3_next_moe", {"linear_num_value_heads": 3}, "3 value heads cannot share 2 key heads"),
    ("qwen3_next_moe", {"num_nextn_predict_layers": 2}, "more than one layer of multi-token"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
    ("phi3", {"resid_pdrop": 0.1}, "'resid_pdrop' is 0.1"),
    ("phi3", {"rope_parameters": {"rope_type": "llama3"}}, "supported: default, longrope"),
    ("gpt2", {"activation_function": "relu"}, "'activation_function' 'relu' is not built"),
    ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' false is not built"),
    ("gpt2", {"n_head": 3}, "'n_embd' 64 is no multiple of 3 heads"),
    ("qwen3_moe", {"num_experts": None}, "no 'num_experts'"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "cannot go to 5 of 4 experts"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "'norm_topk_prob' with one expert a token"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_not_built_is_refused_in_one_line(name, changes, message):
    config = tiny_config(name, **changes)
    family = find_family(config)
    for function in (family.weight_table, family.megatron_config):
        with pytest.raises(ValueError, match=message) as caught:
            function(config)
        assert "\n" not in str(caught.value)


def test_mistral_must_say_whether_it_has_a_window():
    config = tiny_config("mistral")
    del config["sliding_window"]
    with pytest.raises(ValueError, match="no 'sliding_window'; null means full attention"):
        weight_table(config)


def test_qwen_windows_that_are_switched_off_do_not_matter():
    describe("qwen2", use_sliding_window=False, sliding_window=128)


def test_architectures_in_megatron_words():
    assert describe("qwen2").transformer["add_qkv_bias"]
    assert describe("qwen3").transformer["qk_layernorm"]
    assert describe("qwen3").transformer["kv_channels"] == 32
    llama = describe("llama3_tied")
    assert llama.transformer["kv_channels"] == 16
    assert llama.gpt.is_tied
    assert llama.gpt.rope.scaling.factor == 8.0
    assert llama.activation == "silu"
    assert {"add_qkv_bias", "qk_layernorm", "add_bias_linear"} & {
        key for key, value in llama.transformer.items() if value
    } == set()


def test_renormalised_experts_choose_before_the_softmax():
    """The other way round, a token's expert weights do not sum to one."""
    assert not describe("qwen3_moe").transformer["moe_router_pre_softmax"]
    assert describe("qwen3_moe_mixed").transformer["moe_router_pre_softmax"]


def test_windows_of_layers():
    """Megatron-Core counts the tokens before a token, Hugging Face the token itself too."""
    mistral = describe("mistral", sliding_window=128).transformer
    assert (mistral["window_size"], mistral["window_attn_skip_freq"]) == ((127, 0), [1, 1, 1, 1])
    qwen = describe(
        "qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=3
    ).transformer
    assert qwen["window_attn_skip_freq"] == [0, 0, 0, 1]
    assert describe("gpt_oss_moe").transformer["window_attn_skip_freq"] == [1, 0, 1, 0]
    assert describe("gemma3").transformer["window_attn_skip_freq"] == [1, 1, 0, 1]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next_moe"])
def test_multi_token_prediction_is_built_on_request_and_carried_otherwise(name):
    config = tiny_config(name)
    family = find_family(config)
    assert family.num_next_tokens(config) == 1
    without, with_it = (family.weight_table(config, number) for number in (0, 1))
    carried, copied = (
        [entry for entry in table.ignored if entry.is_carried] for table in (without, with_it)
    )
    assert carried
    assert all(entry.copy_of is None for entry in carried)
    # What is built leaves copies of other tensors alone, which are made again.
    assert all(entry.copy_of is not None for entry in copied)
    more = hf_tensors(with_it).keys() - hf_tensors(without).keys()
    assert more
    assert all(any(re.fullmatch(entry.pattern, key) for entry in without.ignored) for key in more)
    assert family.megatron_config(config, 1).transformer["mtp_num_layers"] == 1
    assert "mtp_num_layers" not in family.megatron_config(config).transformer
    with pytest.raises(ValueError, match="--mtp_num_layers 2: the model has 1 layers"):
        family.weight_table(config, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1]),
        ({"mlp_only_layers": [0, 3]}, [0, 1, 1, 0]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 0, 0, 1]),
    ],
)
def test_layers_with_experts(changes, expected):
    assert describe("qwen3_moe", **changes).transformer["moe_layer_freq"] == expected
