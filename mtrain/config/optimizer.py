"""The optimizer and its schedules.

The one thing to know: `lr` None is resolved by the kind of training (1e-5 full, 1e-4 LoRA) in
`mtrain.config.run.resolve_sft`, so code after it always sees a number.
"""

from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["OptimizerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Step size over time, regularisation, and the update rule."""

    optimizer: str = flag(
        "adam", "Update rule (adam is AdamW).", choices=("adam", "sgd", "muon", "dist_muon")
    )
    lr: float | None = flag(
        None, "Highest learning rate; default: 1e-5 full, 1e-4 LoRA.", minimum=0
    )
    min_lr: float = flag(0.0, "Learning rate at the end of the decay.", minimum=0)
    lr_decay_style: str = flag(
        "cosine",
        "Shape of the decay.",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = flag(
        None, "Steps until --min_lr is reached; default: the whole run.", minimum=1
    )
    lr_warmup_iters: int = flag(0, "Steps of linear warm-up.", minimum=0)
    lr_warmup_fraction: float | None = flag(
        None, "Share of the decay steps used for warm-up.", minimum=0, maximum=1
    )
    lr_warmup_init: float = flag(0.0, "Learning rate at the first step of warm-up.", minimum=0)
    lr_wsd_decay_style: str = flag(
        "exponential",
        "Shape of the last phase of WSD.",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = flag(None, "Steps of the last phase of WSD.", minimum=1)

    weight_decay: float = flag(0.1, "Decoupled weight decay.", minimum=0)
    weight_decay_incr_style: str = flag(
        "constant", "How weight decay changes.", choices=("constant", "linear", "cosine")
    )
    start_weight_decay: float | None = flag(None, "Weight decay at the first step.", minimum=0)
    end_weight_decay: float | None = flag(None, "Weight decay at the last step.", minimum=0)
    apply_wd_to_qk_layernorm: bool = flag(False, "Decay the norms of queries and keys too.")
    clip_grad: float = flag(1.0, "Largest gradient norm; 0: no clipping.", minimum=0)
    adam_beta1: float = flag(0.9, "Decay of Adam's first moment.", minimum=0, maximum=1)
    adam_beta2: float = flag(0.95, "Decay of Adam's second moment.", minimum=0, maximum=1)
    adam_eps: float = flag(1e-8, "Added to Adam's denominator.", minimum=0)
    sgd_momentum: float = flag(0.9, "Momentum of SGD.", minimum=0, maximum=1)

    optimizer_cpu_offload: bool = flag(False, "Keep the optimizer state in host memory.")
    optimizer_offload_fraction: float = flag(
        1.0, "Share of the optimizer state in host memory.", minimum=0, maximum=1
    )
    use_precision_aware_optimizer: bool = flag(
        False, "Choose the precision of the optimizer state below."
    )
    main_grads_dtype: str = flag("fp32", "Precision of gradients.", choices=("fp32", "bf16"))
    main_params_dtype: str = flag("fp32", "Precision of main parameters.", choices=("fp32", "fp16"))
    exp_avg_dtype: str = flag(
        "fp32", "Precision of Adam's first moment.", choices=("fp32", "fp16", "bf16", "fp8")
    )
    exp_avg_sq_dtype: str = flag(
        "fp32", "Precision of Adam's second moment.", choices=("fp32", "fp16", "bf16", "fp8")
    )
