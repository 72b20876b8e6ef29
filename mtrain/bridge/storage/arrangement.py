"""The forms of a weight table in the tensors of a whole model, and those that a checkpoint has.

The one thing to know: an `Arrangement` is one stored tensor. It consists of slabs, one an expert
(or a single one), and a slab of the parts whose rows it holds; so one that has all parts of a slab
can write it. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mtrain.bridge.rules import WeightTable, filled, layers_of
from mtrain.bridge.sources import StoredShape
from mtrain.bridge.storage.forms import RowOrder, StorageForm

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """A stored tensor and the canonical tensors that it consists of.

    Attributes:
        name: Its name.
        slabs: Names of the canonical tensors of each slab, in their order.
        part_shapes: Their shapes, the same in each slab.
        order: As in `StorageForm`.
        is_transposed: As in `StorageForm`.
        is_stacked: Whether the stored tensor has an axis of slabs in front.
        form: The form that it is of; None for a tensor that is stored as it is.
    """

    name: str
    slabs: tuple[tuple[str, ...], ...]
    part_shapes: tuple[Shape, ...]
    order: RowOrder = "concatenated"
    is_transposed: bool = False
    is_stacked: bool = False
    form: StorageForm | None = None

    @property
    def slab_shape(self) -> Shape:
        """Shape of a slab as it is stored."""
        shape = (sum(rows for rows, *_ in self.part_shapes), *self.part_shapes[0][1:])
        return shape[::-1] if self.is_transposed else shape

    @property
    def shape(self) -> Shape:
        """Shape of the stored tensor."""
        return (len(self.slabs), *self.slab_shape) if self.is_stacked else self.slab_shape

    @property
    def is_plain(self) -> bool:
        """Whether the stored tensor is one canonical tensor, as it is."""
        return not (self.is_transposed or self.is_stacked) and len(self.part_shapes) == 1

    @property
    def canonical(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of each canonical tensor, slab by slab."""
        for names in self.slabs:
            yield from zip(names, self.part_shapes, strict=True)

    def first_row(self, part: int) -> int:
        """Row of a slab, before it is transposed, that begins a part."""
        if self.order == "interleaved":
            return part
        return sum(rows for rows, *_ in self.part_shapes[:part])

    @property
    def row_step(self) -> int:
        """Distance of two rows of a part in a slab."""
        return len(self.part_shapes) if self.order == "interleaved" else 1


def as_it_is(name: str, shape: Shape) -> Arrangement:
    """A tensor that is stored as it is."""
    return Arrangement(name=name, slabs=((name,),), part_shapes=(shape,))


def arrangements(table: WeightTable, form: StorageForm) -> tuple[Arrangement, ...]:
    """All stored tensors of a form; none where the table has nothing that the form is about."""
    tensors = {
        tensor.name: (tensor.shape, rule)
        for rule in table.rules
        if not rule.is_duplicate
        for tensor in rule.hf
    }
    if form.parts[0] not in tensors:
        return ()
    _, rule = tensors[form.parts[0]]
    experts = range(rule.num_experts) if rule.num_experts is not None else (None,)
    shapes = tuple(tensors[part][0] for part in form.parts)
    assert form.order == "concatenated" or len(set(shapes)) == 1, f"{form}: {shapes}"
    return tuple(
        Arrangement(
            name=filled(form.stored, layer=layer),
            slabs=tuple(
                tuple(filled(part, layer=layer, expert=expert) for part in form.parts)
                for expert in experts
            ),
            part_shapes=shapes,
            order=form.order,
            is_transposed=form.is_transposed,
            is_stacked=form.has_experts,
            form=form,
        )
        for layer in layers_of(rule)
    )


def native_arrangements(table: WeightTable) -> tuple[Arrangement, ...]:
    """The stored tensors of the forms that Hugging Face has no other for."""
    found = [one for form in table.forms if form.is_native for one in arrangements(table, form)]
    return tuple({one.name: one for one in reversed(found)}.values())[::-1]


def find_arrangements(
    table: WeightTable, tensors: Mapping[str, StoredShape]
) -> tuple[tuple[Arrangement, ...], Mapping[str, list[str]]]:
    """The forms that stored tensors are in.

    Args:
        table: Weights of the model.
        tensors: What is stored, by name.

    Returns:
        The stored tensors that consist of canonical ones, and by kind what is wrong with them: a
        layer of a form is missing, has another shape, or is there in two forms.
    """
    options: dict[str, list[Arrangement]] = {}
    for form in table.forms:
        for one in arrangements(table, form):
            options.setdefault(one.name, []).append(one)
    found: list[Arrangement] = []
    faults: dict[str, list[str]] = {}
    for name, same_name in options.items():
        if name not in tensors:
            continue
        fitting = [one for one in same_name if one.shape == tensors[name].shape]
        if fitting:
            found.append(fitting[0])
        else:
            shapes = " or ".join(str(one.shape) for one in same_name)
            text = f"{name} has {tensors[name].shape}, expected is {shapes}"
            faults.setdefault("wrong shape", []).append(text)
            found.append(same_name[0])
    if twice := list(_stored_twice(found, tensors)):
        faults["stored twice"] = twice
    if missing := list(_missing(options, found, tensors)):
        faults["missing"] = missing
    return tuple(found), faults


def _stored_twice(
    found: Sequence[Arrangement], tensors: Mapping[str, StoredShape]
) -> Iterator[str]:
    holder: dict[str, str] = {}
    for one in found:
        for name, _ in one.canonical:
            other = holder.setdefault(name, one.name)
            if other != one.name:
                yield f"{name} (in {other} and {one.name})"
            elif name in tensors and name != one.name:
                yield f"{name} (by itself and in {one.name})"


def _missing(
    options: Mapping[str, Sequence[Arrangement]],
    found: Sequence[Arrangement],
    tensors: Mapping[str, StoredShape],
) -> Iterator[str]:
    """Stored tensors of which other layers, or other projections, are there."""
    forms = {one.form for one in found}
    has_experts = any(form is not None and form.has_experts for form in forms)
    held = {name for one in found for name, _ in one.canonical} | tensors.keys()
    for name, same_name in options.items():
        is_used = any(one.form in forms or (has_experts and one.is_stacked) for one in same_name)
        is_held = any(part in held for one in same_name for part, _ in one.canonical)
        if name not in tensors and is_used and not is_held:
            yield name
