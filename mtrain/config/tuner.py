"""Which parameters are trained: all, some, or a LoRA adapter.

The one thing to know: names in `freeze_parameters` and `trainable_parameters` are prefixes, the
`_regex` forms are searched anywhere in the name, and trainable wins over frozen. From
`target_modules` on, settings matter with LoRA alone; of a loaded adapter its own config counts.
"""

from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["TunerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerConfig:
    """Full or adapter training, and what stays frozen."""

    tuner_type: str = flag(
        "full", "Train all weights, or a LoRA adapter.", choices=("full", "lora", "lora_llm")
    )
    freeze_parameters: tuple[str, ...] = flag((), "Prefixes of parameter names to freeze.")
    freeze_parameters_regex: str | None = flag(
        None, "Freeze parameters whose name matches this regular expression."
    )
    freeze_parameters_ratio: float = flag(
        0.0, "Freeze this share of the parameters, from the first layer on.", minimum=0, maximum=1
    )
    trainable_parameters: tuple[str, ...] = flag(
        (), "Prefixes of parameter names to train although they were frozen."
    )
    trainable_parameters_regex: str | None = flag(
        None, "Train parameters whose name matches this regular expression."
    )
    freeze_llm: bool = flag(False, "Freeze the language model of a multimodal checkpoint.")
    freeze_vit: bool = flag(True, "Freeze the vision tower of a multimodal checkpoint.")
    freeze_aligner: bool = flag(True, "Freeze the projector of a multimodal checkpoint.")
    vit_lr: float | None = flag(None, "Learning rate of the vision tower.", minimum=0)
    aligner_lr: float | None = flag(None, "Learning rate of the projector.", minimum=0)

    adapters: tuple[str, ...] = flag(
        (), "Folder of a PEFT adapter: sft goes on with it (lora), export merges or rewrites it."
    )
    mcore_adapter: str | None = flag(None, "Adapter in torch_dist format to start from.")
    target_modules: tuple[str, ...] = flag(
        ("all-linear",),
        "What gets an adapter: names of linears (q_proj, linear_qkv, ...), all-linear, all-router, "
        "all-embedding.",
    )
    target_regex: str | None = flag(
        None, "What gets an adapter, as a regular expression; instead of --target_modules."
    )
    modules_to_save: tuple[str, ...] = flag((), "Modules trained and saved next to the adapter.")
    lora_rank: int = flag(8, "Rank of the adapter.", minimum=1)
    lora_alpha: float = flag(32.0, "The adapter is scaled by alpha / rank.")
    lora_dropout: float = flag(0.05, "Dropout on the adapter's input.", minimum=0, maximum=1)
    lora_bias: str = flag("none", "Biases trained with the adapter.", choices=("none", "all"))
    lora_dtype: str | None = flag(
        None,
        "Precision of the adapter; default: that of training (export: of the file).",
        choices=("float16", "bfloat16", "float32"),
    )
    use_rslora: bool = flag(False, "Scale by alpha / sqrt(rank) instead.")
    merge_lora: bool | None = flag(
        None, "Save the merged weights instead of the adapter; default: false (export: true)."
    )
    lora_export_layout: str = flag(
        "per_expert",
        "Experts in a saved adapter: a linear each, or the fused parameters of transformers 5.",
        choices=("per_expert", "fused"),
    )
