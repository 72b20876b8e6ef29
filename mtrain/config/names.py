"""Flag names that mtrain does not have, and what to type instead.

The one thing to know: these are looked up only after a flag was not found, so a name may move from
here to a dataclass field without touching anything else.
"""

__all__ = ["ABSENT", "ARCHITECTURE", "RENAMED", "advice_for"]

# Megatron-SWIFT v3, then Hugging Face / swift names that people type out of habit.
RENAMED = {
    "load": "--mcore_model",
    "adapter_load": "--mcore_adapter",
    "save": "--output_dir",
    "save_interval": "--save_steps",
    "eval_interval": "--eval_steps",
    "log_interval": "--logging_steps",
    "max_epochs": "--num_train_epochs",
    "train_type": "--tuner_type",
    "num_workers": "--dataloader_num_workers",
    "no_masked_softmax_fusion": "--masked_softmax_fusion false",
    "no_bias_dropout_fusion": "--bias_dropout_fusion false",
    "no_bias_swiglu_fusion": "--bias_activation_fusion false",
    "no_rope_fusion": "--apply_rope_fusion false",
    "no_gradient_accumulation_fusion": "--gradient_accumulation_fusion false",
    "no_data_sharding": "--data_sharding false",
    "no_initialization": "--perform_initialization false",
    "manual_gc_interval": "--manual_gc_steps",
    "distributed_backend": "--ddp_backend",
    "distributed_timeout_minutes": "--ddp_timeout (in seconds)",
    "num_layers_per_virtual_pipeline_stage": "--virtual_pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "--virtual_pipeline_model_parallel_size",
    "microbatch_group_size_per_virtual_pipeline_stage": "--microbatch_group_size_per_vp_stage",
    "seq_length": "--max_length",
    "strict": "--skip_bad_lines (strict true is --skip_bad_lines false)",
    "attn_impl": "--attention_backend",
    "learning_rate": "--lr",
    "max_steps": "--train_iters",
    "per_device_train_batch_size": "--micro_batch_size",
    "gradient_accumulation_steps": "--global_batch_size (over all ranks)",
    "gradient_checkpointing": "--recompute_granularity",
    "warmup_ratio": "--lr_warmup_fraction",
    "warmup_steps": "--lr_warmup_iters",
    "lr_scheduler_type": "--lr_decay_style",
    "max_grad_norm": "--clip_grad",
    "adam_epsilon": "--adam_eps",
    "sequence_parallel_size": "--sequence_parallel or --context_parallel_size",
    "tp_size": "--tensor_model_parallel_size",
    "pp_size": "--pipeline_model_parallel_size",
    "ep_size": "--expert_model_parallel_size",
    "cp_size": "--context_parallel_size",
}

_NOT_NEEDED = "it is not needed here; drop it"
_LATER = "it comes with a later release; drop it"

# Known elsewhere, without a counterpart here; the reason follows "is not a flag of mtrain: ".
ABSENT = {
    "load_safetensors": "--model reads safetensors, --mcore_model torch_dist; drop it",
    "bridge_backend": "there is one bridge; drop it",
    "tuner_backend": "there is one LoRA; drop it",
    "use_swift_lora": "there is one LoRA; drop it",
    "external_plugins": "code of users is not run from the command line",
    "custom_register_path": "code of users is not run from the command line",
    "callbacks": "code of users is not run from the command line",
    "deepspeed": "parallelism is set by --tensor_model_parallel_size and its siblings",
    "device_map": "ranks pick their device; set CUDA_VISIBLE_DEVICES to choose GPUs",
    "local_rank": "it is set by the launcher; drop it",
    "local-rank": "it is set by the launcher; drop it",
    "trust_remote_code": "code of a checkpoint is never run; drop it",
    "lazy_tokenize": "data is prepared before the ranks start and cached; drop it",
    "ckpt_format": "checkpoints are Hugging Face folders; drop it",
    "log_throughput": "throughput is always logged; drop it",
    "ref_load": _LATER,
    "ref_adapter_load": _LATER,
    "ref_model": _LATER,
    "ref_adapters": _LATER,
    "num_labels": _LATER,
    "problem_type": _LATER,
    "new_special_tokens": _LATER,
    "max_model_len": "use --max_length",
    "vit_attn_impl": _LATER,
    "vit_gradient_checkpointing_kwargs": _LATER,
    "gradient_checkpointing_kwargs": "use --recompute_method and --recompute_num_layers",
    "cp_comm_type": _LATER,
    "cp_partition_mode": _LATER,
    "strict_fsdp_dtensor_load": _LATER,
    "data_parallel_sharding_strategy": _LATER,
    "optimizer_cuda_graph": _LATER,
    "overlap_param_gather_with_optimizer_step": _LATER,
    "fp8_amax_history_len": _LATER,
    "fp8_amax_compute_algo": _LATER,
    "fp4_recipe": _LATER,
    "fp4_param_gather": _LATER,
    "mtp_decoder_input_detach": _LATER,
    "mtp_shared_weights": _LATER,
    "shuffle_buffer_size": _LATER,
    "stopping_strategy": _LATER,
    "norm_bbox": _LATER,
    "preserve_thinking": _LATER,
    "is_binary_loss_scale": _LATER,
    **dict.fromkeys(
        (
            "muon_momentum",
            "muon_split_qkv",
            "muon_use_nesterov",
            "muon_scale_mode",
            "muon_fp32_matmul_prec",
            "muon_coefficient_type",
            "muon_num_ns_steps",
            "muon_tp_mode",
            "muon_extra_scale_factor",
            "muon_scalar_optimizer",
            "muon_lr",
            "muon_min_lr",
        ),
        _LATER,
    ),
    **dict.fromkeys(
        (
            "log_params_norm",
            "log_timers_to_tensorboard",
            "log_memory_to_tensorboard",
            "log_validation_ppl_to_tensorboard",
            "tensorboard_log_interval",
            "wandb_save_dir",
            "logging_level",
            "auto_detect_ckpt_format",
            "exit_on_missing_checkpoint",
            "ckpt_fully_parallel_load",
            "save_retain_interval",
            "dataloader_type",
            "skip_megatron_init",
            "ignore_args_error",
            "nccl_comm_warmup",
            "align_grad_reduce",
            "te_rng_tracker",
            "data_parallel_random_init",
            "dataloader_multiprocessing_context",
            "remove_unused_columns",
            "use_persistent_ckpt_worker",
            "dist_ckpt_save_pre_mcore_014",
            "dist_ckpt_optim_fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient",
            "disable_ignore_empty_think",
        ),
        _NOT_NEEDED,
    ),
}

# What config.json decides.
ARCHITECTURE = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "group_query_attention",
        "num_query_groups",
        "kv_channels",
        "max_position_embeddings",
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "rotary_interleaved",
        "normalization",
        "norm_epsilon",
        "swiglu",
        "untie_embeddings_and_output_weights",
        "disable_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "attention_dropout",
        "hidden_dropout",
        "padded_vocab_size",
        "num_experts",
        "moe_layer_freq",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_router_topk",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_router_enable_expert_bias",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "multi_latent_attention",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    }
)


def advice_for(name: str) -> str | None:
    """What to do about a flag that does not exist, or None when the name is unknown here too."""
    if name in RENAMED:
        return f"--{name} is now {RENAMED[name]}"
    if name in ABSENT:
        return f"--{name} is not a flag of mtrain: {ABSENT[name]}"
    if name in ARCHITECTURE:
        return (
            f"--{name} is read from the model's config.json; "
            "to overrule it use --megatron_extra_kwargs '{...}'"
        )
    return None
