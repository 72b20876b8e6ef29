"""Values of adapters: made at the start, loaded, and found for saving.

The one thing to know: a fresh A is drawn for the whole projection from a generator that is seeded
with the run's seed and the tensor's name, and each rank takes its slice. So a run starts with the
same adapter in every layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from mtrain.bridge.gather import TensorLookup
from mtrain.bridge.load import fill_tensors
from mtrain.bridge.plan import Shape, hf_tensors, plan_rank
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.bridge.sources import TensorSource
from mtrain.lora.plan import LoraPlan, adapter_table
from mtrain.parallel import ParallelState


def initialize_adapters(
    chunks: Sequence[torch.nn.Module],
    lora: LoraPlan,
    *,
    table: WeightTable,
    state: ParallelState,
    seed: int,
) -> None:
    """Fills fresh adapters: A uniform as in PEFT, B zero, so that the model is unchanged.

    Modules to save keep the weights of the model.

    Args:
        chunks: Bare chunks with adapters attached.
        lora: The adapters.
        table: Weights of the model.
        state: This rank.
        seed: Seed of the run.
    """
    factors = LoraPlan(linears=lora.linears)
    source = _FreshFactors(hf_tensors(adapter_table(table, factors)), seed=seed)
    load_adapters(chunks, source, factors, table=table, state=state)


def load_adapters(
    chunks: Sequence[torch.nn.Module],
    source: TensorSource,
    lora: LoraPlan,
    *,
    table: WeightTable,
    state: ParallelState,
) -> None:
    """Fills adapters, and modules to save, from a source that knows PEFT's names.

    Args:
        chunks: Bare chunks with adapters attached.
        source: Gives the tensors of `adapter_table(table, lora)` by name.
        lora: The adapters.
        table: Weights of the model.
        state: This rank.
    """
    plan = plan_rank(adapter_table(table, lora), layout=state.layout, rank=state.rank)
    wanted = {(parameter.chunk, parameter.name) for parameter in plan}
    tensors = [
        {name: tensor for name, tensor in named.items() if (chunk, name) in wanted}
        for chunk, named in enumerate(tensors_by_name(chunks))
    ]
    fill_tensors(tensors, source, plan)


def adapter_lookup(chunks: Sequence[torch.nn.Module], *, dtype: torch.dtype) -> TensorLookup:
    """Finds the tensors of an adapter for `save_weights`, with `adapter_table` as the table.

    Args:
        chunks: Bare chunks with adapters attached.
        dtype: Dtype to save in; modules to save may have another one than the factors.
    """
    lookup = lookup_in(tensors_by_name(chunks))

    def lookup_parameter(chunk: int, name: str, expert: int | None) -> torch.Tensor:
        tensor = lookup(chunk, name, expert).detach()
        # Buffers have a dtype of their own, which the table knows.
        return tensor.to(dtype) if name in parameters[chunk] else tensor

    parameters = [dict(chunk.named_parameters()).keys() for chunk in chunks]
    return lookup_parameter


class _FreshFactors:
    """A source of new factors."""

    def __init__(self, shapes: dict[str, Shape], *, seed: int) -> None:
        self._shapes = shapes
        self._seed = seed

    def slices(self, name: str) -> torch.Tensor:
        """A fresh tensor, the same each time.

        As PEFT: of a linear A is uniform (Kaiming with a = sqrt(5)) and B zero; of an embedding A
        is zero and B normal.
        """
        shape = self._shapes[name]
        if name.endswith((".lora_B.weight", ".lora_embedding_A")):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        if name.endswith(".lora_embedding_B"):
            return torch.randn(shape, generator=generator)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
