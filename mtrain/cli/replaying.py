"""Whether the layers of a run are recorded and replayed, from flags and model."""

from __future__ import annotations

from collections.abc import Sequence

from mtrain.config import SftConfig
from mtrain.config.checks import why_not_recorded
from mtrain.model.gpt import LanguageModel
from mtrain.model.replay import replay_layers, why_not_replayed
from mtrain.platform.cuda_graphs import graph_recorder
from mtrain.training.data_parallel import DataParallel

__all__ = ["replay", "replays_layers"]


def replays_layers(bare: Sequence[LanguageModel], config: SftConfig) -> bool:
    """Whether training replays the layers, as `--cuda_graph_impl` and the model have it.

    Args:
        bare: Chunks of this rank.
        config: The configuration.

    Raises:
        ValueError: The flag asks for it where it cannot be.
    """
    wanted = config.model.cuda_graph_impl
    if wanted == "none" or why_not_recorded(config):
        return False
    reason = next(filter(None, map(why_not_replayed, bare)), "")
    if reason and wanted == "local":
        raise ValueError(f"--cuda_graph_impl local: {reason}; use auto or none")
    return not reason


def replay(bare: Sequence[LanguageModel], chunks: Sequence[DataParallel]) -> None:
    """Lets training replay the layers.

    Args:
        bare: Chunks of this rank.
        chunks: The same, wrapped.
    """
    record = graph_recorder()
    for model, chunk in zip(bare, chunks, strict=True):
        replay_layers(model, record, chunk)
