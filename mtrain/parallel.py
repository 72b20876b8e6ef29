"""The parallel layout: who holds what, first as arithmetic, then as process groups.

`ParallelLayout` is plain numbers and answers for any rank without torch, so that plans, checks and
memory estimates work offline. `initialize_world` meets the other ranks, without Megatron-Core; that
is all that saving and converting need. `initialize_parallel` makes Megatron-Core's process groups
that agree with a layout and returns one frozen `ParallelState`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Where one rank stands on each parallel axis."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    etp_rank: int
    ep_rank: int
    edp_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel axes.

    Attributes:
        world_size: Number of ranks.
        tp_size: Tensor parallel size.
        pp_size: Pipeline stages.
        vpp_size: Model chunks a pipeline stage holds; None without virtual stages.
        ep_size: Expert parallel size.
        etp_size: Tensor parallel size inside an expert.
        cp_size: Context parallel size.
        num_layers_in_first_stage: Layers of the first pipeline stage; None for an even split.
        num_layers_in_last_stage: The same for the last stage.
    """

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    vpp_size: int | None = None
    ep_size: int = 1
    etp_size: int = 1
    cp_size: int = 1
    num_layers_in_first_stage: int | None = None
    num_layers_in_last_stage: int | None = None

    def __post_init__(self) -> None:
        dense = self.tp_size * self.cp_size * self.pp_size
        expert = self.etp_size * self.ep_size * self.pp_size
        if self.world_size % dense:
            raise ValueError(
                f"{self.world_size} ranks cannot be divided by tensor x context x pipeline "
                f"parallel size {self.tp_size} x {self.cp_size} x {self.pp_size} = {dense}"
            )
        if self.world_size % expert:
            raise ValueError(
                f"{self.world_size} ranks cannot be divided by expert tensor x expert x pipeline "
                f"parallel size {self.etp_size} x {self.ep_size} x {self.pp_size} = {expert}"
            )
        if self.vpp_size is not None and self.pp_size == 1:
            raise ValueError(
                f"virtual pipeline size {self.vpp_size} needs a pipeline parallel size above 1"
            )

    @property
    def dp_size(self) -> int:
        """Data parallel size of the dense parameters."""
        return self.world_size // (self.tp_size * self.cp_size * self.pp_size)

    @property
    def edp_size(self) -> int:
        """Data parallel size of the experts."""
        return self.world_size // (self.etp_size * self.ep_size * self.pp_size)

    @property
    def num_chunks(self) -> int:
        """Model chunks on one rank."""
        return self.vpp_size or 1

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a rank.

        Source: Megatron-Core's rank order "tp-cp-ep-dp-pp", the leftmost axis varying fastest; its
        expert groups use the same order with expert sizes and no context axis.
        """
        tp_rank, rest = rank % self.tp_size, rank // self.tp_size
        cp_rank, rest = rest % self.cp_size, rest // self.cp_size
        dp_rank, pp_rank = rest % self.dp_size, rest // self.dp_size
        etp_rank, rest = rank % self.etp_size, rank // self.etp_size
        ep_rank, rest = rest % self.ep_size, rest // self.ep_size
        return Coordinates(
            tp_rank=tp_rank,
            cp_rank=cp_rank,
            dp_rank=dp_rank,
            pp_rank=pp_rank,
            etp_rank=etp_rank,
            ep_rank=ep_rank,
            edp_rank=rest % self.edp_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All ranks, and which of them this process is.

    Attributes:
        size: Number of ranks.
        rank: Global rank.
        device: What this rank computes on.
        group: The process group of all ranks.
        timeout_seconds: How long a collective may wait for a rank.
    """

    size: int
    rank: int
    device: torch.device
    group: ProcessGroup
    timeout_seconds: int

    @property
    def is_first_rank(self) -> bool:
        """Whether this is global rank 0."""
        return self.rank == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroups:
    """The process groups of this rank inside the world, made by Megatron-Core."""

    tp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    ep: ProcessGroup
    etp: ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelState:
    """This rank in a layout, with its device and process groups.

    Attributes:
        layout: Sizes of the axes.
        world: All ranks.
        coordinates: This rank on each axis.
        groups: Process groups.
    """

    layout: ParallelLayout
    world: World
    coordinates: Coordinates
    groups: ProcessGroups

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.world.rank

    @property
    def device(self) -> torch.device:
        """The device to train on."""
        return self.world.device

    @property
    def is_first_rank(self) -> bool:
        """Whether this is global rank 0."""
        return self.world.is_first_rank

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage, which has the loss."""
        return self.coordinates.pp_rank == self.layout.pp_size - 1


def initialize_world(
    *,
    size: int = 1,
    rank: int = 0,
    local_rank: int = 0,
    uses_gpu: bool = True,
    timeout_seconds: int = 600,
    store_file: Path | None = None,
) -> World:
    """Joins the process group.

    Args:
        size: Number of ranks; as many processes must call this.
        rank: Global rank of this process.
        local_rank: Its rank on this machine, which picks the GPU.
        uses_gpu: Whether the ranks compute on GPUs, where there are some. Those that only share
            files do not, and start faster.
        timeout_seconds: How long a collective may wait for a rank.
        store_file: Rendezvous file; without it MASTER_ADDR and MASTER_PORT of the environment
            are used; a single process needs neither.

    Raises:
        RuntimeError: The ranks did not meet in time.
    """
    import torch.distributed as dist

    from mtrain.platform.cpu import CPU
    from mtrain.platform.device import collective_backend, training_device

    device = training_device(local_rank) if uses_gpu else CPU
    store = None
    if store_file is not None:
        store = dist.FileStore(str(store_file), size)
    elif size == 1:
        store = dist.HashStore()
    try:
        dist.init_process_group(
            collective_backend(device),
            store=store,
            init_method="env://" if store is None else None,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = " ".join(
            f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT")
        )
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{place}: rank {rank} does not meet the others: {reason}") from error
    return World(
        size=size,
        rank=rank,
        device=device,
        group=dist.group.WORLD,
        timeout_seconds=timeout_seconds,
    )


def initialize_parallel(layout: ParallelLayout, world: World, *, seed: int = 42) -> ParallelState:
    """Builds Megatron-Core's process groups for a layout; every rank must call this.

    Args:
        layout: Sizes of the axes.
        world: The ranks, as many as the layout has.
        seed: Seed of the random states; Megatron-Core derives one for each tensor-parallel rank.
    """
    from mtrain.platform.device import prepare_megatron

    assert layout.world_size == world.size, (layout, world)
    prepare_megatron()
    _initialize_megatron(layout, seed=seed, timeout_seconds=world.timeout_seconds)
    return ParallelState(
        layout=layout,
        world=world,
        coordinates=layout.coordinates(world.rank),
        groups=_process_groups(),
    )


def _initialize_megatron(layout: ParallelLayout, *, seed: int, timeout_seconds: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        context_parallel_size=layout.cp_size,
        expert_model_parallel_size=layout.ep_size,
        expert_tensor_parallel_size=layout.etp_size,
        distributed_timeout_minutes=max(1, timeout_seconds // 60),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _process_groups() -> ProcessGroups:
    from megatron.core import parallel_state as mpu

    return ProcessGroups(
        tp=mpu.get_tensor_model_parallel_group(),
        pp=mpu.get_pipeline_model_parallel_group(),
        dp=mpu.get_data_parallel_group(),
        ep=mpu.get_expert_model_parallel_group(),
        etp=mpu.get_expert_tensor_parallel_group(),
    )


def destroy_parallel() -> None:
    """Forgets Megatron-Core's process groups; they end with the world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def destroy_world() -> None:
    """Leaves the process group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
