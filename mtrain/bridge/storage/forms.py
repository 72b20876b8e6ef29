"""Other ways in which files hold the tensors of a weight table: stacked, transposed, renamed.

The one thing to know: a table is written for canonical tensors, one a projection and one an
expert, as `[out, in]`. A `StorageForm` says which of them a stored tensor consists of, and whoever
reads or writes files translates; nobody else knows of forms. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

RowOrder = Literal["concatenated", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageForm:
    """A stored tensor, or one a layer, and the canonical tensors that it consists of.

    Where the names of the parts have `{expert}` open, the stored tensor has an axis of experts in
    front: `[expert, out, in]`. It is there where its name is there and its shape is the right one,
    so a table may list several forms with one name.

    Attributes:
        stored: Its name, with `{layer}` open.
        parts: Names of the canonical tensors, with `{layer}` and `{expert}` open.
        order: Whether rows of a part follow those of the part before, or one row of each part
            comes after the other.
        is_transposed: Whether matrices are stored as `[in, out]`; vectors are not concerned.
        is_native: Whether Hugging Face has no other form, so that weights that come from other
            files are written in it.
    """

    stored: str
    parts: tuple[str, ...]
    order: RowOrder = "concatenated"
    is_transposed: bool = False
    is_native: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether it stacks experts."""
        return "{expert}" in self.parts[0]


def stacked_experts(
    stored: str,
    *,
    canonical: str | None = None,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    order: RowOrder = "concatenated",
    is_transposed: bool = False,
    is_native: bool = False,
    has_bias: bool = False,
) -> tuple[StorageForm, ...]:
    """All experts of a layer in one tensor a projection, gate and up in one.

    What transformers 5 has in memory, and writes with `save_original_format=False`.
    Source: transformers' `conversion_mapping.py`, "qwen2_moe" and "qwen3_vl_moe"; `GptOssExperts`.

    Args:
        stored: What begins the names in files, e.g. `model.layers.{layer}.mlp.experts.`.
        canonical: What begins the canonical names, up to the number of the expert; the same if
            None.
        gate: Name of the gate projection of an expert.
        up: Name of its up projection.
        down: Name of its down projection.
        order: Order of the rows of gate and up.
        is_transposed: Whether matrices are stored as `[in, out]`.
        is_native: See `StorageForm`.
        has_bias: Whether the projections have biases.
    """
    expert = (stored if canonical is None else canonical) + "{expert}."
    stacked = (("gate_up_proj", (gate, up)), ("down_proj", (down,)))
    kinds = [("", "weight"), ("_bias", "bias")] if has_bias else [("", "weight")]
    return tuple(
        StorageForm(
            stored=f"{stored}{name}{suffix}",
            parts=tuple(f"{expert}{part}.{kind}" for part in parts),
            order=order if len(parts) > 1 else "concatenated",
            is_transposed=is_transposed and kind == "weight",
            is_native=is_native,
        )
        for name, parts in stacked
        for suffix, kind in kinds
    )


def transposed(*names: str) -> tuple[StorageForm, ...]:
    """Weights that are stored as `[in, out]` under their own names, as those of GPT-2.

    Source: transformers' `Conv1D`.

    Args:
        *names: Names of canonical tensors.
    """
    return tuple(
        StorageForm(stored=name, parts=(name,), is_transposed=True, is_native=True)
        for name in names
    )


def without_prefix(
    prefix: str, names: Iterable[str], forms: Iterable[StorageForm] = ()
) -> tuple[StorageForm, ...]:
    """The tensors of a model whose files leave out what all names begin with.

    Source: transformers adds and drops `base_model_prefix` when it loads; the files of GPT-2 on the
    hub are those of the model inside.

    Args:
        prefix: What is left out, e.g. "transformer.".
        names: Names of canonical tensors, open or not; those without it are skipped.
        forms: Other forms that some of them are in, which they keep.
    """
    others = [form for form in forms if form.stored.startswith(prefix)]
    covered = {part for form in others for part in form.parts}
    plain = [
        StorageForm(stored=name, parts=(name,))
        for name in dict.fromkeys(names)
        if name.startswith(prefix) and name not in covered
    ]
    return tuple(
        replace(form, stored=form.stored.removeprefix(prefix), is_native=False)
        for form in (*plain, *others)
    )
