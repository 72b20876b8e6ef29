"""Whether the layers of a run are recorded and replayed, from flags and model."""

from __future__ import annotations

from collections.abc import Sequence

from mtrain.config import SftConfig
from mtrain.config.checks import why_not_recorded
from mtrain.model.gpt import LanguageModel
from mtrain.model.replay import replay_layers, why_not_replayed
from mtrain.platform.cuda_graphs import graph_recorder
from mtrain.training.data_parallel import DataParallel

__all__ = ["replay_where_possible"]


def replay_where_possible(
    bare: Sequence[LanguageModel],
    chunks: Sequence[DataParallel],
    config: SftConfig,
    *,
    world_size: int,
) -> None:
    """Lets training replay the layers, where `--cuda_graph_impl` allows it.

    Args:
        bare: Chunks of this rank.
        chunks: The same, wrapped.
        config: The configuration.
        world_size: Ranks of the run.

    Raises:
        ValueError: The flag asks for it where it cannot be.
    """
    wanted = config.model.cuda_graph_impl
    if wanted == "none" or why_not_recorded(config, world_size=world_size):
        return
    reasons = [why_not_replayed(model, num_ranks=world_size) for model in bare]
    if reason := next(filter(None, reasons), ""):
        if wanted == "local":
            raise ValueError(f"--cuda_graph_impl local: {reason}; use auto or none")
        return
    record = graph_recorder()
    for model, chunk in zip(bare, chunks, strict=True):
        chunk.leave(replay_layers(model, record))
