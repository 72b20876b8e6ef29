"""Optimizer and schedule: the settings of the user as Megatron-Core's objects.

The one thing to know: norm weights and biases (everything with one axis) are not decayed, and the
schedule counts optimizer steps. The first step uses the schedule's value at 0, so with warm-up its
learning rate is `lr_warmup_init`, as in Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mtrain.config.optimizer import OptimizerConfig
from mtrain.training.adam import AdamW

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

__all__ = ["build_optimizer", "build_scheduler"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], settings: OptimizerConfig
) -> ChainedOptimizer:
    """The optimizer of the trainable parameters of this rank.

    Main parameters are copied from the chunks here, so weights must be loaded before.

    Args:
        chunks: Wrapped chunks.
        settings: The optimizer section, with `lr` resolved.

    Raises:
        ValueError: A combination that Megatron-Core cannot do.
    """
    if settings.optimizer not in ("adam", "sgd"):
        raise ValueError(f"--optimizer {settings.optimizer} is not supported; use adam or sgd")
    if settings.optimizer == "sgd" and chunks[0].ddp_config.use_distributed_optimizer:
        raise ValueError("--optimizer sgd needs --use_distributed_optimizer false")
    config = chunks[0].config
    if config.fp16 and config.num_moe_experts is not None:
        # Megatron-Core gives experts a loss scale of their own, which drifts from the one that
        # the loss was multiplied with.
        raise ValueError("--torch_dtype float16 does not work with experts; use bfloat16")
    optimizer = get_megatron_optimizer(
        _megatron_config(settings, chunks[0]), list(chunks), use_gloo_process_groups=False
    )
    if settings.optimizer == "adam":
        _use_our_adam(optimizer, settings)
    config.grad_scale_func = optimizer.scale_loss if config.fp16 else None
    return optimizer


class _MainInOptimizer(MegatronOptimizerConfig):
    """Megatron-Core makes no main parameters and copies no gradients: `AdamW` needs neither.

    The setting behind it asks for Transformer Engine's Adam, whose distributed optimizer works
    that way.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = self.use_distributed_optimizer


def _megatron_config(
    settings: OptimizerConfig, chunk: DistributedDataParallel
) -> MegatronOptimizerConfig:
    assert settings.lr is not None, "lr is resolved with the other settings"
    kind = _MainInOptimizer if settings.optimizer == "adam" else MegatronOptimizerConfig
    return kind(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        apply_wd_to_qk_layernorm=settings.apply_wd_to_qk_layernorm,
        clip_grad=settings.clip_grad,
        sgd_momentum=settings.sgd_momentum,
        bf16=chunk.config.bf16,
        fp16=chunk.config.fp16,
        params_dtype=chunk.config.params_dtype,
        use_distributed_optimizer=chunk.ddp_config.use_distributed_optimizer,
        overlap_param_gather=chunk.ddp_config.overlap_param_gather,
    )


def _use_our_adam(optimizer: ChainedOptimizer, settings: OptimizerConfig) -> None:
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.optimizer = AdamW(
                part.optimizer.param_groups,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_eps,
                exp_avg_dtype=_DTYPES[settings.exp_avg_dtype],
                exp_avg_sq_dtype=_DTYPES[settings.exp_avg_sq_dtype],
            )


def build_scheduler(
    optimizer: ChainedOptimizer, settings: OptimizerConfig, *, total_steps: int
) -> OptimizerParamScheduler:
    """Learning rate and weight decay over the run.

    Args:
        optimizer: What the schedule drives.
        settings: The optimizer section, with `lr` resolved.
        total_steps: Optimizer steps of the run, the default length of the decay.

    Raises:
        ValueError: Settings that contradict each other or do not fit the run.
    """
    assert settings.lr is not None, "lr is resolved with the other settings"
    decay_steps = settings.lr_decay_iters or total_steps
    start_decay, end_decay = _weight_decay_range(settings)
    _check_learning_rates(settings)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=_warmup_steps(settings, decay_steps),
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=start_decay,
        end_wd=end_decay,
        wd_incr_steps=total_steps,
        wd_incr_style=settings.weight_decay_incr_style,
        wsd_decay_steps=_wsd_decay_steps(settings, decay_steps),
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def _check_learning_rates(settings: OptimizerConfig) -> None:
    for flag, value in (
        ("--min_lr", settings.min_lr),
        ("--lr_warmup_init", settings.lr_warmup_init),
    ):
        if value > settings.lr:
            raise ValueError(f"{flag} {value} is above --lr {settings.lr}; lower it")


def _warmup_steps(settings: OptimizerConfig, decay_steps: int) -> int:
    steps = settings.lr_warmup_iters
    if settings.lr_warmup_fraction is not None:
        if steps:
            raise ValueError("give --lr_warmup_iters or --lr_warmup_fraction, not both")
        steps = int(settings.lr_warmup_fraction * decay_steps)
    if steps >= decay_steps:
        raise ValueError(
            f"warm-up of {steps} steps does not end within the {decay_steps} steps of the "
            "learning rate decay; shorten it"
        )
    return steps


def _wsd_decay_steps(settings: OptimizerConfig, decay_steps: int) -> int | None:
    if settings.lr_decay_style != "WSD":
        return None
    steps = settings.lr_wsd_decay_iters
    if steps is None or steps > decay_steps:
        raise ValueError(
            f"--lr_decay_style WSD needs --lr_wsd_decay_iters between 1 and {decay_steps}, the "
            f"steps of the decay, not {steps}"
        )
    return steps


def _weight_decay_range(settings: OptimizerConfig) -> tuple[float, float]:
    start = settings.start_weight_decay
    end = settings.end_weight_decay
    start = settings.weight_decay if start is None else start
    end = settings.weight_decay if end is None else end
    if settings.weight_decay_incr_style == "constant" and start != end:
        raise ValueError(
            f"weight decay cannot go from {start} to {end} with --weight_decay_incr_style "
            "constant; use linear or cosine"
        )
    if end < start:
        raise ValueError(
            f"--end_weight_decay {end} is below --start_weight_decay {start}; it can only grow"
        )
    return start, end
