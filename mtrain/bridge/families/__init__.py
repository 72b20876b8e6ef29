"""The model families that the bridge knows. A new one is a file here and a line in `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.llama import LLAMA
from mtrain.bridge.families.mistral import MISTRAL
from mtrain.bridge.families.qwen2 import QWEN2
from mtrain.bridge.families.qwen3 import QWEN3
from mtrain.bridge.families.qwen3_moe import QWEN3_MOE
from mtrain.bridge.family import Family

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE)
    for model_type in family.model_types
}


def find_family(hf_config: Mapping[str, Any]) -> Family:
    """Finds the family of a model by the `model_type` of its config.json.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: 'model_type' is {model_type!r}, which no family supports; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
