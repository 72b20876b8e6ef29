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


def replays_layers(bare: Sequence[LanguageModel], config: SftConfig, *, world_size: int) -> bool:
    """Whether training replays the layers, as `--cuda_graph_impl` and the model have it.

    Then data parallelism hears of no gradients of the layers and must not wait for them. So
    several ranks do it only if they are told to: to send gradients beside backward may be better.

    Args:
        bare: Chunks of this rank.
        config: The configuration.
        world_size: Ranks of the run.

    Raises:
        ValueError: The flag asks for it where it cannot be.
    """
    wanted = config.model.cuda_graph_impl
    is_unwanted = wanted == "none" or (wanted == "auto" and world_size > 1)
    if is_unwanted or why_not_recorded(config):
        return False
    reason = next(filter(None, map(why_not_replayed, bare)), "")
    if reason and wanted == "local":
        raise ValueError(f"--cuda_graph_impl local: {reason}; use auto or none")
    return not reason


def replay(bare: Sequence[LanguageModel], chunks: Sequence[DataParallel]) -> None:
    """Lets training replay the layers.

    Args:
        bare: Chunks of this rank.
        chunks: The same, wrapped without overlaps.
    """
    record = graph_recorder()
    for model, chunk in zip(bare, chunks, strict=True):
        chunk.leave(replay_layers(model, record))
