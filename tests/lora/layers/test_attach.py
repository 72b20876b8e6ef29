"""Attaching adapters: names stay, the base is frozen and costs nothing, the model is unchanged."""

import pytest
import torch

from mtrain.config import MoEConfig, OptimizerConfig, ParallelConfig
from mtrain.parallel import ParallelLayout
from mtrain.training.optimizer import build_optimizer
from mtrain.training.wrap import wrap_chunks
from tests.adapters import attached, plan_of, random_factors
from tests.megatron import SINGLE, load_model, packed_inputs
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import MOE, make_checkpoint

EVERYTHING = ("all-linear", "all-router", "all-embedding", "lm_head")


def names_and_gradients(state, folder, lora):
    bare = load_model(state, folder)
    names = {name for chunk in bare for name, _ in chunk.named_parameters()}
    (chunk,) = attached(state, folder, lora)
    return names, {name: p.requires_grad for name, p in chunk.named_parameters()}


@pytest.mark.parametrize("name", ["qwen3_moe_mixed", "qwen2_moe"])
def test_base_parameters_keep_their_names_and_are_frozen(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    _, lora = plan_of(folder, modules_to_save=("norm",))
    ((names, after),) = run_ranks(SINGLE, names_and_gradients, folder, lora)
    assert names < after.keys()
    added = after.keys() - names
    assert all(name.endswith(("adapter.lora_a", "adapter.lora_b")) for name in added)
    has_gate = "decoder.layers.0.mlp.shared_experts.gate_adapter.lora_b" in added
    assert has_gate == (name == "qwen2_moe")
    trained = {name for name, is_trained in after.items() if is_trained}
    assert trained == added | {"decoder.final_layernorm.weight"}


def test_of_a_router_that_is_saved_the_weight_is_trained_and_the_biases_are_not(tmp_path):
    """They are buffers, which no gradient reaches, and belong to the module all the same."""
    folder = make_checkpoint(tmp_path, "deepseek_v3")
    _, lora = plan_of(folder, target_modules=("o_proj",), modules_to_save=("mlp.gate",))
    ((names, after),) = run_ranks(SINGLE, names_and_gradients, folder, lora)
    trained = {name for name, is_trained in after.items() if is_trained and name in names}
    assert trained == {f"decoder.layers.{layer}.mlp.router.weight" for layer in (1, 2, 3)}


def attach_with(state, folder, lora, options):
    with pytest.raises(ValueError) as caught:
        attached(state, folder, lora, **options)
    return str(caught.value)


def attach_to_all(state, folder, lora, options):
    attached(state, folder, lora, **options)


def test_a_run_that_moves_biases_of_the_base_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "deepseek_v3")
    _, lora = plan_of(folder)
    moe = MoEConfig(moe_router_bias_update_rate=0.001)
    (message,) = run_ranks(SINGLE, attach_with, folder, lora, {"moe": moe})
    assert message == (
        "--moe_router_bias_update_rate 0.001 changes weights of the model, which LoRA leaves "
        "alone; use 0"
    )


@pytest.mark.parametrize(
    "tuner",
    [
        {"target_modules": ("all-embedding",)},
        {"target_modules": ("o_proj",), "modules_to_save": ("embed_tokens",)},
    ],
    ids=["adapter", "saved"],
)
def test_an_embedding_with_a_copy_on_another_stage_is_refused(tuner, tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "m", "deepseek_v3")
    _, lora = plan_of(folder, num_next_tokens=1, **tuner)
    for message in run_ranks(layout(pp_size=2), attach_with, folder, lora, {"num_next_tokens": 1}):
        assert message.startswith("an embedding that LoRA trains must be on one pipeline stage")
    # On one stage there is no copy.
    run_ranks(SINGLE, attach_to_all, folder, lora, {"num_next_tokens": 1})


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


LAYOUTS = {"one": SINGLE, "tp2": layout(tp_size=2), "etp2": layout(tp_size=2, etp_size=2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, sizes) for name in ("qwen2", "qwen3_moe_mixed") for sizes in LAYOUTS),
        *(("deepseek_v3", sizes) for sizes in ("one", "tp2")),
        ("qwen3_next_moe", "tp2"),
        ("qwen2_moe", "one"),
        ("gpt_oss_moe", "etp2"),
        ("phi3", "tp2"),
    ],
)
def test_fresh_adapters_leave_the_logits_bit_equal(name, dtype, sizes, tmp_path):
    """T44: B is zero at the start."""
    folder = make_checkpoint(tmp_path, name)
    _, lora = plan_of(folder, target_modules=EVERYTHING if name in MOE else EVERYTHING[:1])
    arguments = (folder, lora, dtype)
    for is_equal, largest in run_ranks(LAYOUTS[sizes], logits_before_and_after, *arguments):
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
