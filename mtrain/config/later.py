"""What is parsed but not built yet, refused in one line instead of ignored.

The one thing to know: building a feature means deleting its row (or widening its values) here.
docs/flags.md lists both tables, and tests keep them complete: a flag is read by some code, refused
by `LATER`, or explained by `WITHOUT_EFFECT`.
"""

from dataclasses import dataclass
from typing import Any

from mtrain.config.fields import spell
from mtrain.config.run import ExportConfig, SftConfig, flag_values

__all__ = ["LATER", "WITHOUT_EFFECT", "Refusal", "refuse_later_features"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One flag, the values that work today, and what to say about every other value."""

    flag: str
    accepted: tuple[Any, ...]
    reason: str


_OFF = (None, False)

LATER: tuple[Refusal, ...] = (
    Refusal("lora_bias", ("none",), "biases are not trained with an adapter; use none"),
    Refusal("freeze_llm", (False,), "multimodal models come with a later release; use false"),
    Refusal("freeze_vit", (True,), "multimodal models come with a later release; use true"),
    Refusal("freeze_aligner", (True,), "multimodal models come with a later release; use true"),
    Refusal("vit_lr", (None,), "multimodal models come with a later release; drop it"),
    Refusal("aligner_lr", (None,), "multimodal models come with a later release; drop it"),
    Refusal("vit_gradient_checkpointing", _OFF, "multimodal models come with a later release"),
    Refusal("language_model_only", (False,), "multimodal models come with a later release"),
    Refusal("max_pixels", (None,), "multimodal models come with a later release; drop it"),
    Refusal("task_type", (None, "causal_lm"), "only causal_lm is built"),
    Refusal("fp8_format", (None,), "8-bit training comes with a later release; drop it"),
    Refusal("fp8_param_gather", (False,), "8-bit training comes with a later release; use false"),
    Refusal("fp4_format", (None,), "4-bit training is not built; drop it"),
    Refusal("attention_softmax_in_fp32", (True,), "softmax is always computed in float32"),
    Refusal("apply_query_key_layer_scaling", _OFF, "no supported model uses it; drop it"),
    Refusal("context_parallel_size", (1,), "context parallelism comes with a later release; use 1"),
    Refusal("use_megatron_fsdp", (False,), "sharded parameters are not built; use false"),
    Refusal("tp_comm_overlap", (False,), "this overlap is not built; use false"),
    Refusal(
        "pipeline_model_parallel_layout",
        (None,),
        "not built; use --decoder_first_pipeline_num_layers and --decoder_last_pipeline_num_layers",
    ),
    Refusal(
        "account_for_embedding_in_pipeline_split",
        (False,),
        "not built; use --decoder_first_pipeline_num_layers",
    ),
    Refusal(
        "account_for_loss_in_pipeline_split",
        (False,),
        "not built; use --decoder_last_pipeline_num_layers",
    ),
    Refusal("optimizer", ("adam", "sgd"), "it comes with a later release; use adam or sgd"),
    Refusal("optimizer_cpu_offload", (False,), "optimizer offload comes with a later release"),
    Refusal("main_grads_dtype", ("fp32",), "it comes with a later release; use fp32"),
    Refusal("main_params_dtype", ("fp32",), "it comes with a later release; use fp32"),
    Refusal("exp_avg_dtype", ("fp32", "bf16"), "it comes with a later release; use bf16"),
    Refusal("exp_avg_sq_dtype", ("fp32", "bf16"), "it comes with a later release; use bf16"),
    Refusal("calculate_per_token_loss", (True,), "the loss is always averaged over tokens"),
    Refusal("enable_dft_loss", (False,), "it comes with a later release; use false"),
    Refusal("enable_channel_loss", (False,), "it comes with a later release; use false"),
    Refusal(
        "moe_token_dispatcher_type",
        ("allgather", "alltoall"),
        "flex comes with a later release; use alltoall",
    ),
    Refusal("moe_enable_deepep", (False,), "DeepEP comes with a later release; use false"),
    Refusal("moe_grouped_gemm", (True,), "experts are always computed in one grouped product"),
    Refusal(
        "moe_layer_recompute",
        (False,),
        "use --recompute_granularity selective --recompute_modules moe",
    ),
    Refusal("streaming", (False,), "streaming comes with a later release; use false"),
    Refusal("interleave_prob", ((),), "mixing comes with a later release; use #count"),
    Refusal("cached_dataset", ((),), "it comes with a later release; --dataset is cached anyway"),
    Refusal(
        "cached_val_dataset", ((),), "it comes with a later release; --val_dataset is cached anyway"
    ),
    Refusal("mlp_padding_free", (False,), "use --padding_free true"),
    Refusal("group_by_length", (False,), "it comes with a later release; use --packing true"),
    Refusal("data_sharding", (False,), "rows are always shuffled over all ranks; use false"),
    Refusal("template", (None,), "the tokenizer's own chat template is used; drop it"),
    Refusal("template_backend", ("jinja",), "the tokenizer's own chat template is used; use jinja"),
    Refusal("use_chat_template", (None, True), "training on raw text comes with a later release"),
    Refusal("agent_template", (None,), "tool calls come with a later release; drop it"),
    Refusal("loss_scale", ("default",), "other loss masks come with a later release; use default"),
    Refusal("truncation_strategy", ("delete", "left", "right"), "use delete, left or right"),
    Refusal("padding_side", ("right",), "rows are padded on the right"),
    Refusal("response_prefix", (None,), "it comes with a later release; drop it"),
    Refusal("add_non_thinking_prefix", (True,), "it comes with a later release; use true"),
    Refusal("load_args", (False,), "use --config with the args.json"),
    Refusal("save_safetensors", (True,), "use true, and megatron export --to_mcore true later"),
    Refusal("save_missing_weights", (False,), "checkpoints with surplus weights are refused"),
    Refusal("create_checkpoint_symlink", (False,), "it comes with a later release; use false"),
    Refusal("metric_for_best_model", (None,), "it comes with a later release; drop it"),
    Refusal("greater_is_better", _OFF, "it comes with a later release; drop it"),
    Refusal("perform_initialization", (False,), "weights are always loaded; use false"),
    Refusal("use_cpu_initialization", (False,), "weights are always loaded; use false"),
)

# Accepted with any value, because there is nothing to decide.
WITHOUT_EFFECT: dict[str, str] = {
    "check_model": "the headers of all files are always checked, without asking a hub",
    "masked_softmax_fusion": "the kernels of the backend decide; the numbers are the same",
    "bias_dropout_fusion": "without biases and dropout one addition is left, which is not fused",
    "cross_entropy_loss_fusion": "there is one cross-entropy, and it is fused",
    "cross_entropy_fusion_impl": "there is one cross-entropy, and it is fused",
    "batch_p2p_comm": "follows from --overlap_p2p_comm",
    "packing_num_proc": "planning takes well under a second in one process",
    "dataloader_pin_memory": "batches are small enough to be copied as they are",
    "dataloader_persistent_workers": "the threads live for the whole run",
    "fp8_recipe": "only matters with --fp8_format",
    "optimizer_offload_fraction": "only matters with --optimizer_cpu_offload true",
}


def refuse_later_features(config: SftConfig | ExportConfig) -> None:
    """Refuses values that ask for something that is not built yet.

    Raises:
        ValueError: Naming the flag, its value and what to do.
    """
    values = flag_values(config)
    for row in LATER:
        if row.flag in values and values[row.flag] not in row.accepted:
            raise ValueError(f"--{row.flag} {spell(values[row.flag])}: {row.reason}")
