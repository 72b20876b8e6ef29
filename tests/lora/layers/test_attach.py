"""Attaching adapters: names stay, the base is frozen and costs nothing, the model is unchanged."""

import pytest
import torch

from mtrain.config import OptimizerConfig, ParallelConfig
from mtrain.parallel import ParallelLayout
from mtrain.training.optimizer import build_optimizer
from mtrain.training.wrap import wrap_chunks
from tests.adapters import attached, plan_of, random_factors
from tests.megatron import SINGLE, load_model, packed_inputs
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint

EVERYTHING = ("all-linear", "all-router", "all-embedding", "lm_head")


def names_and_gradients(state, folder, lora):
    bare = load_model(state, folder)
    names = {name for chunk in bare for name, _ in chunk.named_parameters()}
    (chunk,) = attached(state, folder, lora)
    return names, {name: p.requires_grad for name, p in chunk.named_parameters()}


def test_base_parameters_keep_their_names_and_are_frozen(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe_mixed")
    _, lora = plan_of(folder, modules_to_save=("norm",))
    ((names, after),) = run_ranks(SINGLE, names_and_gradients, folder, lora)
    assert names < after.keys()
    added = after.keys() - names
    assert all(name.endswith((".adapter.lora_a", ".adapter.lora_b")) for name in added)
    trained = {name for name, is_trained in after.items() if is_trained}
    assert trained == added | {"decoder.final_layernorm.weight"}


def logits_before_and_after(state, folder, lora, dtype):
    inputs = packed_inputs([9, 23], 131)
    inputs.pop("labels")
    results = []
    for chunks in (
        load_model(state, folder, dtype=dtype),
        attached(state, folder, lora, dtype=dtype),
    ):
        (model,) = chunks
        with torch.no_grad():
            results.append(model(**inputs))
    return torch.equal(*results), results[0].abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe_mixed"])
@pytest.mark.parametrize(
    "sizes", [SINGLE, layout(tp_size=2), layout(tp_size=2, etp_size=2)], ids=["one", "tp2", "etp2"]
)
def test_fresh_adapters_leave_the_logits_bit_equal(name, dtype, sizes, tmp_path):
    """T44: B is zero at the start."""
    folder = make_checkpoint(tmp_path, name)
    _, lora = plan_of(folder, target_modules=EVERYTHING if "moe" in name else EVERYTHING[:1])
    for is_equal, largest in run_ranks(sizes, logits_before_and_after, folder, lora, dtype):
        assert is_equal
        assert largest > 0.1


def allocated(state, folder, lora):
    """Elements with gradients, in gradient buffers and in the optimizer, on this rank."""
    bare = attached(state, folder, lora)
    chunks = wrap_chunks(bare, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
    optimizer = build_optimizer(chunks, OptimizerConfig(lr=1e-3))
    trained = sum(p.numel() for p in bare[0].parameters() if p.requires_grad)
    buffers = chunks[0].buffers + chunks[0].expert_parallel_buffers
    main = [p for part in optimizer.chained_optimizers for p in part.get_parameters()]
    total = sum(p.numel() for p in bare[0].parameters())
    return total, trained, sum(b.grad_data.numel() for b in buffers), sum(p.numel() for p in main)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_frozen_weights_have_no_gradient_buffer_and_no_optimizer_state(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    _, lora = plan_of(folder)
    ((total, trained, in_buffers, in_optimizer),) = run_ranks(SINGLE, allocated, folder, lora)
    assert trained < total / 2
    # Buffers are padded to multiples of what the ranks share.
    assert trained <= in_buffers < trained + 1024
    assert in_optimizer == trained


def gradients_with_dropout(state, folder, lora, values):
    (model,) = attached(state, folder, lora, values, dropout=0.5)
    inputs = packed_inputs([16, 16], 131)
    losses, _ = model(**inputs)
    losses.sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, losses.sum().item()


@pytest.mark.parametrize("sizes", [ParallelLayout(world_size=2, tp_size=2)], ids=["tp2"])
def test_with_dropout_ranks_agree_on_what_they_share(sizes, tmp_path):
    """Replicated factors see the same dropped inputs, or parts of them that are summed later."""
    folder = make_checkpoint(tmp_path, "qwen3")
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    first, second = run_ranks(sizes, gradients_with_dropout, folder, lora, values)
    assert first[1] == second[1], "ranks computed different losses"
    assert all(torch.isfinite(gradient).all() for gradient in first[0].values())
