"""Latent attention where the whole model does not show it; the rest is in test_gpt."""

import pytest
import torch

from mtrain.parallel import ParallelLayout
from tests.megatron import load_model, packed_inputs
from tests.model.test_gpt import hugging_face_logits
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

LENGTHS = [9, 3, 20]
LONG_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8,
}


def logits_of(state, folder):
    (model,) = load_model(state, folder)
    inputs = packed_inputs(LENGTHS, 131)
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0.1},
        {"rope_interleave": False},
        {"rope_parameters": LONG_YARN},
        {"q_lora_rank": None, "v_head_dim": 24},
    ],
    ids=["epsilon", "halves", "yarn", "wide_values"],
)
def test_logits_equal_hugging_face(changes, tmp_path):
    """Norms of compressed queries and keys have an epsilon of their own, whatever the model's."""
    folder = make_checkpoint(tmp_path, "deepseek_v3", **changes)
    (logits,) = run_ranks(ParallelLayout(), logits_of, folder)
    expected = hugging_face_logits(folder, packed_inputs(LENGTHS, 131)["input_ids"], LENGTHS)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def parameters_of(state, folder):
    (model,) = load_model(state, folder)
    attention = model.decoder.layers[0].self_attention
    return {name: tuple(p.shape) for name, p in attention.named_parameters()}


def test_tensor_parallel_ranks_hold_the_down_projections_whole(tmp_path):
    folder = make_checkpoint(tmp_path, "deepseek_v3")
    for shapes in run_ranks(ParallelLayout(world_size=2, tp_size=2), parameters_of, folder):
        assert shapes["linear_q_down_proj.weight"] == (24, 64)
        assert shapes["linear_kv_down_proj.weight"] == (16 + 8, 64)
        assert shapes["linear_q_up_proj.weight"] == (4 * 32 // 2, 24)
        assert shapes["linear_kv_up_proj.weight"] == (4 * 40 // 2, 16)
        assert shapes["linear_proj.weight"] == (64, 4 * 16 // 2)
