"""How tokens reach their experts.

The one thing to know: None and the defaults leave the router as the checkpoint was trained; only
the balance losses, capacity and communication are decided here.
"""

from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["MoEConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Routing, balance losses and token exchange of mixture-of-experts layers."""

    moe_router_load_balancing_type: tuple[str, ...] = flag(
        (),
        "Balance losses; default: aux_loss.",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    )
    moe_aux_loss_coeff: tuple[float, ...] = flag(
        (0.0,), "Weight of each balance loss; 0: none.", minimum=0
    )
    moe_z_loss_coeff: float | None = flag(None, "Weight of the router's z-loss.", minimum=0)
    moe_router_dtype: str = flag("fp32", "Precision of routing.", choices=("none", "fp32", "fp64"))
    moe_token_dispatcher_type: str = flag(
        "alltoall", "How tokens travel.", choices=("allgather", "alltoall", "flex")
    )
    moe_enable_deepep: bool = flag(False, "Exchange tokens with DeepEP.")
    moe_grouped_gemm: bool = flag(True, "Compute all local experts in one grouped product.")
    moe_permute_fusion: bool = flag(True, "Fused token permutation, where the kernel exists.")
    moe_shared_expert_overlap: bool = flag(
        False, "Overlap shared experts with the token exchange, in models that have them."
    )
    moe_router_bias_update_rate: float = flag(
        0.0,
        "How far a step moves the biases that choose experts towards balance, in models that have "
        "them; 0 keeps those of the checkpoint.",
        minimum=0,
    )
    moe_layer_recompute: bool = flag(False, "Old spelling of --recompute_modules moe.")
    moe_expert_capacity_factor: float | None = flag(
        None, "Tokens an expert takes, relative to an even share; default: all of them.", minimum=0
    )
    moe_pad_expert_input_to_capacity: bool = flag(
        False, "Pad every expert's input to its capacity."
    )
    moe_token_drop_policy: str = flag(
        "probs", "Which tokens are dropped over capacity.", choices=("probs", "position")
    )
