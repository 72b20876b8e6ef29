"""Modules that an adapter holds whole: PEFT writes them, and incomplete ones are refused."""

import pytest
from safetensors.torch import load_file, save_file

from mtrain.lora.peft_format import read_adapter
from mtrain.lora.saved_modules import saved_names
from tests.lora.peft_folders import save_with_peft, table_of
from tests.tiny import make_checkpoint

GATE = "base_model.model.model.layers.{}.{}.gate."


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("m"), "qwen3", num_hidden_layers=2)


def test_half_of_a_fused_parameter_cannot_be_saved_whole(dense, tmp_path):
    config = {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]}
    save_with_peft(dense, tmp_path, r=4, **config)
    with pytest.raises(
        ValueError, match=r"q_proj\.weight without .*k_proj\.weight; they are trained"
    ):
        read_adapter(tmp_path, table_of(dense))


def test_a_saved_module_needs_its_bias(tmp_path):
    folder = make_checkpoint(tmp_path / "m", "qwen2", num_hidden_layers=1)
    config = {"target_modules": ["o_proj"], "modules_to_save": ["q_proj", "k_proj", "v_proj"]}
    adapter = tmp_path / "adapter"
    save_with_peft(folder, adapter, r=4, **config)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if not n.endswith("bias")}, path)
    with pytest.raises(ValueError, match=r"holds module .*q_proj without .*q_proj\.bias"):
        read_adapter(adapter, table_of(folder))


def test_a_tied_embedding_cannot_be_trained_apart(tmp_path):
    folder = make_checkpoint(tmp_path / "m", "qwen3_tied", num_hidden_layers=1)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    save_with_peft(folder, tmp_path / "adapter", r=4, **config)
    with pytest.raises(ValueError, match="uses as output layer too"):
        read_adapter(tmp_path / "adapter", table_of(folder))


@pytest.fixture
def saved_gate(tmp_path):
    """Folder of a model, and of an adapter that holds its routers whole."""

    def save(name, **changes):
        folder = make_checkpoint(tmp_path / "m", name, num_hidden_layers=2, **changes)
        config = {"target_modules": ["o_proj"], "modules_to_save": ["mlp.gate"]}
        save_with_peft(folder, tmp_path / "adapter", r=4, **config)
        return folder, tmp_path / "adapter"

    return save


def test_a_module_that_transformers_renamed_has_the_name_of_files(saved_gate):
    folder, adapter = saved_gate("mixtral")
    stored = read_adapter(adapter, table_of(folder))
    (rule,) = stored.lora.modules_to_save
    assert [tensor.name for tensor in rule.hf] == [
        "model.layers.{layer}.block_sparse_moe.gate.weight"
    ]
    names = list(saved_names(rule))
    assert names == [GATE.format(layer, "block_sparse_moe") + "weight" for layer in (0, 1)]
    in_file = load_file(adapter / "adapter_model.safetensors")
    with stored.open() as source:
        for layer, name in enumerate(names):
            expected = in_file[GATE.format(layer, "mlp") + "weight"]
            assert (source.slices(name)[:] == expected).all()


def test_a_router_needs_the_biases_that_choose_experts(saved_gate):
    folder, adapter = saved_gate("deepseek_v3", first_k_dense_replace=0)
    stored = read_adapter(adapter, table_of(folder))
    parameters = [rule.megatron.split("router.")[1] for rule in stored.lora.modules_to_save]
    assert parameters == ["weight", "expert_bias"]
    path = adapter / "adapter_model.safetensors"
    left_out = GATE.format(1, "mlp") + "e_score_correction_bias"
    save_file({name: t for name, t in load_file(path).items() if name != left_out}, path)
    with pytest.raises(ValueError, match=r"holds module .*1\.mlp\.gate without .*correction_bias"):
        read_adapter(adapter, table_of(folder))
