import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from mtrain.config.optimizer import OptimizerConfig
from mtrain.config.parallel import ParallelConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.wrap import wrap_chunks
from tests.megatron import load_model
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, rows

ONE = ParallelLayout()
STEPS = 10


def schedule(**settings) -> list[float]:
    """Learning rates of the ten steps of a run."""
    optimizer = SimpleNamespace(param_groups=[{"max_lr": 1.0, "min_lr": settings.get("min_lr", 0)}])
    scheduler = build_scheduler(optimizer, OptimizerConfig(lr=1.0, **settings), total_steps=STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return rates


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"lr_decay_style": "constant"}, lambda step: 1.0),
        ({"lr_decay_style": "linear"}, lambda step: 1 - step / 10),
        ({}, lambda step: cosine(step / 10)),
        ({"min_lr": 0.2}, lambda step: 0.2 + 0.8 * cosine(step / 10)),
        ({"lr_decay_iters": 5}, lambda step: cosine(min(step, 5) / 5)),
        (
            {"lr_warmup_iters": 4},
            lambda step: step / 4 if step <= 4 else cosine((step - 4) / 6),
        ),
        (
            {"lr_warmup_fraction": 0.2, "lr_warmup_init": 0.5},
            lambda step: 0.5 + step / 4 if step <= 2 else cosine((step - 2) / 8),
        ),
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 4},
            lambda step: step / 4 if step <= 4 else math.sqrt(4 / step),
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "linear"},
            lambda step: 1.0 if step <= 6 else 1 - (step - 6) / 4,
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4},
            lambda step: 1.0 if step <= 6 else 2 * 0.5 ** ((step - 6) / 4) - 1,
        ),
    ],
)
def test_the_learning_rate_follows_its_formula(settings, rate):
    assert schedule(**settings) == pytest.approx([rate(step) for step in range(STEPS)])


def test_weight_decay_can_grow():
    optimizer = SimpleNamespace(param_groups=[{}, {"wd_mult": 0.0}])
    settings = OptimizerConfig(
        lr=1.0, start_weight_decay=0.1, end_weight_decay=0.3, weight_decay_incr_style="linear"
    )
    scheduler = build_scheduler(optimizer, settings, total_steps=STEPS)
    for step in range(STEPS):
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1 + 0.2 * step / STEPS)
        assert optimizer.param_groups[1]["weight_decay"] == 0.0
        scheduler.step(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_lr": 2.0}, "--min_lr 2.0 is above --lr 1.0"),
        ({"lr_warmup_init": 2.0}, "--lr_warmup_init 2.0 is above --lr 1.0"),
        ({"lr_warmup_iters": 10}, "warm-up of 10 steps does not end within the 10 steps"),
        ({"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}, "not both"),
        ({"lr_decay_style": "WSD"}, "needs --lr_wsd_decay_iters between 1 and 10"),
        ({"end_weight_decay": 0.5}, "with --weight_decay_incr_style constant"),
        (
            {"end_weight_decay": 0.01, "weight_decay_incr_style": "linear"},
            "it can only grow",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        schedule(**settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("optimizer") / "qwen3", "qwen3")


ADAMW = OptimizerConfig(
    lr=1e-2, lr_warmup_iters=1, lr_warmup_init=5e-3, weight_decay=0.3, clip_grad=0.5, adam_eps=1e-4
)


def train_both(state: ParallelState, folder: Path, settings: OptimizerConfig) -> dict[str, tuple]:
    """Three steps by mtrain and by plain torch; weights of both by name."""
    parallel = ParallelConfig(use_distributed_optimizer=settings.optimizer == "adam")
    rig = make_rig(state, folder, optimizer=settings, parallel=parallel, total_steps=STEPS)
    [model] = load_model(state, folder)
    named = dict(model.named_parameters())
    groups = [
        {"params": [weight for weight in named.values() if weight.dim() > 1]},
        {"params": [weight for weight in named.values() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adam":
        plain = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), eps=settings.adam_eps, weight_decay=settings.weight_decay
        )
    else:
        plain = torch.optim.SGD(groups, lr=1, momentum=0.9, weight_decay=settings.weight_decay)
    batch = rows(documents(3))
    for step, rate in enumerate(schedule_of(settings)[:3]):
        result = rig.step([batch], step)
        logits = model(batch.input_ids, batch.position_ids)
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        plain.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(named.values(), settings.clip_grad)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        assert result.learning_rate == pytest.approx(rate)
        assert result.grad_norm == pytest.approx(grad_norm.item(), rel=1e-5)
        assert result.grad_norm > settings.clip_grad
    ours = rig.weights()
    return {name: (ours[name], weight.detach()) for name, weight in named.items()}


def schedule_of(settings: OptimizerConfig) -> list[float]:
    return [5e-3, 1e-2, 1e-2 * cosine(1 / 9)] if settings.optimizer == "adam" else [1e-2] * 3


@pytest.mark.parametrize(
    "settings",
    [
        ADAMW,
        OptimizerConfig(
            optimizer="sgd",
            lr=1e-2,
            lr_decay_style="constant",
            weight_decay=0.3,
            clip_grad=0.5,
        ),
    ],
    ids=["adam", "sgd"],
)
def test_the_update_is_that_of_torch(folder, settings):
    """Decoupled decay of matrices only, clipping, schedule: torch's AdamW on the same gradients."""
    [weights] = run_ranks(ONE, train_both, folder, settings)
    for name, (ours, theirs) in weights.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6, msg=name)


def refused(state: ParallelState, folder: Path, dtype: torch.dtype, rule: str) -> str:
    chunks = load_model(state, folder, dtype=dtype)
    chunks[0].config.num_moe_experts = 4
    wrapped = wrap_chunks(chunks, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
    with pytest.raises(ValueError) as caught:
        build_optimizer(wrapped, OptimizerConfig(optimizer=rule, lr=1.0))
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "rule", "message"),
    [
        (torch.float16, "adam", "--torch_dtype float16 does not work with experts; use bfloat16"),
        (torch.float32, "sgd", "--optimizer sgd needs --use_distributed_optimizer false"),
        (torch.float32, "muon", "--optimizer muon is not supported; use adam or sgd"),
    ],
)
def test_what_megatron_core_cannot_do_is_refused(folder, dtype, rule, message):
    assert run_ranks(ONE, refused, folder, dtype, rule) == [message]
