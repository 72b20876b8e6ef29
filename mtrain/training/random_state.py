"""Random states of this rank: read and set.

The one thing to know: only dropout draws random numbers while training. The order of the data
follows from the seed and the position alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from mtrain.platform.device import has_gpu

__all__ = ["random_states", "reseed", "set_random_states"]

_CPU, _GPU, _TRACKED = "cpu", "gpu", "tracked."


def random_states() -> dict[str, torch.Tensor]:
    """The states by name: uint8 [size], on the CPU."""
    states = {_CPU: torch.get_rng_state()}
    if has_gpu():
        states[_GPU] = torch.cuda.get_rng_state()
    # Megatron-Core keeps states that differ between tensor- or expert-parallel ranks.
    tracked = get_cuda_rng_tracker().get_states()
    return states | {_TRACKED + name: state for name, state in tracked.items()}


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Sets what `random_states` read on this kind of device.

    Raises:
        ValueError: They are from another kind of device, or from another version of Megatron-Core.
    """
    if states.keys() != random_states().keys():
        raise ValueError(
            f"the random states saved are {', '.join(sorted(states))}, those here "
            f"{', '.join(sorted(random_states()))}; use --no_load_rng true"
        )
    torch.set_rng_state(states[_CPU])
    if has_gpu():
        torch.cuda.set_rng_state(states[_GPU])
    get_cuda_rng_tracker().set_states(
        {
            name.removeprefix(_TRACKED): state
            for name, state in states.items()
            if name.startswith(_TRACKED)
        }
    )


def reseed(seed: int) -> None:
    """Fresh random states, as at the start of a run with this seed."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
