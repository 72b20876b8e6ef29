"""How a checkpoint is written: in which form its tensors are stored, and what is copied into it.

The one thing to know: a saved checkpoint has the tensors of the one that the model was loaded from,
under the same names and in the same shapes. So whoever saves is given what whoever loaded has seen.
No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtrain.bridge.ledger import carried_names, copied_names
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.sources import StoredShape, StoredWeights
from mtrain.bridge.storage.arrangement import Arrangement, Shape, native_arrangements
from mtrain.bridge.storage.decoded import FP8, SCALE_SUFFIX
from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.bridge.storage.view import ArrangedWeights

Entry = tuple[str, str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What is written in 8-bit floats.

    Attributes:
        scale_dtypes: Dtype of the factors of each stored tensor that is, by its name.
        blocks: How they are scaled.
        source: The checkpoint that has such factors already; blocks that are still what they were
            there keep them.
    """

    scale_dtypes: Mapping[str, str]
    blocks: Fp8Blocks
    source: StoredWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Tensors that the model does not have and that are copied.

    Attributes:
        tensors: Which, with dtype and shape.
        source: The checkpoint that has them.
    """

    tensors: Mapping[str, StoredShape]
    source: StoredWeights

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Name, dtype and shape of each, in their order."""
        return tuple((name, one.dtype, tuple(one.shape)) for name, one in self.tensors.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """The form that weights are written in; by default the canonical tensors and nothing else.

    Attributes:
        arrangements: Stored tensors that consist of canonical ones.
        quantized: What is written in 8-bit floats; None for nothing.
        carried: What is copied from the source; None for nothing.
        copies: Tensors that have the values of another one, each with the name of that.
    """

    arrangements: tuple[Arrangement, ...] = ()
    quantized: Quantized | None = None
    carried: Carried | None = None
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def is_canonical(self) -> bool:
        """Whether files hold the canonical tensors and nothing else."""
        return not (self.arrangements or self.quantized or self.carried or self.copies)

    def by_canonical(self) -> dict[str, Arrangement]:
        """The stored tensor that each canonical one is in, where that is not itself."""
        return {name: one for one in self.arrangements for name, _ in one.canonical}

    def copies_of(self, name: str, shape: Shape) -> tuple[Arrangement, ...]:
        """What else is stored with the values of a canonical tensor."""
        return tuple(
            Arrangement(name=copy, slabs=((name,),), part_shapes=(shape,))
            for copy, original in self.copies
            if original == name
        )

    def is_quantized(self, name: str) -> bool:
        """Whether a stored tensor is written in 8-bit floats."""
        return self.quantized is not None and name in self.quantized.scale_dtypes

    def entries(self, stored: Arrangement, dtype: str) -> tuple[Entry, ...]:
        """Name, dtype and shape of what is in a file for a stored tensor.

        Args:
            stored: The tensor.
            dtype: Dtype of its values.
        """
        if self.quantized is None or stored.name not in self.quantized.scale_dtypes:
            return ((stored.name, dtype, stored.shape),)
        scale_dtype = self.quantized.scale_dtypes[stored.name]
        scale_shape = self.quantized.blocks.scale_shape(stored.shape)
        scale_name = f"{stored.name}{SCALE_SUFFIX}"
        return (stored.name, FP8, stored.shape), (scale_name, scale_dtype, scale_shape)


CANONICAL = StoredAs()


def stored_as(weights: ArrangedWeights, table: WeightTable, *, keeps_fp8: bool) -> StoredAs:
    """The form that a checkpoint is in; 4-bit weights are written as bfloat16, stacked.

    Args:
        weights: The checkpoint.
        table: Weights of its model.
        keeps_fp8: Whether what is stored in 8-bit floats is written in them again, and not as
            bfloat16.

    Raises:
        ValueError: Nothing in it is stored in 8-bit floats.
    """
    plain, checkpoint = weights.decoded, weights.checkpoint
    names, copies = carried_names(table, weights), tuple(copied_names(table, weights).items())
    if not keeps_fp8:
        tensors = {name: plain.tensors[name] for name in names}
        carried = Carried(tensors=tensors, source=plain) if tensors else None
        return StoredAs(arrangements=weights.arrangements, carried=carried, copies=copies)
    quantized = [name for name, code in plain.codes.items() if code == "fp8"]
    if not quantized:
        raise ValueError(
            f"--fp8_export true: {weights.folder} has no weights in 8-bit floats to take the form "
            "from; drop it"
        )
    with_scales = [
        part
        for name in names
        for part in ((name, f"{name}{SCALE_SUFFIX}") if name in plain.codes else (name,))
    ]
    tensors = {name: checkpoint.tensors[name] for name in with_scales}
    return StoredAs(
        arrangements=weights.arrangements,
        quantized=Quantized(
            scale_dtypes={
                name: checkpoint.tensors[f"{name}{SCALE_SUFFIX}"].dtype for name in quantized
            },
            blocks=plain.blocks,
            source=checkpoint,
        ),
        carried=Carried(tensors=tensors, source=checkpoint) if tensors else None,
        copies=copies,
    )


def stored_natively(table: WeightTable) -> StoredAs:
    """The form of Hugging Face's own checkpoints, for weights that come from other files."""
    return StoredAs(arrangements=native_arrangements(table))
