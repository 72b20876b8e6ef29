"""What a rank can only check once torch is there, and what only all ranks together can.

The one thing to know: everything else is checked before the ranks are started, by
`mtrain.cli.main`. Each check comes to the same answer on every rank.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.model_source import ModelSource
from mtrain.config import ExportConfig, ModelConfig, ParallelConfig, SftConfig, config_to_dict
from mtrain.parallel import World
from mtrain.platform.device import collective_backend, device_info, has_gpu

if TYPE_CHECKING:
    from mtrain.data.tokenize import PreparedData

# Flags that name places on a node; contents are compared instead.
_PLACES = {
    *("model", "mcore_model", "adapters", "mcore_adapter"),
    *("dataset", "val_dataset", "output_dir", "tensorboard_dir", "resume_from_checkpoint"),
}


def check_collectives(parallel: ParallelConfig) -> None:
    """Refuses a communication library that the device does not talk over."""
    backend = collective_backend()
    if parallel.ddp_backend not in (None, backend):
        raise ValueError(
            f"--ddp_backend {parallel.ddp_backend}: the ranks talk over {backend} on "
            f"{device_info().name}; drop it"
        )


def check_attention(model: ModelConfig, *, backend: str) -> None:
    """Refuses an attention kernel that the backend does not have."""
    if backend == "torch" and model.attention_backend not in ("auto", "flash"):
        raise ValueError(
            f"--attention_backend {model.attention_backend} is a kernel of Transformer Engine, and "
            "the torch backend is used here; use auto"
        )


def check_cuda_graphs(model: ModelConfig) -> None:
    """Refuses to record kernels where there is no GPU."""
    if model.cuda_graph_impl == "local" and not has_gpu():
        raise ValueError("--cuda_graph_impl local: there is no GPU; use auto or none")


def check_same_inputs(
    config: SftConfig | ExportConfig,
    source: ModelSource,
    world: World,
    *,
    adapter: AdapterSource | None = None,
    data: PreparedData | None = None,
    step: int | None = None,
) -> None:
    """Makes sure that all nodes were given the same flags, model, adapter and data (T35).

    They are started one by one, and what differs would be trained on without a word.

    Raises:
        ValueError: On all ranks, naming the first difference.
    """
    flags = config_to_dict(config)
    ours = {f"--{name}": value for name, value in flags.items() if name not in _PLACES}
    ours["config.json of --model"] = source.hf_config
    if adapter is not None and adapter.stored is not None:
        ours["adapter_config.json of --adapters"] = adapter.stored.config
    if step is not None:
        ours["the step of --resume_from_checkpoint"] = step
    if data is not None:
        # The folder is named by the contents of the data and by the versions that tokenised them.
        ours["the prepared data"] = data.train.parent.name
    everyone: list[dict[str, Any]] = [{}] * world.size
    dist.all_gather_object(everyone, ours, group=world.group)
    for rank, theirs in enumerate(everyone):
        for what, value in everyone[0].items():
            if theirs[what] != value:
                raise ValueError(
                    f"{what} differs between the nodes: {value} on rank 0, {theirs[what]} on rank "
                    f"{rank}; start all nodes with the same flags, files and versions"
                )


def gather_counts(counts: Counter[str], world: World) -> Counter[str]:
    """The counts of all ranks together, on every rank."""
    everyone: list[Counter[str]] = [Counter()] * world.size
    dist.all_gather_object(everyone, counts, group=world.group)
    return sum(everyone, Counter())
