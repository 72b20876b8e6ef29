"""What a rank does before it has a model: it meets the others and knows its precision.

The one thing to know: everything here runs after the checks and the preparation, on every rank, and
needs no Megatron-Core, so that a conversion starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mtrain.cli.launch import Placement, let_gpu_memory_grow
from mtrain.cli.model_source import dtype_name
from mtrain.config import ExportConfig, ModelConfig, SftConfig
from mtrain.parallel import World, initialize_world


def join(config: SftConfig | ExportConfig, here: Placement, *, uses_gpu: bool = True) -> World:
    """Meets the other ranks.

    Args:
        config: The configuration.
        here: This rank.
        uses_gpu: Whether there will be a model; without one the ranks only share files.
    """
    let_gpu_memory_grow()
    return initialize_world(
        size=here.world_size,
        rank=here.rank,
        local_rank=here.local_rank,
        uses_gpu=uses_gpu,
        timeout_seconds=config.parallel.ddp_timeout,
    )


def training_dtype(
    model: ModelConfig, hf_config: Mapping[str, Any], *, wanted: str | None = None
) -> torch.dtype:
    """What weights are computed in.

    Args:
        model: The settings, which may ask for a precision.
        hf_config: config.json, whose precision is the default.
        wanted: What is asked for otherwise, such as the adapter's own precision.

    Raises:
        ValueError: The checkpoint's is none that can be computed in.
    """
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return dtypes[wanted or dtype_name(model, hf_config)]
