"""The checkpoint to start from: found, overridden, checked, before anything else happens."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import modelscope
import pytest
import torch
from transformers import AutoModelForCausalLM

from mtrain.bridge.family import Llama3Rope
from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.bridge.storage.stored_as import CANONICAL
from mtrain.cli.model_source import hf_names, open_source, parallel_layout, stored_names
from mtrain.config import ModelConfig, ParallelConfig
from tests.bridge.storage.quantized import quantized_copy
from tests.megatron import packed_inputs
from tests.ranks import run_ranks
from tests.tiny import _LLAMA3_ROPE, make_checkpoint

LLAMA3_ROPE = {name: value for name, value in _LLAMA3_ROPE.items() if name != "rope_theta"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def open_local(folder: Path, *, world_size: int = 1, parallel=None, **model):
    return open_source(
        ModelConfig(model=str(folder), **model),
        parallel or ParallelConfig(),
        world_size=world_size,
        download=False,
    )


def edited(folder: Path, copy: Path, **changes) -> Path:
    """The same weights under another config.json; None takes an entry out."""
    copy.mkdir()
    (copy / "model.safetensors").hardlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_local_folder_is_opened_as_it_is(folder) -> None:
    source = open_local(folder)
    assert source.folder == folder
    assert source.hf_config == json.loads((folder / "config.json").read_text())
    assert source.family.name.startswith("Llama")
    assert "model.norm.weight" in source.weights.tensors


def test_a_layout_that_the_model_does_not_divide_into_is_refused(folder) -> None:
    """What ranks would find out is found before they are started."""
    with pytest.raises(ValueError, match="3 pipeline stages"):
        open_local(folder, world_size=3, parallel=ParallelConfig(pipeline_model_parallel_size=3))


def test_the_layout_has_every_size_of_the_flags() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        virtual_pipeline_model_parallel_size=5,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        decoder_first_pipeline_num_layers=7,
        decoder_last_pipeline_num_layers=8,
    )
    layout = parallel_layout(parallel, world_size=24)
    assert (layout.tp_size, layout.pp_size, layout.vpp_size, layout.ep_size) == (2, 3, 5, 4)
    assert (layout.etp_size, layout.dp_size, layout.edp_size) == (1, 4, 2)
    assert (layout.num_layers_in_first_stage, layout.num_layers_in_last_stage) == (7, 8)


def test_names_of_both_worlds_for_freezing(folder) -> None:
    table = open_local(folder).table
    names = hf_names(table)
    assert names["decoder.layers.3.self_attention.linear_qkv.weight"] == tuple(
        f"model.layers.3.self_attn.{name}_proj.weight" for name in "qkv"
    )
    norm = ("model.layers.0.input_layernorm.weight",)
    assert names["decoder.layers.0.input_layernorm.weight"] == norm
    layers = [f"decoder.layers.{layer}." for layer in range(4)]
    assert stored_names(table) == {
        f"{layer}{ours}": f"{layer}{theirs}"
        for layer in layers
        for ours, theirs in (
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        )
    }


def test_another_model_type_is_trained_and_saved_as_such(folder, tmp_path) -> None:
    source = open_local(edited(folder, tmp_path / "m", model_type="custom"), model_type="llama")
    assert source.hf_config["model_type"] == "llama"
    assert "architectures" not in source.hf_config, "they belong to the other type"
    with pytest.raises(ValueError, match="'custom', which no family supports"):
        open_local(tmp_path / "m")


def test_the_form_that_weights_are_in_is_that_which_they_are_saved_in(folder, tmp_path) -> None:
    assert open_local(folder).stored_as(keeps_fp8=False) == CANONICAL
    with pytest.raises(ValueError, match="has no weights in 8-bit floats"):
        open_local(folder).stored_as(keeps_fp8=True)
    quantized = quantized_copy(folder, tmp_path / "quantized", Fp8Blocks(rows=16, columns=16))
    source = open_local(quantized)
    form = source.stored_as(keeps_fp8=True)
    assert form.is_quantized("model.layers.0.self_attn.q_proj.weight")
    assert not form.is_quantized("model.norm.weight")
    assert source.stored_as(keeps_fp8=False) == CANONICAL
    assert {tensor.dtype for tensor in source.weights.tensors.values()} == {"BF16", "F32"}


def test_weights_from_torch_dist_are_saved_natively_and_not_in_8_bits(folder) -> None:
    source = replace(open_local(folder), files=None, mcore_folder=folder)
    assert source.stored_as(keeps_fp8=False) == CANONICAL
    with pytest.raises(ValueError, match=f"{folder} has no weights in 8-bit floats"):
        source.stored_as(keeps_fp8=True)


def test_the_own_model_type_changes_nothing(folder) -> None:
    assert open_local(folder, model_type="llama").hf_config == open_local(folder).hf_config


OLD_SPELLING = {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": None}
BOTH_SPELLINGS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "rope_scaling": {"rope_type": "default", "rope_theta": 500.0},
}
NEW_SPELLING = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


@pytest.mark.parametrize(
    "changes",
    [OLD_SPELLING, NEW_SPELLING, BOTH_SPELLINGS],
    ids=["rope_scaling", "rope_parameters", "both"],
)
def test_rope_scaling_acts_and_is_saved(folder, tmp_path, changes) -> None:
    """T42: what we compute is what transformers computes from the config that we save."""
    source = open_local(edited(folder, tmp_path / "m", **changes), rope_scaling=LLAMA3_ROPE)
    gpt = source.family.megatron_config(source.hf_config).gpt
    assert gpt.rope is not None
    assert gpt.rope.base == 500.0
    assert isinstance(gpt.rope.scaling, Llama3Rope)
    assert gpt.rope.scaling.factor == 8.0

    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "model.safetensors").hardlink_to(folder / "model.safetensors")
    (saved / "config.json").write_text(json.dumps(source.hf_config))
    inputs = packed_inputs([200], 131)
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(inputs["input_ids"]).logits
        unscaled = plain(inputs["input_ids"]).logits
    (ours,) = run_ranks(parallel_layout(ParallelConfig(), world_size=1), logits_of, saved, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (expected - unscaled).abs().max() > 1e-2, "the scaling must matter in this test"


def logits_of(state, folder, inputs):
    from tests.megatron import load_model

    (model,) = load_model(state, folder)
    with torch.no_grad():
        return model(inputs["input_ids"], inputs["position_ids"])


def test_rope_scaling_that_is_not_built_is_refused(folder) -> None:
    with pytest.raises(ValueError, match="rotary scaling 'dynamic' is not built"):
        open_local(folder, rope_scaling={"rope_type": "dynamic", "factor": 4.0})


@pytest.fixture
def hub(folder, monkeypatch) -> list[dict]:
    """Replaces both hub clients by the local folder; lists what was asked for."""
    asked: list[dict] = []

    def serve(name: str):
        def snapshot_download(model_id: str, **options):
            asked.append({"client": name, "id": model_id, **options})
            return str(folder)

        return snapshot_download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve("hf"))
    monkeypatch.setattr(modelscope, "snapshot_download", serve("ms"))
    return asked


@pytest.mark.parametrize(("use_hf", "client"), [(False, "ms"), (True, "hf")])
def test_an_id_is_fetched_with_revision_and_token(folder, hub, use_hf, client) -> None:
    model = ModelConfig(model="owner/name", use_hf=use_hf, model_revision="v2", hub_token="secret")
    source = open_source(model, ParallelConfig(), world_size=1, download=True)
    assert source.folder == folder
    assert [(ask["client"], ask["id"]) for ask in hub] == [(client, "owner/name")] * 2
    assert {(ask["revision"], ask["token"], ask["local_files_only"]) for ask in hub} == {
        ("v2", "secret", False)
    }
    assert hub[0]["allow_patterns"] == ["config.json"]
    assert "*.safetensors" in hub[1]["allow_patterns"]


def test_pickles_are_never_fetched(hub) -> None:
    """T25."""
    open_source(ModelConfig(model="a/b"), ParallelConfig(), world_size=1, download=True)
    patterns = [pattern for ask in hub for pattern in ask["allow_patterns"]]
    assert not {"*", "*.bin", "*.pt", "*.pth", "*.py"} & set(patterns)


def test_ranks_do_not_ask_the_network(hub) -> None:
    open_source(ModelConfig(model="a/b"), ParallelConfig(), world_size=1, download=False)
    assert all(ask["local_files_only"] for ask in hub)


def test_an_unsupported_family_is_refused_before_its_weights_are_fetched(
    folder, hub, monkeypatch, tmp_path
) -> None:
    config_only = edited(folder, tmp_path / "m", model_type="qwen3_vl")
    monkeypatch.setattr(
        modelscope, "snapshot_download", lambda _id, **ask: hub.append(ask) or str(config_only)
    )
    with pytest.raises(ValueError, match="supported: llama, mistral, "):
        open_source(ModelConfig(model="a/b"), ParallelConfig(), world_size=1, download=True)
    assert [ask["allow_patterns"] for ask in hub] == [["config.json"]]


def test_sizes_are_checked_for_a_fetched_model_too(hub) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=3)
    with pytest.raises(ValueError, match="num_attention_heads 4 of the model cannot be divided"):
        open_source(ModelConfig(model="a/b"), parallel, world_size=3, download=True)


def test_a_hub_that_fails_is_one_line(monkeypatch) -> None:
    def fail(_id: str, **_options):
        raise OSError("not\n  there: " + "word " * 200)

    monkeypatch.setattr(modelscope, "snapshot_download", fail)
    with pytest.raises(ValueError) as caught:
        open_source(ModelConfig(model="a/b"), ParallelConfig(), world_size=1, download=True)
    text = str(caught.value)
    assert text.startswith(
        "--model a/b: no such folder, and it could not be fetched from ModelScope "
        "(--use_hf true for Hugging Face): not there: word"
    )
    assert text.endswith("word ...")
    assert len(text) < 400
