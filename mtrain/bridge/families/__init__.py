"""The model families that the bridge knows. A new one is a file here and a line in `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

from mtrain.bridge.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from mtrain.bridge.families.gemma3 import GEMMA3
from mtrain.bridge.families.glm4 import GLM4, GLM4_MOE
from mtrain.bridge.families.gpt2 import GPT2
from mtrain.bridge.families.gpt_oss import GPT_OSS
from mtrain.bridge.families.llama import LLAMA
from mtrain.bridge.families.mimo import MIMO
from mtrain.bridge.families.mistral import MISTRAL
from mtrain.bridge.families.mixtral import MIXTRAL
from mtrain.bridge.families.phi3 import PHI3
from mtrain.bridge.families.qwen2 import QWEN2
from mtrain.bridge.families.qwen2_moe import QWEN2_MOE
from mtrain.bridge.families.qwen3 import QWEN3
from mtrain.bridge.families.qwen3_moe import QWEN3_MOE
from mtrain.bridge.families.qwen3_next import QWEN3_NEXT
from mtrain.bridge.family import Family

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN2_MOE,
        QWEN3,
        QWEN3_MOE,
        QWEN3_NEXT,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM4,
        GLM4_MOE,
        MIMO,
        GPT_OSS,
        GEMMA3,
        PHI3,
        GPT2,
    )
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
