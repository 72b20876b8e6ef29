"""Merged weights: PEFT's own merge is the judge, and live weights do not change."""

import pytest
import torch

from mtrain.bridge.plan import weight_table
from mtrain.bridge.rules import HFTensor
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.storage.view import arranged
from mtrain.lora.merge import merged_lookup
from mtrain.lora.plan import module_name
from tests.adapters import attached, gathered, plan_of, random_factors
from tests.megatron import SINGLE, read_config
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint


def merge(state, folder, lora, values, output):
    chunks = attached(state, folder, lora, values)
    before = [p.clone() for chunk in chunks for p in chunk.parameters()]
    merged = gathered(state, merged_lookup(chunks), output, weight_table(read_config(folder)))
    after = [p for chunk in chunks for p in chunk.parameters()]
    assert all(map(torch.equal, before, after)), "saving changed live weights"
    return merged


def original_weights(folder):
    """The checkpoint by canonical names."""
    weights = arranged(open_checkpoint(folder), weight_table(read_config(folder)))
    with weights.open() as source:
        return {name: source.slices(name)[:].clone() for name in weights.tensors}


def merged_by_hand(folder, lora, values):
    """weight + scale * B @ A for every adapted tensor of the checkpoint."""
    scales = {
        module_name(tensor).split(".")[-1]: adapter.scale
        for linear in lora.linears
        for tensor, adapter in zip(linear.rule.hf, linear.adapters, strict=True)
        if adapter
    }
    result = original_weights(folder)
    for name, weight in result.items():
        module = "base_model.model." + module_name(HFTensor(name, ()))
        if f"{module}.lora_A.weight" in values:
            delta = values[f"{module}.lora_B.weight"] @ values[f"{module}.lora_A.weight"]
            result[name] = weight + scales[module.split(".")[-1]] * delta
        elif f"{module}.lora_embedding_A" in values:
            delta = values[f"{module}.lora_embedding_B"] @ values[f"{module}.lora_embedding_A"]
            result[name] = weight + scales[module.split(".")[-1]] * delta.t()
    return result


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("qwen3", SINGLE, id="qwen3-one"),
        pytest.param("qwen2", layout(tp_size=2, pp_size=2), id="qwen2-tp2_pp2"),
        pytest.param("qwen3", layout(tp_size=4), id="qwen3-tp4"),
        pytest.param("qwen3_moe_mixed", layout(tp_size=2, ep_size=2), id="moe-tp2_ep2"),
        pytest.param("qwen3_moe_mixed", layout(tp_size=2, etp_size=2), id="moe-etp2"),
        pytest.param("deepseek_v3", layout(tp_size=2, ep_size=2), id="deepseek-tp2_ep2"),
        pytest.param("qwen2_moe", layout(tp_size=2), id="shared_experts-tp2"),
        pytest.param("qwen3_next_moe", layout(tp_size=2), id="delta_net-tp2"),
        pytest.param("gpt_oss_moe", layout(tp_size=2, etp_size=2), id="gpt_oss-etp2"),
        pytest.param("phi3", layout(tp_size=2), id="fused-tp2"),
        pytest.param("gpt2", layout(tp_size=2), id="gpt2-tp2"),
    ],
)
def test_merged_weights_are_those_of_the_projections(name, sizes, tmp_path):
    folder = make_checkpoint(tmp_path / "base", name)
    everything = ("all-linear", "all-embedding", *(() if name == "gpt2" else ("lm_head",)))
    table, lora = plan_of(folder, target_modules=everything)
    values = random_factors(table, lora)
    merged = run_ranks(sizes, merge, folder, lora, values, tmp_path / "out")[0]
    expected = merged_by_hand(folder, lora, values)
    original = original_weights(folder)
    assert merged.keys() == expected.keys()
    for key, weight in merged.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6, msg=key)
        kinds = ("norm", "ln_", "mlp.gate.", "router.", "conv1d", "wpe")
        is_matrix = weight.dim() > 1 and not any(kind in key for kind in kinds)
        assert torch.equal(weight, original[key]) != is_matrix, key
