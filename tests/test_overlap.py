"""Communication that overlaps with computation changes no bit of training.

The judge is the same run with both overlaps off, on the same ranks. Between the steps the model is
evaluated, and its weights are read, as runs do it.

Tiny models fit into one bucket, which hides who reads parameters without waiting for them. So each
run is repeated with a bucket for every parameter, gathered when its own module is called and no
sooner. As buckets also decide which rank updates what, and in which order the gradient norm is
added up, the run without overlaps has the same ones then.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from mtrain.config import MoEConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from mtrain.model.build import fuse_weight_gradients
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.evaluate import evaluate
from mtrain.training.freeze import keep_graph_connected
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.step import train_step
from mtrain.training.wrap import gather_parameters, unwrap, wrap_chunks
from tests.adapters import attached, plan_of, random_factors
from tests.megatron import load_model
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.test_invariance import PACKED, batches_of_rank, layout
from tests.tiny import make_checkpoint, without_spare_layers

STEPS = 3
OPTIMIZER = OptimizerConfig(lr=1e-2, lr_decay_style="constant", clip_grad=0.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what is done with it."""

    model: str
    sizes: ParallelLayout
    dtype: torch.dtype = torch.float32
    uses_lora: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    num_next_tokens: int = 0


TWO = layout(world_size=2)
RECOMPUTED = TrainingConfig(recompute_granularity="full")
BFLOAT16 = {"dtype": torch.bfloat16}
CASES = {
    "dp2, tied": Case(model="qwen3_tied", sizes=TWO),
    "dp2, tied, bf16": Case(model="qwen3_tied", sizes=TWO, **BFLOAT16),
    "dp2, fp16": Case(model="qwen3", sizes=TWO, dtype=torch.float16),
    "dp2, whole optimizer": Case(
        model="qwen3", sizes=TWO, parallel=ParallelConfig(use_distributed_optimizer=False)
    ),
    "dp2, learned positions": Case(model="gpt2", sizes=TWO, training=RECOMPUTED),
    "dp2, norms behind sublayers": Case(model="gemma3", sizes=TWO),
    "dp2 tp2, tied": Case(model="qwen3_tied", sizes=layout(world_size=4, tp_size=2), **BFLOAT16),
    "dp2 pp2, tied": Case(model="qwen3_tied", sizes=layout(world_size=4, pp_size=2)),
    "dp2 pp2 vpp2, tied": Case(
        model="qwen3_tied", sizes=layout(world_size=4, pp_size=2, vpp_size=2)
    ),
    "dp2 pp2, next tokens": Case(
        model="deepseek_v3", sizes=layout(world_size=4, pp_size=2), num_next_tokens=1
    ),
    "dp2, shared gates": Case(model="qwen2_moe", sizes=TWO, training=RECOMPUTED),
    "dp2, delta net": Case(model="qwen3_next_moe", sizes=TWO, **BFLOAT16),
    "dp2, sinks and biases": Case(model="gpt_oss_moe", sizes=TWO),
    "dp2 ep2": Case(model="qwen3_moe_mixed", sizes=layout(ep_size=2), **BFLOAT16),
    "dp4 ep2": Case(model="qwen3_moe", sizes=layout(world_size=4, ep_size=2)),
    # Experts alone have data-parallel ranks.
    "tp2": Case(model="qwen3_moe", sizes=layout(tp_size=2)),
    "dp2, lora": Case(model="qwen3", sizes=TWO, uses_lora=True, **BFLOAT16),
    "dp2, lora, experts": Case(model="deepseek_v3", sizes=TWO, uses_lora=True),
    "dp2 ep2, lora": Case(model="qwen2_moe", sizes=layout(ep_size=2), uses_lora=True),
}


def build(state: ParallelState, folder: Path, case: Case, moe: MoEConfig):
    """Bare chunks, as a run has them before they are wrapped."""
    options = {"moe": moe, "dtype": case.dtype, "training": case.training}
    if not case.uses_lora:
        options["num_next_tokens"] = case.num_next_tokens
        chunks = load_model(state, folder, **options)
        fuse_weight_gradients(chunks)
        return chunks
    table, lora = plan_of(folder)
    values = random_factors(table, lora)
    chunks = attached(state, folder, lora, values, adapter_dtype=torch.float32, **options)
    keep_graph_connected(chunks)
    return chunks


def wrapped(bare, parallel: ParallelConfig, *, splits: bool):
    """Wrapped chunks; with a bucket for every parameter, nothing is gathered ahead of its use."""
    buckets = functools.partial(DistributedDataParallelConfig, bucket_size=1 if splits else None)
    with mock.patch("mtrain.training.wrap.DistributedDataParallelConfig", buckets):
        chunks = wrap_chunks(bare, parallel=parallel, grad_reduce_in_fp32=True)
    if splits:
        chunks[0].ddp_config.align_param_gather = True
        chunks[0].config.param_sync_func = None
    return chunks


def stop_overlapping(chunks) -> None:
    """Leaves the buckets as they are."""
    ddp_config, config = chunks[0].ddp_config, chunks[0].config
    for module in (module for chunk in chunks for module in chunk.modules()):
        module._forward_pre_hooks.clear()
    ddp_config.overlap_param_gather = ddp_config.overlap_grad_reduce = False
    config.no_sync_func = config.grad_sync_func = None


def groups_of(chunks):
    return [g for c in chunks for g in c.bucket_groups + c.expert_parallel_bucket_groups]


def train(state: ParallelState, chunks) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Everything that a run shows, and its weights in the middle and at the end."""
    optimizer = build_optimizer(chunks, OPTIMIZER)
    scheduler = build_scheduler(optimizer, OPTIMIZER, total_steps=STEPS)
    for part in optimizer.chained_optimizers:
        if part.config.fp16:
            # The scale that it starts with is too high for many steps.
            part.grad_scaler._scale.fill_(2.0**10)
    numbers, weights = [], {}
    for step in range(STEPS):
        batches = batches_of_rank(state, PACKED, step)
        result = train_step(chunks, optimizer, scheduler, batches, state=state, step=step)
        numbers += [*result.sums.tolist(), result.grad_norm]
        if step == 0:
            evaluated = evaluate(chunks, [batches], state=state)
            numbers += [evaluated.loss, evaluated.token_accuracy]
            if chunks[0].ddp_config.overlap_param_gather:
                groups = groups_of(chunks)
                assert all(group.param_gather_dispatched for group in groups), "nobody waited"
                assert all(group.param_gather_handle is None for group in groups)
        else:
            gather_parameters(chunks)
            for index, chunk in enumerate(chunks):
                for name, weight in unwrap(chunk).named_parameters():
                    if weight.requires_grad:
                        weights[f"{step}.{index}.{name}"] = weight.detach().clone()
    return numbers, weights


def differences(ours, judge) -> list[str]:
    """What is not the same bits."""
    (numbers, weights), (expected, expected_weights) = ours, judge
    assert weights.keys() == expected_weights.keys()
    found = [f"number {i}" for i, n in enumerate(numbers) if n != expected[i]]
    return found + [n for n, w in weights.items() if not torch.equal(w, expected_weights[n])]


def compare(state: ParallelState, folder: Path, case: Case, moe: MoEConfig) -> dict[bool, list]:
    """Differences, with buckets as they are and with many, and whether anything was trained."""
    found = {}
    for splits in (False, True):
        parallel = case.parallel
        if not splits:
            parallel = dataclasses.replace(parallel, overlap_grad_reduce=False)
        judge = wrapped(build(state, folder, case, moe), parallel, splits=splits)
        stop_overlapping(judge)
        chunks = wrapped(build(state, folder, case, moe), case.parallel, splits=splits)
        ddp_config = chunks[0].ddp_config
        assert ddp_config.overlap_grad_reduce
        assert ddp_config.overlap_param_gather is case.parallel.use_distributed_optimizer
        assert not splits or state.coordinates.pp_rank or len(groups_of(chunks[:1])) > 5
        ours, expected = train(state, chunks), train(state, judge)
        assert any(
            not torch.equal(weight, ours[1][f"2{name[1:]}"]) for name, weight in ours[1].items()
        ), "nothing was trained"
        found[splits] = differences(ours, expected)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the checkpoint of a case, once for each model."""
    made = {}

    def get(case: Case) -> Path:
        changes = without_spare_layers(case.model, pp_size=case.sizes.pp_size)
        key = case.model, len(changes), case.num_next_tokens
        if key not in made:
            target = tmp_path_factory.mktemp("overlap") / case.model
            made[key] = (
                make_checkpoint_with_next_tokens(target, case.model)[0]
                if case.num_next_tokens
                else make_checkpoint(target, case.model, **changes)
            )
        return made[key]

    return get


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_overlaps_change_no_bit(case, folders):
    moe = MoEConfig(moe_aux_loss_coeff=(0.01,))
    results = run_ranks(case.sizes, compare, folders(case), case, moe)
    assert results == [{False: [], True: []}] * case.sizes.world_size


def compare_without_waiting(state: ParallelState, folder: Path, case: Case) -> list[str]:
    """The same where one module reads parameters that it has not waited for."""
    judge = wrapped(build(state, folder, case, MoEConfig()), case.parallel, splits=True)
    stop_overlapping(judge)
    chunks = wrapped(build(state, folder, case, MoEConfig()), case.parallel, splits=True)
    hasty = unwrap(chunks[0]).decoder.layers[1].mlp.linear_fc1
    chunks[0].remove_forward_pre_hook_handles[hasty].remove()
    with mock.patch(f"{__name__}.groups_of", lambda _chunks: []):
        return differences(train(state, chunks), train(state, judge))


def test_the_comparison_sees_a_module_that_does_not_wait(folders):
    case = CASES["dp2, tied"]
    for found in run_ranks(case.sizes, compare_without_waiting, folders(case), case):
        assert found


def compare_on_streams(state: ParallelState, folder: Path, case: Case) -> dict[bool, list]:
    with mock.patch("mtrain.model.build.has_gpu", lambda: True):
        return compare(state, folder, case, MoEConfig(moe_shared_expert_overlap=True))


def test_gates_of_shared_experts_in_a_second_stream_are_waited_for(folders):
    """Such experts are not called as a module. The stream itself is one for GPUs."""
    case = Case(model="qwen2_moe", sizes=TWO)
    results = run_ranks(TWO, compare_on_streams, folders(case), case)
    assert results == [{False: [], True: []}] * 2


def train_with_idle(state: ParallelState, folder: Path, case: Case, num_used: int) -> str:
    """Two steps of a model with a parameter that is only used in so many of them."""
    bare = build(state, folder, case, MoEConfig())
    norm = bare[0].decoder.final_layernorm
    idle = torch.nn.Parameter(torch.zeros(3))
    norm.register_parameter("idle", idle)
    uses = []
    norm.register_forward_hook(
        lambda _module, _inputs, output: output + idle.sum() * 0 if uses else output
    )
    chunks = wrapped(bare, case.parallel, splits=False)
    optimizer = build_optimizer(chunks, OPTIMIZER)
    scheduler = build_scheduler(optimizer, OPTIMIZER, total_steps=2)
    for step in range(2):
        uses[:] = [True] * (step < num_used)
        batches = batches_of_rank(state, PACKED, step)
        try:
            train_step(chunks, optimizer, scheduler, batches, state=state, step=step)
        except RuntimeError as error:
            return f"step {step}: {error}"
    return "trained"


@pytest.mark.parametrize("num_used", [0, 1])
def test_a_parameter_without_a_gradient_is_named_and_nothing_is_left_unreduced(num_used, folders):
    """A reduction would wait for it; Megatron-Core's own check does not say for what."""
    case = CASES["dp2, tied"]
    for said in run_ranks(TWO, train_with_idle, folders(case), case, num_used):
        assert said == (
            f"step {num_used}: no gradient came for decoder.final_layernorm.idle: freeze what is "
            "not trained, or use --overlap_grad_reduce false"
        )
    parallel = ParallelConfig(overlap_grad_reduce=False)
    off = dataclasses.replace(case, parallel=parallel)
    assert run_ranks(TWO, train_with_idle, folders(off), off, num_used) == ["trained"] * 2
