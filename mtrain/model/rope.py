"""Rotary frequencies of checkpoints that scale them (llama3, linear).

The formulas are transformers' own: Megatron-Core hard-codes three of llama3's four numbers.
"""

from collections.abc import Mapping
from typing import Any

import torch


def rotary_frequencies(hf_config: Mapping[str, Any]) -> torch.Tensor | None:
    """Inverse frequencies for the rotary embedding.

    Args:
        hf_config: config.json, in the spelling of transformers 4 (`rope_scaling`) or 5
            (`rope_parameters`).

    Returns:
        float32 [head_dim / 2], or None where they are the plain powers of the base.

    Raises:
        ValueError: The scaling also rescales attention, which is not built.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = dict(hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return None
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    if attention_factor != 1.0:
        raise ValueError(
            f"rope type {rope_type!r} scales attention by {attention_factor}, which mtrain does "
            "not do yet"
        )
    return frequencies.float()
