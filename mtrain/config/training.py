"""How long, in which batches, and what is recomputed.

The one thing to know: `global_batch_size` counts documents (packed: rows) of one optimizer step
over all ranks; the loss is averaged over all its tokens, whichever micro-batch they are in.
"""

from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["TrainingConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Batches, length of the run, evaluation, recomputation."""

    micro_batch_size: int = flag(1, "Rows in one forward pass of one rank.", minimum=1)
    global_batch_size: int = flag(16, "Rows in one optimizer step of all ranks.", minimum=1)
    num_train_epochs: int | None = flag(None, "Passes over the training data.", minimum=1)
    train_iters: int | None = flag(
        None, "Optimizer steps; wins over --num_train_epochs.", minimum=1
    )
    seed: int = flag(42, "Seed of the order of the data and of dropout.", minimum=0)
    calculate_per_token_loss: bool = flag(
        True, "Average the loss over the tokens of the global batch."
    )
    accumulate_allreduce_grads_in_fp32: bool = flag(
        True, "Accumulate and reduce gradients in float32."
    )

    eval_iters: int = flag(
        -1, "Global batches of an evaluation; -1: all the data, 0: no evaluation.", minimum=-1
    )
    eval_steps: int | None = flag(
        None, "Evaluate after this many steps; default: --save_steps.", minimum=1
    )

    recompute_granularity: str = flag(
        "none",
        "Recompute activations in backward: none, selective (--recompute_modules), full (layers).",
        choices=("none", "selective", "full"),
    )
    recompute_method: str | None = flag(
        None,
        "full only: uniform (default) works by groups of layers, block on the first layers.",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = flag(
        None, "full only: layers in a group (uniform) or recomputed (block); default: 1.", minimum=1
    )
    recompute_modules: tuple[str, ...] = flag(
        ("core_attn",),
        "selective only: the parts of a layer that are recomputed.",
        choices=(
            "core_attn",
            "moe_act",
            "layernorm",
            "mla_up_proj",
            "mlp",
            "moe",
            "shared_experts",
        ),
    )
    vit_gradient_checkpointing: bool | None = flag(None, "Recompute the vision tower.")

    hang_timeout: int = flag(
        0,
        "Seconds without a completed step, evaluation or save after which every rank prints its "
        "stack and the run ends; 0: never.",
        minimum=0,
    )
    manual_gc: bool = flag(True, "Collect garbage at the same step on all ranks.")
    manual_gc_steps: int = flag(100, "Steps between collections; 0: none.", minimum=0)
    manual_gc_eval: bool = flag(True, "Collect around evaluations as well.")
    enable_dft_loss: bool = flag(False, "Weight every token's loss by its probability.")
    enable_channel_loss: bool = flag(False, "Report the loss of every dataset channel.")
