"""What `megatron export` converts.

The one thing to know: exactly one of `to_hf` and `to_mcore` is asked for. What is converted is a
model, a model with an adapter merged, or an adapter alone; either may come from either format.
"""

from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["ExportOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Direction of the conversion and its proof."""

    to_hf: bool = flag(False, "Write Hugging Face safetensors, or a PEFT adapter.")
    to_mcore: bool = flag(False, "Write a Megatron-Core torch_dist checkpoint.")
    test_convert_precision: bool = flag(
        False,
        "Run both models and compare them layer by layer; exit code 1 when they differ.",
    )
    test_convert_dtype: str = flag(
        "float32", "Precision of that comparison.", choices=("float32", "bfloat16", "float16")
    )
    exist_ok: bool = flag(
        False, "Write into a folder that is not empty, in the place of weights that are there."
    )
