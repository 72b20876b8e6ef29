"""From a Hugging Face config to the model chunks of this rank.

The one thing to know: weights are allocated, not initialised. The bridge fills every one of them,
or refuses the checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from mtrain.bridge.family import MegatronConfig
from mtrain.config import ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from mtrain.model.activation import activation_function
from mtrain.model.backends import block_spec, next_tokens_spec, spec_provider
from mtrain.model.gpt import LanguageModel
from mtrain.model.linear import ColumnLinear, RowLinear
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.platform.device import has_gpu, has_transformer_engine


def transformer_config(
    described: MegatronConfig,
    layout: ParallelLayout,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    moe: MoEConfig,
    dtype: torch.dtype,
) -> TransformerConfig:
    """Megatron-Core's description of the model and of how to run it.

    Args:
        described: The architecture, from the family of the checkpoint.
        layout: Parallel sizes.
        model: Fusions, attention kernel, `megatron_extra_kwargs`.
        parallel: Communication settings.
        training: Recomputation.
        moe: Routing settings; they only count for models with experts.
        dtype: Of weights and activations.

    Raises:
        ValueError: Megatron-Core refuses the combination.
    """
    fields = described.transformer | {"activation_func": activation_function(described.activation)}
    fields |= _precision(dtype)
    fields |= _parallelism(layout, parallel)
    fields |= _kernels(described, model)
    fields["mtp_loss_scaling_factor"] = model.mtp_loss_scaling_factor
    fields |= _recomputation(training)
    if fields.get("num_moe_experts"):
        fields |= _routing(moe, layout, fields)
    fields |= model.megatron_extra_kwargs or {}
    if fields["hidden_dropout"] or fields["attention_dropout"]:
        raise ValueError("--megatron_extra_kwargs: dropout is not built; leave it out")
    _check_recomputation(fields, training)
    is_latent = fields.get("multi_latent_attention")
    # Megatron-Core refuses experts with biases here; `GroupedExperts` splits them.
    etp_size = fields.pop("expert_tensor_parallel_size")
    try:
        config = (MLATransformerConfig if is_latent else TransformerConfig)(
            **fields, expert_tensor_parallel_size=1
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"Megatron-Core refuses this configuration: {error}") from error
    config.expert_tensor_parallel_size = etp_size
    return config


def _check_recomputation(fields: dict[str, Any], training: TrainingConfig) -> None:
    """Refuses parts that cannot be recomputed.

    Raises:
        ValueError: Naming the flag.
    """
    if fields["recompute_granularity"] != "selective":
        return
    if "mla_up_proj" in training.recompute_modules and fields.get("multi_latent_attention"):
        raise ValueError("--recompute_modules mla_up_proj is not built; use core_attn")
    if "mlp" in training.recompute_modules and fields["add_bias_linear"]:
        # Megatron-Core 0.16.1 does not come to an end over the bias that a dense MLP returns.
        raise ValueError(
            "--recompute_modules mlp: this model has biases in its MLP; "
            "use --recompute_granularity full"
        )


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # Whatever config.json says: no backend builds dropout.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        # The training step divides by the labelled tokens of the global batch itself.
        "calculate_per_token_loss": False,
    }


def _parallelism(layout: ParallelLayout, parallel: ParallelConfig) -> dict[str, Any]:
    # Two stages with virtual ones send to each other both ways at once; batched, Megatron-Core
    # would mix the two messages up.
    overlap_p2p = layout.vpp_size is not None and (parallel.overlap_p2p_comm or layout.pp_size == 2)
    return {
        "tensor_model_parallel_size": layout.tp_size,
        "pipeline_model_parallel_size": layout.pp_size,
        "virtual_pipeline_model_parallel_size": layout.vpp_size,
        "context_parallel_size": layout.cp_size,
        "expert_model_parallel_size": layout.ep_size,
        "expert_tensor_parallel_size": layout.etp_size,
        "num_layers_in_first_pipeline_stage": layout.num_layers_in_first_stage,
        "num_layers_in_last_pipeline_stage": layout.num_layers_in_last_stage,
        "microbatch_group_size_per_vp_stage": parallel.microbatch_group_size_per_vp_stage,
        "sequence_parallel": bool(parallel.sequence_parallel),
        "overlap_p2p_comm": overlap_p2p,
        "batch_p2p_comm": not overlap_p2p,
        # gloo may still be reading what was sent; CUDA frees it in the order of the stream.
        "deallocate_pipeline_outputs": layout.pp_size > 1 and has_gpu(),
    }


def _kernels(described: MegatronConfig, model: ModelConfig) -> dict[str, Any]:
    rope = described.gpt.rope
    return {
        "attention_backend": AttnBackend[model.attention_backend],
        # The only activation that every MLP of Megatron-Core fuses.
        "bias_activation_fusion": model.bias_activation_fusion and described.activation == "silu",
        # Latent attention of ours has its own argument; Megatron-Core's refuses it.
        "rotary_interleaved": rope is not None
        and rope.is_interleaved
        and not described.transformer.get("multi_latent_attention"),
        # Without biases and dropout one addition is left, which costs less to launch unfused.
        "bias_dropout_fusion": False,
        # `RotarySelfAttention` has a kernel of its own.
        "apply_rope_fusion": False,
        "cuda_graph_scope": [],
        # For training alone: see `fuse_weight_gradients`.
        "gradient_accumulation_fusion": False,
    }


def _recomputation(training: TrainingConfig) -> dict[str, Any]:
    granularity = training.recompute_granularity
    if granularity == "none":
        return {"recompute_granularity": None}
    if granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(training.recompute_modules),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": training.recompute_method or "uniform",
        "recompute_num_layers": training.recompute_num_layers or 1,
    }


def _routing(
    moe: MoEConfig, layout: ParallelLayout, described: Mapping[str, Any]
) -> dict[str, Any]:
    balancing = list(moe.moe_router_load_balancing_type) or ["aux_loss"]
    if len(balancing) != len(moe.moe_aux_loss_coeff):
        raise ValueError(
            f"--moe_aux_loss_coeff has {len(moe.moe_aux_loss_coeff)} values for "
            f"{len(balancing)} balance losses ({', '.join(balancing)}); give one for each"
        )
    # Data-parallel ranks each hold a summand of a global loss, but their gradients are averaged.
    coefficients = [
        coefficient * (layout.dp_size if kind == "global_aux_loss" else 1)
        for kind, coefficient in zip(balancing, moe.moe_aux_loss_coeff, strict=True)
    ]
    return {
        "moe_router_load_balancing_type": balancing[0] if len(balancing) == 1 else balancing,
        "moe_aux_loss_coeff": coefficients[0] if len(balancing) == 1 else coefficients,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_router_dtype": None if moe.moe_router_dtype == "none" else moe.moe_router_dtype,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        # The kernel writes as many rows as the router chose, whatever the capacity.
        "moe_permute_fusion": moe.moe_permute_fusion
        and has_transformer_engine()
        and not moe.moe_pad_expert_input_to_capacity,
        "moe_grouped_gemm": True,
        "moe_router_bias_update_rate": moe.moe_router_bias_update_rate,
        # A second stream of the GPU: elsewhere there is nothing to overlap.
        "moe_shared_expert_overlap": moe.moe_shared_expert_overlap
        and has_gpu()
        and described.get("moe_shared_expert_intermediate_size") is not None,
        "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": moe.moe_token_drop_policy,
    }


def build_model(
    described: MegatronConfig,
    config: TransformerConfig,
    state: ParallelState,
    *,
    backend: str,
    fuses_rope: bool = True,
) -> list[LanguageModel]:
    """The model chunks of this rank: one, or one for each virtual pipeline stage.

    Args:
        described: The architecture, from the family of the checkpoint.
        config: From `transformer_config`.
        state: This rank in the layout.
        backend: "te" or "torch".
        fuses_rope: Whether attention may rotate in a kernel of ours.

    Returns:
        Chunks on the device with uninitialised weights.
    """
    provider = spec_provider(backend, has_sinks=config.softmax_type == "learnable")
    layout, pp_rank = state.layout, state.coordinates.pp_rank
    layers = {"layers": described.layers, "fuses_rope": fuses_rope}
    chunks = []
    for chunk in range(layout.num_chunks):
        vp_stage = None if layout.vpp_size is None else chunk
        is_first = pp_rank == 0 and is_vp_first_stage(chunk, layout.vpp_size)
        is_last = state.is_last_stage and is_vp_last_stage(chunk, layout.vpp_size)
        next_tokens = None
        if is_last and config.mtp_num_layers:
            next_tokens = next_tokens_spec(config, provider, **layers)
        model = LanguageModel(
            arguments=described.gpt,
            packed_format=provider.packed_format,
            device=state.device,
            config=config,
            transformer_layer_spec=block_spec(config, provider, vp_stage=vp_stage, **layers),
            mtp_block_spec=next_tokens,
            vocab_size=_padded(described.gpt.vocab_size, layout.tp_size),
            pre_process=is_first,
            post_process=is_last,
            vp_stage=vp_stage,
        )
        _complete_placement(model, state.device)
        _mark_split_parameters(model)
        chunks.append(model)
    return chunks


def _complete_placement(model: LanguageModel, device: torch.device) -> None:
    """Moves what Megatron-Core makes on the CPU, and learned positions also to the model's dtype.

    It leaves both to whoever wraps the model.
    """
    model.to(device)
    if model.pre_process and model.embedding.add_position_embedding:
        model.embedding.position_embeddings.to(model.config.params_dtype)


def _mark_split_parameters(model: LanguageModel) -> None:
    """Says which parameters tensor-parallel ranks hold parts of, for the gradient norm.

    Megatron-Core's own linears and embedding mark theirs while they initialise them. Here weights
    are not initialised, and without the mark the norm would leave out all ranks but the first.
    """
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            split = [(module.weight, 1)]
        elif isinstance(module, ColumnParallelLinear):
            split = [(module.weight, 0), (module.bias, 0)]
        elif isinstance(module, VocabParallelEmbedding):
            split = [(module.weight, 0)]
        else:
            continue
        for parameter, axis in split:
            if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(
                    parameter, is_parallel=True, dim=axis, stride=1
                )


def _padded(vocab_size: int, tp_size: int) -> int:
    """The vocabulary with the fewest words added that make its parts equal."""
    return -(-vocab_size // tp_size) * tp_size


def fuse_weight_gradients(chunks: list[LanguageModel]) -> None:
    """Lets linears add weight gradients to the main gradient themselves.

    Saves writing and reading every weight gradient once more. Call it for chunks that will be
    wrapped for data-parallel training, which allocates the main gradients. Weights whose first
    gradient of a step need not be added to zeros get the mark `can_overwrite_main_grad`: those that
    only linears of ours read, without Megatron-Core's functions for several ranks.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.gradient_accumulation_fusion = True
            if isinstance(module, ColumnLinear | RowLinear) and module.tp_group.size() == 1:
                module.weight.can_overwrite_main_grad = True
