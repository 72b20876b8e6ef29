"""LoRA trains what PEFT trains: losses, gradients and values, step by step and in every layout.

The judge is PEFT on the Hugging Face model, from the same A and B, one document at a time. Experts,
which transformers 5 keeps in one parameter, get one linear each there, as in the checkpoint.
"""

from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

from mtrain.bridge.plan import weight_table
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.config import MoEConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from mtrain.lora.merge import merged_lookup
from mtrain.lora.plan import Adapter, adapter_table
from mtrain.lora.weights import adapter_lookup
from mtrain.parallel import ParallelLayout
from mtrain.training.freeze import keep_graph_connected
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.step import train_step
from mtrain.training.wrap import gather_parameters, wrap_chunks
from tests.adapters import (
    attached,
    gathered,
    load_all,
    peft_model,
    plan_of,
    random_factors,
)
from tests.megatron import read_config
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.test_invariance import PACKED, batches_of_rank, layout, loss_of
from tests.tiny import make_checkpoint, without_spare_layers

STEPS, SAVED_STEPS = 2, 5
TWO_PACKS = PACKED[:2]
# Adam divides by the root of the second moment; with the usual epsilon of 1e-8 a gradient of 1e-9
# moves its value by a whole learning rate, in a direction that rounding decides.
EPSILON = 1e-5
OPTIMIZER = OptimizerConfig(
    lr=1e-3, lr_decay_style="constant", clip_grad=0.0, weight_decay=0.1, adam_eps=EPSILON
)
# Without the distributed optimizer every rank has whole gradients to look at.
WHOLE_GRADIENTS = ParallelConfig(use_distributed_optimizer=False)


def train(
    state, folder, lora, values, output, training=None, parallel=WHOLE_GRADIENTS, num_next_tokens=0
):
    """Losses, gradient norms, gradients of the first step, and factors after all steps."""
    table = weight_table(read_config(folder), num_next_tokens)
    factors = adapter_table(table, lora)
    options = {"training": training, "num_next_tokens": num_next_tokens}
    no_balance = MoEConfig(moe_aux_loss_coeff=(0.0,))
    bare = attached(state, folder, lora, values, moe=no_balance, **options)
    keep_graph_connected(bare)
    before = {name: t.clone() for name, t in bare[0].named_parameters() if not t.requires_grad}
    chunks = wrap_chunks(bare, parallel=parallel, grad_reduce_in_fp32=True)
    optimizer = build_optimizer(chunks, OPTIMIZER)
    scheduler = build_scheduler(optimizer, OPTIMIZER, total_steps=STEPS)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batches = batches_of_rank(state, TWO_PACKS, step)
        result = train_step(chunks, optimizer, scheduler, batches, state=state, step=step)
        losses.append(loss_of(result, state))
        norms.append(result.grad_norm)
        if step == 0 and parallel is WHOLE_GRADIENTS:
            main = [
                {n: t.main_grad for n, t in chunk.named_parameters() if t.requires_grad}
                for chunk in bare
            ]
            gradients = gathered(state, lookup_in(main), output / "gradients", factors)
    assert all(torch.equal(bare[0].get_parameter(name), before[name]) for name in before)
    gather_parameters(chunks)
    values = gathered(state, adapter_lookup(bare, dtype=torch.float32), output / "values", factors)
    return losses, norms, gradients, values


def train_with_peft(folder, config, values):
    """The same training by PEFT and torch's AdamW."""
    model, trained = peft_model(folder, config, values)
    # Megatron-Core does not decay what has one axis.
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=EPSILON)
    losses, norms, first = [], [], {}
    state = _OneRank()
    for step in range(STEPS):
        total, num_labels = 0.0, 0
        optimizer.zero_grad()
        batches = batches_of_rank(state, TWO_PACKS, step)
        num_labels = sum(int((batch.labels != -100).sum()) for batch in batches)
        for batch in batches:
            lengths = batch.cu_seqlens.diff().tolist()
            for ids, labels in zip(
                batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True
            ):
                logits = model(ids[None])[0]
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                (loss / num_labels).backward()
                total += loss.item()
        losses.append(total / num_labels)
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm().item())
        first = first or {name: gradient.clone() for name, gradient in gradients.items()}
        optimizer.step()
    return losses, norms, first, {name: p.detach().clone() for name, p in trained.items()}


class _OneRank:
    layout = ParallelLayout()
    coordinates = ParallelLayout().coordinates(0)


def uneven(lora):
    """The same targets with another rank and alpha for the first projection of every linear."""
    other = Adapter(rank=3, alpha=2.0)
    return replace(
        lora,
        linears=tuple(
            replace(linear, adapters=(other, *linear.adapters[1:])) for linear in lora.linears
        ),
    )


# Those that come first in a linear of ours.
FIRST_PROJECTIONS = (
    *("q_proj", "gate_proj", "o_proj", "down_proj"),
    *("in_proj_qkvz", "out_proj", "shared_expert_gate"),
)
# What is adapted: flags of ours, and the same in PEFT's words.
ADAPTERS = {
    "all": ({}, {}),
    "some_projections": (
        {"target_modules": ("q_proj", "v_proj", "up_proj")},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    ),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "uneven": (
        {},
        {
            "rank_pattern": dict.fromkeys(FIRST_PROJECTIONS, 3),
            "alpha_pattern": dict.fromkeys(FIRST_PROJECTIONS, 2.0),
        },
    ),
    "embedding_and_head": (
        {"target_modules": ("q_proj", "all-embedding", "lm_head")},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "router": (
        {"target_modules": ("all-router", "o_proj")},
        {
            "target_modules": ["o_proj"],
            "target_parameters": ["mlp.gate.weight", "mlp.router.weight"],
        },
    ),
    # A pipeline stage with nothing to train, and a model with experts only.
    "first_layer": (
        {"target_modules": ("layers.0.self_attn.q_proj",)},
        {"target_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "experts": (
        {"target_modules": ("experts.linear_fc1",)},
        {"target_modules": r".*\.experts\.\d+\.(gate|up)_proj"},
    ),
    "saved_gates": (
        {"target_modules": ("o_proj",), "modules_to_save": ("shared_expert_gate", "mlp.gate")},
        {"target_modules": ["o_proj"], "modules_to_save": ["shared_expert_gate", "mlp.gate"]},
    ),
    "saved_modules": (
        {"modules_to_save": ("lm_head", "input_layernorm")},
        {"modules_to_save": ["lm_head", "input_layernorm"]},
    ),
}


# Its norm behind linear attention enlarges outputs near zero. With an epsilon of 1e-6 PEFT itself
# gets gradients that differ by 1e-4 from start values that differ by 1e-7.
CHANGES = {"qwen3_next_moe": {"rms_norm_eps": 1e-3}}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(folder, adapters, start values, PEFT's training) of a family, adapters and a layout."""
    made = {}

    def get(name, choice, sizes):
        layers = without_spare_layers(name, pp_size=LAYOUTS[sizes].pp_size)
        key = name, choice, len(layers)
        if key not in made:
            changes = CHANGES.get(name, {}) | layers
            folder = make_checkpoint(tmp_path_factory.mktemp(name), name, **changes)
            flags, words = ADAPTERS[choice]
            table, lora = plan_of(folder, **flags)
            lora = uneven(lora) if choice == "uneven" else lora
            values = random_factors(table, lora)
            config = peft.LoraConfig(
                **{"r": 4, "lora_alpha": 6.0, "target_modules": "all-linear"} | words,
                # PEFT knows which one it is where it knows the class of the model.
                exclude_modules=None if "target_modules" in words else ["lm_head"],
            )
            made[key] = folder, lora, values, train_with_peft(folder, config, values)
        return made[key]

    return get


def assert_same(ours, expected):
    losses, norms, gradients, values = ours
    expected_losses, expected_norms, expected_gradients, expected_values = expected
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for mine, theirs in ((gradients, expected_gradients), (values, expected_values)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5, msg=name)


LAYOUTS = {
    "one": ParallelLayout(),
    "tp2": layout(tp_size=2),
    "tp4_more_ranks_than_groups": layout(tp_size=4),
    "pp2": layout(pp_size=2),
    "pp2_vpp2": layout(pp_size=2, vpp_size=2),
    "tp2_pp2": layout(tp_size=2, pp_size=2),
    "dp2": layout(world_size=2),
    "ep2": layout(ep_size=2),
    "etp2": layout(tp_size=2, etp_size=2),
    "tp2_ep2": layout(tp_size=2, ep_size=2),
    "tp2_etp2_ep2": layout(tp_size=2, etp_size=2, ep_size=2),
    "pp2_ep2": layout(pp_size=2, ep_size=2),
}
FAMILIES = (
    "deepseek_v3",
    "deepseek_v3_groups",
    "deepseek_v2",
    "qwen2_moe",
    "mixtral",
    "glm4",
    "glm4_moe",
    "gemma3",
    "phi3",
    "gpt_oss_moe",
    "gpt2",
    "qwen3_next_moe",
)
CASES = [
    *((name, "all", "one") for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe_mixed")),
    ("qwen2", "all", "tp2"),
    ("qwen3", "all", "tp4_more_ranks_than_groups"),
    ("qwen3", "all", "pp2_vpp2"),
    ("llama", "all", "tp2_pp2"),
    *(("qwen3_moe_mixed", "all", sizes) for sizes in ("dp2", "ep2", "etp2", "tp2_ep2")),
    *(("qwen3_moe_mixed", "all", sizes) for sizes in ("tp2_etp2_ep2", "pp2_ep2")),
    ("qwen3", "some_projections", "tp4_more_ranks_than_groups"),
    ("qwen3_moe_mixed", "some_projections", "tp2_ep2"),
    ("qwen2", "rslora", "one"),
    ("qwen3", "uneven", "tp2"),
    ("qwen3_moe_mixed", "uneven", "etp2"),
    ("qwen3", "embedding_and_head", "one"),
    ("qwen3", "embedding_and_head", "tp2_pp2"),
    ("qwen3_moe_mixed", "router", "one"),
    ("qwen3_moe_mixed", "router", "tp2_ep2"),
    ("qwen3", "saved_modules", "tp2_pp2"),
    ("qwen3", "first_layer", "pp2"),
    ("qwen3_moe_mixed", "experts", "tp2_ep2"),
    *((name, "all", "one") for name in FAMILIES),
    *(("deepseek_v3", "all", sizes) for sizes in ("tp2_ep2", "tp2_pp2")),
    ("deepseek_v3_groups", "all", "etp2"),
    ("deepseek_v3_groups", "router", "one"),
    *(("qwen2_moe", "all", sizes) for sizes in ("tp2", "pp2_ep2")),
    ("qwen2_moe", "saved_gates", "tp2"),
    ("mixtral", "all", "ep2"),
    ("mixtral", "router", "one"),
    ("glm4", "all", "tp2"),
    ("glm4_moe", "all", "tp2_ep2"),
    ("gemma3", "all", "tp2_pp2"),
    ("phi3", "all", "tp2"),
    *(("qwen3_next_moe", "all", sizes) for sizes in ("tp2", "pp2_ep2")),
    ("qwen3_next_moe", "uneven", "tp2"),
    *(("gpt_oss_moe", "all", sizes) for sizes in ("tp2_etp2_ep2", "pp2_ep2")),
    ("gpt_oss_moe", "router", "tp2_ep2"),
    ("gpt2", "all", "tp2_pp2"),
]


@pytest.mark.shows("lora")
@pytest.mark.parametrize(
    ("name", "choice", "sizes"), [pytest.param(*case, id="-".join(case)) for case in CASES]
)
def test_training_is_that_of_peft(name, choice, sizes, judged, tmp_path):
    """T40 for LoRA: every layout repeats PEFT's losses, gradients and values."""
    folder, lora, values, expected = judged(name, choice, sizes)
    results = run_ranks(LAYOUTS[sizes], train, folder, lora, values, tmp_path)
    assert all(result[:2] == results[0][:2] for result in results), "ranks disagree"
    assert_same(results[0], expected)


@pytest.mark.parametrize(
    ("name", "sizes", "recompute"),
    [
        ("qwen3", "pp2", TrainingConfig(recompute_granularity="full")),
        ("qwen3_moe_mixed", "tp2_ep2", TrainingConfig(recompute_granularity="full")),
        (
            "qwen3_moe_mixed",
            "etp2",
            TrainingConfig(
                recompute_granularity="selective", recompute_modules=("core_attn", "moe")
            ),
        ),
        (
            "qwen2_moe",
            "tp2",
            TrainingConfig(
                recompute_granularity="selective", recompute_modules=("shared_experts",)
            ),
        ),
        ("deepseek_v3", "tp2_ep2", TrainingConfig(recompute_granularity="full")),
    ],
)
def test_recomputing_changes_nothing(name, sizes, recompute, judged, tmp_path):
    folder, lora, values, expected = judged(name, "all", sizes)
    results = run_ranks(LAYOUTS[sizes], train, folder, lora, values, tmp_path, recompute)
    assert_same(results[0], expected)


@pytest.mark.shows("lora")
@pytest.mark.parametrize(
    ("name", "sizes"), [("deepseek_v3", "tp2_ep2"), ("deepseek_v3", "pp2"), ("mimo", "tp2_pp2")]
)
def test_layers_of_multi_token_prediction_train_alike_in_every_layout(name, sizes, tmp_path):
    """On one rank against `tests.lora.test_next_tokens`; PEFT does not know these layers."""
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", name)
    table, lora = plan_of(folder, num_next_tokens=1)
    values = random_factors(table, lora)
    expected, ours = (
        run_ranks(
            *(one, train, folder, lora, values, tmp_path / str(one.world_size)),
            *(None, WHOLE_GRADIENTS, 1),
        )
        for one in (ParallelLayout(), LAYOUTS[sizes])
    )
    assert_same(ours[0], expected[0])


@pytest.mark.parametrize(
    ("name", "choice", "sizes"),
    [
        ("qwen3_moe_mixed", "all", "tp2_ep2"),
        ("qwen3", "first_layer", "pp2"),
        ("qwen2", "all", "dp2"),
        ("qwen2_moe", "saved_gates", "tp2"),
    ],
)
def test_the_distributed_optimizer_changes_nothing(name, choice, sizes, judged, tmp_path):
    folder, lora, values, expected = judged(name, choice, sizes)
    parallel = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    arguments = (folder, lora, values, tmp_path, None, parallel)
    losses, norms, _, trained = run_ranks(LAYOUTS[sizes], train, *arguments)[0]
    assert_same((losses, norms, expected[2], trained), expected)


def train_and_save(state, folder, lora, values, output):
    """Saves the adapter and the merged model after every step, and the base weights at the end."""
    table = weight_table(read_config(folder))
    bare = attached(state, folder, lora, values)
    chunks = wrap_chunks(bare, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
    optimizer = build_optimizer(chunks, OPTIMIZER)
    scheduler = build_scheduler(optimizer, OPTIMIZER, total_steps=SAVED_STEPS)
    for step in range(SAVED_STEPS):
        batches = batches_of_rank(state, TWO_PACKS, step)
        train_step(chunks, optimizer, scheduler, batches, state=state, step=step)
        lookup = adapter_lookup(bare, dtype=torch.float32)
        gathered(state, lookup, output / f"adapter{step}", adapter_table(table, lora))
        gathered(state, merged_lookup(bare), output / f"merged{step}", table)
    return gathered(state, lookup_in(tensors_by_name(bare)), output / "base", table)


def test_base_weights_are_those_on_disk_after_training_with_ten_saves(judged, tmp_path):
    folder, lora, values, _ = judged("qwen3_moe_mixed", "all", "tp2_ep2")
    arguments = (folder, lora, values, tmp_path)
    after = run_ranks(LAYOUTS["tp2_ep2"], train_and_save, *arguments)[0]
    on_disk = load_file(folder / "model.safetensors")
    assert after.keys() == on_disk.keys()
    assert all(torch.equal(after[name], on_disk[name]) for name in on_disk)
    first, last = (load_all(tmp_path / f"merged{step}") for step in (0, SAVED_STEPS - 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], last[name]), "nothing was trained"
