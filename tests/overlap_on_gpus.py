"""The comparison of tests/test_overlap.py over nccl, on as many GPUs as processes are started.

    torchrun --nproc_per_node 2 -m tests.overlap_on_gpus [CASE ...]

Prints a line for each case that fits (of those that are named, if any are) and ends with 1 if a bit
differs. Everything is in half precision, which GPU kernels are for, and sums are taken in a fixed
order.
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtrain.config import MoEConfig
from mtrain.parallel import World, destroy_parallel, initialize_parallel, initialize_world
from mtrain.platform.device import prepare_megatron
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.tiny import make_checkpoint

# Kernels want rows of 16 bytes.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64}


def main() -> int:
    """Compares every case that has as many ranks."""
    # Before the first product: without it cuBLAS may split sums as it likes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_megatron()
    from tests.test_overlap import CASES, compare

    torch.use_deterministic_algorithms(True, warn_only=True)
    world = initialize_world(
        size=int(os.environ["WORLD_SIZE"]),
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, device=world.device)
    num_wrong = 0
    names = sys.argv[1:] or CASES
    for name in names:
        case = CASES[name]
        if case.sizes.world_size == world.size:
            target = Path(folder[0]) / name.replace(" ", "_")
            found = everywhere(compare, case, world, target)
            num_wrong += any(found)
            if world.is_first_rank:
                verdict = f"differs: {found}" if any(found) else "equal"
                print(f"{name}: {verdict}", flush=True)  # noqa: T201
    dist.destroy_process_group()
    return 1 if num_wrong else 0


def everywhere(
    compare: Callable[..., dict[bool, list[str]]], case: Any, world: World, folder: Path
) -> list[list[str]]:
    """What differs in a case, on each rank."""
    if case.dtype == torch.float32:
        case = dataclasses.replace(case, dtype=torch.bfloat16)
    if world.is_first_rank and case.num_next_tokens:
        make_checkpoint_with_next_tokens(folder, case.model)
    elif world.is_first_rank:
        make_checkpoint(folder, case.model, **WIDE)
    dist.barrier()
    state = initialize_parallel(case.sizes, world)
    # Without balance loss, which Megatron-Core may add up in any order.
    found = compare(state, folder, case, MoEConfig())
    destroy_parallel()
    gathered: list[list[str]] = [[]] * world.size
    dist.all_gather_object(gathered, [text for texts in found.values() for text in texts])
    return gathered


if __name__ == "__main__":
    sys.exit(main())
