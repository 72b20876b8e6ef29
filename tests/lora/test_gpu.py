"""Adapters on a GPU, both backends, in bfloat16, against PEFT in float32; needs a GPU."""

import peft
import pytest
import torch
import torch.nn.functional as F

from mtrain.lora.plan import PEFT_PREFIX, module_name, module_of
from mtrain.parallel import (
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.device import has_transformer_engine
from tests.adapters import attached, peft_model, plan_of, random_factors
from tests.megatron import SINGLE, load_model, on_gpu, packed_inputs
from tests.tiny import MOE, make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NO_TE = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
BACKENDS = ["torch", pytest.param("te", marks=NO_TE)]
LENGTHS = [40, 7, 64, 17]
VOCAB = 131
NAMES = [
    *("qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "qwen2_moe", "qwen3_next_moe"),
    *("gpt_oss_moe", "phi3", "gpt2"),
]


@pytest.fixture(scope="module")
def state():
    yield initialize_parallel(SINGLE, initialize_world())
    destroy_parallel()
    destroy_world()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_leave_the_logits_bit_equal(name, backend, state, tmp_path):
    """T44 on the real kernels."""
    folder = make_checkpoint(tmp_path, name, hidden_size=128, moe_intermediate_size=64)
    _, lora = plan_of(folder)
    options = {"dtype": torch.bfloat16, "backend": backend}
    inputs = on_gpu(packed_inputs(LENGTHS, VOCAB))
    inputs.pop("labels")
    with torch.no_grad():
        (bare,), (adapted,) = (
            load_model(state, folder, **options),
            attached(state, folder, lora, **options),
        )
        assert torch.equal(bare(**inputs), adapted(**inputs))


@pytest.mark.shows("lora", "backend")
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_near_those_of_peft(name, backend, adapter_dtype, state, tmp_path):
    folder = make_checkpoint(tmp_path, name, hidden_size=128, moe_intermediate_size=64)
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    (model,) = attached(
        state,
        folder,
        lora,
        values,
        dtype=torch.bfloat16,
        adapter_dtype=adapter_dtype,
        backend=backend,
    )
    words = {"target_modules": "all-linear", "exclude_modules": ["lm_head"]}
    config = peft.LoraConfig(r=4, lora_alpha=6.0, **words)
    judge, theirs = peft_model(folder, config, values)
    judge.cuda()
    inputs = on_gpu(packed_inputs(LENGTHS, VOCAB))
    losses, _ = model(**inputs)
    losses.sum().backward()
    labels, ids = inputs["labels"], inputs["input_ids"]
    logits = torch.cat([judge(part[None]) for part in ids[0].split(LENGTHS)], dim=1)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
    loss.backward()
    torch.testing.assert_close(losses.sum(), loss, rtol=5e-3, atol=0)
    linear = next(one for one in lora.linears if one.kind == "row")
    parameter, weight = (
        name.replace("{layer}", str(linear.layers[0]))
        for name in (linear.rule.megatron, module_name(linear.rule.hf[0]))
    )
    layer, module = model.get_submodule(module_of(parameter)).adapter, PEFT_PREFIX + weight
    for factor, letter in ((layer.lora_a, "A"), (layer.lora_b, "B")):
        expected = theirs[f"{module}.lora_{letter}.weight"].grad
        likeness = F.cosine_similarity(factor.grad.float().flatten(), expected.flatten(), dim=0)
        # A router in bfloat16 sends a token here and there to another expert.
        assert likeness > (0.98 if name in MOE else 0.995)
