"""Configs of published checkpoints, in full size, expand to plans: no weights, no GPU.

Figures are those of the model pages. The MTP layers of DeepSeek-V3 and GLM-4.5 also hold copies of
embedding and head (`copied`), which the pages count.
"""

import json
from math import prod
from pathlib import Path

import pytest

from mtrain.bridge.families import FAMILIES, find_family
from mtrain.bridge.plan import hf_tensors, plan_rank, weight_table
from mtrain.bridge.spans import box_size
from mtrain.parallel import ParallelLayout

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
LAYOUTS = {
    "openai-community/gpt2": {"tp_size": 4, "pp_size": 3},
    "google/gemma-3-1b-it": {"tp_size": 4, "pp_size": 2},
    "microsoft/phi-4": {"tp_size": 2, "pp_size": 4, "vpp_size": 2},
    "meta-llama/Llama-3.1-8B": {"tp_size": 8, "pp_size": 4},
    "Qwen/Qwen3-8B": {"tp_size": 4, "pp_size": 2, "vpp_size": 3},
    "Qwen/Qwen1.5-MoE-A2.7B": {"pp_size": 4, "ep_size": 4, "etp_size": 2, "tp_size": 2},
    "Qwen/Qwen3-30B-A3B": {"tp_size": 4, "pp_size": 4, "ep_size": 16},
    "Qwen/Qwen3-235B-A22B": {
        "tp_size": 4,
        "pp_size": 8,
        "num_layers_in_first_stage": 11,
        "num_layers_in_last_stage": 11,
        "ep_size": 64,
    },
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {"tp_size": 2, "pp_size": 4, "ep_size": 64},
    "openai/gpt-oss-120b": {"tp_size": 4, "pp_size": 4, "ep_size": 32, "etp_size": 2},
    "deepseek-ai/DeepSeek-V2": {"tp_size": 8, "pp_size": 4, "ep_size": 32},
    "deepseek-ai/DeepSeek-V3 with its MTP layer": {
        "tp_size": 8,
        "pp_size": 16,
        "ep_size": 64,
        "num_layers_in_first_stage": 3,
        "num_layers_in_last_stage": 2,
        "world_size": 1024,
    },
    "zai-org/GLM-4.5": {"tp_size": 8, "pp_size": 4, "ep_size": 32},
}


def table_of(name):
    entry = PUBLISHED[name]
    return weight_table(entry["config"], entry["num_next_tokens"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_figures(name):
    entry = PUBLISHED[name]
    config = entry["config"]
    tensors = hf_tensors(table_of(name))
    num_parameters = sum(map(prod, tensors.values()))
    num_parameters += entry.get("copied", 0) * config["vocab_size"] * config.get("hidden_size", 0)
    if entry["parameters"] is not None:
        assert num_parameters == entry["parameters"]
    else:
        assert round(num_parameters / 1e9) == entry["billions"]
    if entry["tensors"] is not None:
        assert len(tensors) == entry["tensors"]


def test_every_family_has_a_published_config():
    families = {find_family(entry["config"]).name for entry in PUBLISHED.values()}
    assert families == {family.name for family in FAMILIES.values()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_large_layout_covers_every_tensor_exactly_once(name):
    """Ranks of the first data-parallel copy: their parts are equal or do not touch."""
    sizes = dict(LAYOUTS[name])
    dense = sizes.get("tp_size", 1) * sizes["pp_size"]
    expert = sizes.get("etp_size", 1) * sizes.get("ep_size", 1) * sizes["pp_size"]
    layout = ParallelLayout(**{"world_size": max(dense, expert), **sizes})
    table = table_of(name)
    boxes: dict[str, set] = {}
    for rank in range(layout.world_size):
        for parameter in plan_rank(table, layout=layout, rank=rank):
            if not parameter.is_duplicate:
                for piece in parameter.pieces:
                    boxes.setdefault(piece.hf_name, set()).add(piece.hf)
    covered = {tensor: sum(map(box_size, parts)) for tensor, parts in boxes.items()}
    assert covered == {tensor: prod(shape) for tensor, shape in hf_tensors(table).items()}
