"""Which model, in which precision, through which kernels.

The one thing to know: nothing here describes the architecture. Layers, heads and experts come from
the `config.json` of the checkpoint; `megatron_extra_kwargs` is the only way to overrule it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtrain.config.fields import flag

__all__ = ["ModelConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The checkpoint to start from and how its layers are computed."""

    model: str | None = flag(
        None, "Hugging Face checkpoint: a local folder, or an id such as Qwen/Qwen3-30B-A3B."
    )
    model_type: str | None = flag(
        None, "Model family; read from config.json, so only needed to overrule it."
    )
    model_revision: str | None = flag(None, "Branch, tag or commit of a model taken from a hub.")
    use_hf: bool = flag(False, "Take ids of models and datasets from Hugging Face, not ModelScope.")
    hub_token: str | None = flag(None, "Token for private models and datasets.")
    check_model: bool = flag(True, "Check the files of the model; they always are.")
    mcore_model: str | None = flag(None, "Start from a torch_dist checkpoint instead of --model.")
    task_type: str | None = flag(
        None,
        "What the model is trained to do.",
        choices=("causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker"),
    )
    language_model_only: bool = flag(False, "Train the text part of a multimodal checkpoint alone.")

    torch_dtype: str | None = flag(
        None,
        "Precision of weights and activations; default: that of the checkpoint.",
        choices=("float32", "bfloat16", "float16"),
    )
    bf16: bool | None = flag(None, "Same as --torch_dtype bfloat16.")
    fp16: bool | None = flag(None, "Same as --torch_dtype float16.")
    attention_softmax_in_fp32: bool = flag(True, "Compute the softmax of attention in float32.")
    apply_query_key_layer_scaling: bool | None = flag(
        None, "Scale attention scores by 1 / layer number (float16 training of very old models)."
    )
    fp8_format: str | None = flag(None, "Train with 8-bit floats.", choices=("e4m3", "hybrid"))
    fp8_recipe: str = flag(
        "delayed", "8-bit scaling.", choices=("tensorwise", "delayed", "mxfp8", "blockwise")
    )
    fp8_param_gather: bool = flag(False, "Gather parameters in 8 bits.")
    fp4_format: str | None = flag(None, "Train with 4-bit floats.", choices=("e2m1",))

    transformer_impl: str = flag(
        "auto",
        "Attention: te (Transformer Engine), torch (no extra package), auto (te when usable).",
        choices=("auto", "te", "torch"),
    )
    attention_backend: str = flag(
        "auto",
        "Attention kernel; auto takes the fastest that is installed.",
        choices=("auto", "flash", "fused", "unfused", "local"),
    )
    masked_softmax_fusion: bool = flag(True, "Fused softmax of unfused attention, where it exists.")
    bias_dropout_fusion: bool = flag(True, "Fuse bias, dropout and residual.")
    bias_activation_fusion: bool = flag(True, "Fuse bias and activation of the MLP.")
    apply_rope_fusion: bool = flag(
        True, "Split, norm and rotate queries and keys in one kernel, on GPUs."
    )
    gradient_accumulation_fusion: bool = flag(
        True, "Accumulate weight gradients inside the matrix product, where the kernel exists."
    )
    cuda_graph_impl: str = flag(
        "auto",
        "Start the kernels of all layers with one call: local (recorded by this process; packs, no "
        "parallelism but of data), none, auto (local where it can be).",
        choices=("auto", "local", "none"),
    )
    cross_entropy_loss_fusion: bool = flag(True, "Fuse the steps of the cross-entropy.")
    cross_entropy_fusion_impl: str = flag(
        "native", "Which fused cross-entropy.", choices=("native", "te")
    )

    rope_scaling: Mapping[str, Any] | None = flag(
        None, "JSON that replaces rope_scaling of config.json."
    )
    mtp_num_layers: int | None = flag(None, "Multi-token prediction layers to train.", minimum=0)
    mtp_loss_scaling_factor: float = flag(0.1, "Weight of the multi-token prediction loss.")
    megatron_extra_kwargs: Mapping[str, Any] | None = flag(
        None, "JSON of Megatron-Core TransformerConfig fields; overrules everything else."
    )
