"""Comparisons over nccl, on as many GPUs as processes are started.

    torchrun --nproc_per_node 2 -m tests.on_gpus [CASE ...]

They are those of tests/test_overlap.py (with and without overlaps), of tests/replays.py (layers
replayed and as they are) and one of tokens that Transformer Engine sorts on their way to experts
on other ranks. Prints a line for each case that fits (of those that are named, if any are) and ends
with 1 if a bit differs; sorted tokens are added up in another order, so there it is a tolerance.
Everything but the latter is in half precision, which GPU kernels are for, and sums are taken in a
fixed order.
"""

import dataclasses
import functools
import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtrain.config import MoEConfig
from mtrain.parallel import (
    ParallelLayout,
    ParallelState,
    World,
    destroy_parallel,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.device import has_gpu, has_transformer_engine, prepare_megatron
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.tiny import make_checkpoint

# Kernels want rows of 16 bytes.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64}


def main() -> int:
    """Compares every case that has as many ranks."""
    # Before the first product: without it cuBLAS may split sums as it likes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_megatron()
    torch.use_deterministic_algorithms(True, warn_only=True)
    world = initialize_world(
        size=int(os.environ["WORLD_SIZE"]),
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, device=world.device)
    num_wrong = 0
    cases = all_cases()
    for name in sys.argv[1:] or cases:
        layout, comparison = cases[name]
        if layout.world_size == world.size:
            target = Path(folder[0]) / name.replace(" ", "_")
            found = everywhere(layout, comparison, world, target)
            num_wrong += any(found)
            if world.is_first_rank:
                verdict = f"differs: {found}" if any(found) else "equal"
                print(f"{name}: {verdict}", flush=True)  # noqa: T201
    dist.destroy_process_group()
    return 1 if num_wrong else 0


def all_cases() -> dict[str, tuple[ParallelLayout, Any]]:
    """Layouts and comparisons by name."""
    from tests.test_overlap import CASES

    two = ParallelLayout(world_size=2)
    cases = {
        name: (case.sizes, functools.partial(with_overlaps, case)) for name, case in CASES.items()
    }
    for uses_lora, overlaps in itertools.product((False, True), repeat=2):
        name = "replayed, dp2" + ", overlaps" * overlaps + ", lora" * uses_lora
        comparison = functools.partial(replayed, uses_lora=uses_lora, overlaps=overlaps)
        cases[name] = (two, comparison)
    if has_transformer_engine():
        sizes = ParallelLayout(world_size=2, ep_size=2)
        for dispatcher in ("alltoall", "allgather"):
            name = f"sorted by Transformer Engine, ep2, {dispatcher}"
            cases[name] = (sizes, functools.partial(sorted_by_kernel, dispatcher))
    return cases


def everywhere(
    layout: ParallelLayout, comparison: Any, world: World, folder: Path
) -> list[list[str]]:
    """What differs in a case, on each rank."""
    state = initialize_parallel(layout, world)
    found = comparison(state, folder)
    destroy_parallel()
    gathered: list[list[str]] = [[]] * world.size
    dist.all_gather_object(gathered, found)
    return gathered


def with_overlaps(case: Any, state: ParallelState, folder: Path) -> list[str]:
    """Training with and without overlaps."""
    from tests.test_overlap import compare

    if case.dtype == torch.float32:
        case = dataclasses.replace(case, dtype=torch.bfloat16)
    if state.is_first_rank and case.num_next_tokens:
        make_checkpoint_with_next_tokens(folder, case.model)
    elif state.is_first_rank:
        make_checkpoint(folder, case.model, **WIDE)
    dist.barrier()
    # Without balance loss, which Megatron-Core may add up in any order.
    found = compare(state, folder, case, MoEConfig())
    return [text for texts in found.values() for text in texts]


def replayed(state: ParallelState, folder: Path, *, uses_lora: bool, overlaps: bool) -> list[str]:
    """Training with layers replayed and as they are, both with or without overlaps."""
    from mtrain.platform.cuda_graphs import graph_recorder
    from tests.adapters import plan_of
    from tests.replays import compare

    if state.is_first_rank:
        make_checkpoint(folder, "qwen3_moe", head_dim=128, **WIDE)
    dist.barrier()
    record = graph_recorder() if has_gpu() else lambda work: work
    options = {"lora": plan_of(folder)[1], "dropout": 0.1} if uses_lora else {}
    warnings.filterwarnings("error", "layers could not be recorded")
    return compare(state, folder, record, dtype=torch.bfloat16, overlaps=overlaps, **options)


def sorted_by_kernel(dispatcher: str, state: ParallelState, folder: Path) -> list[str]:
    """Losses and gradients in float32, for routers may choose otherwise after rounding."""
    from tests.megatron import load_model, losses_and_gradients, on_gpu, packed_inputs

    if state.is_first_rank:
        make_checkpoint(folder, "qwen3_moe", **WIDE)
    dist.barrier()
    inputs = on_gpu(packed_inputs([40, 7, 64, 17], 131, seed=state.rank))
    results = []
    for fuses in (False, True):
        moe = MoEConfig(moe_permute_fusion=fuses, moe_token_dispatcher_type=dispatcher)
        [model] = load_model(state, folder, moe=moe)
        assert model.config.moe_permute_fusion is fuses
        results.append(losses_and_gradients(model, inputs))
    (losses, grads), (fused, fused_grads) = results
    differing = [
        name
        for name, grad in grads.items()
        if (fused_grads[name] - grad).norm() > 1e-3 * grad.norm()
    ]
    if not torch.allclose(fused, losses, rtol=1e-4, atol=1e-5):
        differing.append("losses")
    return differing


if __name__ == "__main__":
    sys.exit(main())
