from functools import cache
from pathlib import Path

import pytest
import torch

from mtrain.config.training import TrainingConfig
from mtrain.config.tuner import TunerConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.freeze import freeze_parameters, global_parameter_names
from tests.megatron import load_model
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, rows

ONE = ParallelLayout()
PIPELINE = ParallelLayout(world_size=2, pp_size=2)
VIRTUAL = ParallelLayout(world_size=2, pp_size=2, vpp_size=2)
TENSOR = ParallelLayout(world_size=2, tp_size=2)
LAYOUTS = pytest.mark.parametrize(
    "layout", [PIPELINE, VIRTUAL, TENSOR], ids=["pp2", "pp2vpp2", "tp2"]
)
HF_NAMES = {
    "decoder.layers.1.self_attention.linear_qkv.weight": (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ),
    "decoder.layers.1.self_attention.linear_proj.weight": (
        "model.layers.1.self_attn.o_proj.weight",
    ),
}

STORED_NAMES = {
    f"decoder.layers.{layer}.input_layernorm.weight": (
        f"decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight"
    )
    for layer in range(4)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("freeze") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("freeze") / "tied", "qwen3_tied")


def trained(state: ParallelState, folder: Path, settings: dict) -> tuple[int, set[str]]:
    chunks = load_model(state, folder)
    count = freeze_parameters(
        chunks,
        tuner=TunerConfig(**settings),
        state=state,
        hf_names=HF_NAMES,
        stored_names=STORED_NAMES,
    )
    names = {
        name
        for chunk in chunks
        for name, parameter in global_parameter_names(chunk)
        if parameter.requires_grad
    }
    return count, names


@cache
def trained_everywhere(layout: ParallelLayout, folder: Path, **settings) -> set[str]:
    ranks = run_ranks(layout, trained, folder, settings)
    assert len({count for count, _ in ranks}) == 1
    return set().union(*(names for _, names in ranks))


@LAYOUTS
@pytest.mark.parametrize(
    "settings",
    [
        {"freeze_parameters": ("embedding", "decoder.layers.0.", "decoder.layers.3.mlp")},
        {"freeze_parameters_regex": r"layers\.[12]\..*norm"},
        {"freeze_parameters_ratio": 0.5},
        {"freeze_parameters_ratio": 1.0, "trainable_parameters": ("decoder.layers.2.",)},
        {"freeze_parameters": ("",), "trainable_parameters_regex": r"layers\.3\.mlp"},
    ],
)
def test_the_same_parameters_are_frozen_on_every_layout(folder, layout, settings):
    expected = trained_everywhere(ONE, folder, **settings)
    assert trained_everywhere(layout, folder, **settings) == expected
    everything = trained_everywhere(ONE, folder)
    assert set() < expected < everything


def test_a_prefix_freezes_what_begins_with_it(folder):
    frozen = trained_everywhere(ONE, folder) - trained_everywhere(
        ONE, folder, freeze_parameters=("decoder.layers.3.self_attention.linear",)
    )
    assert frozen == {
        # Megatron-LM's name of it begins so.
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_proj.weight",
    }


def test_norms_are_known_by_the_names_of_megatron_lm_too(folder):
    frozen = trained_everywhere(PIPELINE, folder) - trained_everywhere(
        PIPELINE, folder, freeze_parameters_regex="layer_norm_weight"
    )
    assert frozen == set(STORED_NAMES)


def test_a_ratio_freezes_from_the_embedding_on(folder):
    frozen = trained_everywhere(PIPELINE, folder) - trained_everywhere(
        PIPELINE, folder, freeze_parameters_ratio=0.1
    )
    assert "embedding.word_embeddings.weight" in frozen
    assert not any(name.startswith(("decoder.layers.3", "output_layer")) for name in frozen)


def test_hugging_face_names_work_too(folder):
    frozen = trained_everywhere(PIPELINE, folder) - trained_everywhere(
        PIPELINE, folder, freeze_parameters=("model.layers.1.self_attn",)
    )
    assert frozen == set(HF_NAMES)


def refusal(state: ParallelState, folder: Path, settings: dict) -> str:
    with pytest.raises(ValueError) as caught:
        trained(state, folder, settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze_parameters": ("decoder.layer.0",)},
            "--freeze_parameters 'decoder.layer.0' matches no parameter; there are: "
            "embedding.word_embeddings.weight, decoder.layers.*.",
        ),
        ({"trainable_parameters_regex": "lora"}, "--trainable_parameters_regex 'lora' matches no"),
        ({"freeze_parameters_regex": "("}, "'(' is not a regular expression"),
        ({"freeze_parameters": ("model.layers.1.self_attn.q_proj",)}, "which is one parameter"),
        ({"freeze_parameters_regex": "."}, "all parameters are frozen"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_on_all_ranks(folder, settings, message):
    for text in run_ranks(PIPELINE, refusal, folder, settings):
        assert message in text


def train_frozen(
    state: ParallelState, folder: Path, settings: dict, training: TrainingConfig
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rig = make_rig(state, folder, tuner=TunerConfig(**settings), training=training)
    before = rig.weights()
    for step in (1, 2):
        rig.step([rows([document], length=16) for document in documents(4)], step)
    after = rig.weights()
    return {name: (before[name], after[name]) for name in before}


@pytest.mark.parametrize(
    ("layout", "settings", "recompute"),
    [
        (ONE, {"freeze_parameters_ratio": 0.5}, "none"),
        (ONE, {"freeze_parameters": ("embedding",)}, "full"),
        # A whole stage is frozen and has no optimizer of its own.
        (PIPELINE, {"freeze_parameters_regex": r"embedding|layers\.[01]\."}, "none"),
        (PIPELINE, {"freeze_parameters_regex": r"layers\.[23]\.|output|final"}, "full"),
    ],
)
def test_training_leaves_frozen_weights_alone_and_changes_all_others(
    folder, layout, settings, recompute
):
    expected = trained_everywhere(ONE, folder, **settings)
    training = TrainingConfig(recompute_granularity=recompute)
    for weights in run_ranks(layout, train_frozen, folder, settings, training):
        for name, (before, after) in weights.items():
            assert torch.equal(before, after) == (name not in expected), name


def test_the_output_layer_of_a_tied_model_is_frozen_with_the_embedding(tied_folder):
    settings = {"freeze_parameters": ("embedding",)}
    for weights in run_ranks(PIPELINE, train_frozen, tied_folder, settings, TrainingConfig()):
        before, after = weights["embedding.word_embeddings.weight"]
        assert torch.equal(before, after)
