"""Finds the modules that an adapter file holds whole, beside its factors.

A parameter of Megatron-Core may be made of several Hugging Face modules; then all of them must be
there, and a module must be there with all its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mtrain.bridge.rules import Rule, WeightTable, filled, layers_of
from mtrain.bridge.sources import StoredShape
from mtrain.lora.adapter_settings import AdapterSettings
from mtrain.lora.model_names import table_in_model
from mtrain.lora.plan import PEFT_PREFIX, module_of, tied_tensors

_Tensors = Mapping[str, StoredShape]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor that may be stored whole.

    Attributes:
        name: Its name in the file.
        module: Its module, as transformers' class calls it.
        shape: Its shape.
    """

    name: str
    module: str
    shape: tuple[int, ...]


def find_saved_modules(
    tensors: _Tensors, left: set[str], table: WeightTable, settings: AdapterSettings
) -> tuple[Rule, ...]:
    """Rules of the weights that are stored whole.

    Args:
        tensors: All tensors of the file, by canonical names.
        left: Names of those that are no factors.
        table: Weights of the model.
        settings: What the config says.

    Raises:
        ValueError: One is incomplete, has a wrong shape, or is not announced by the config.
    """
    tied = {tensor.name for tensor in tied_tensors(table)}
    saved: list[tuple[Rule, Rule]] = []
    for rule, in_model in _rules(table):
        layers = []
        for layer in layers_of(rule):
            wanted = list(_tensors_of(rule, in_model, layer))
            there = [tensor for tensor in wanted if tensor.name in left]
            if not there:
                continue
            _check_tensors(there, wanted, tensors, settings)
            if rule.hf[0].name in tied:
                raise ValueError(
                    f"holds {there[0].name}, which this model uses as output layer too; PEFT "
                    "trains the two apart, which is not built"
                )
            layers.append(layer)
        if layers:
            numbers = tuple(layers) if rule.layers else ()
            saved.append((replace(rule, layers=numbers), replace(in_model, layers=numbers)))
    _check_modules(saved, table, settings)
    return tuple(rule for rule, _ in saved)


def saved_names(rule: Rule) -> Iterator[str]:
    """Names in the file of all tensors of a rule that is stored whole."""
    for layer in layers_of(rule):
        yield from (tensor.name for tensor in _tensors_of(rule, rule, layer))


def _rules(table: WeightTable) -> Iterator[tuple[Rule, Rule]]:
    """Rules that own tensors, and the same with the names of transformers' class."""
    for rule, in_model in zip(table.rules, table_in_model(table).rules, strict=True):
        if not rule.is_duplicate:
            yield rule, in_model


def _tensors_of(rule: Rule, in_model: Rule, layer: int | None) -> Iterator[_Tensor]:
    for expert in range(rule.num_experts) if rule.num_experts else (None,):
        for tensor, known in zip(rule.hf, in_model.hf, strict=True):
            name, name_in_model = (
                filled(one.name, layer=layer, expert=expert) for one in (tensor, known)
            )
            yield _Tensor(
                name=PEFT_PREFIX + name, module=module_of(name_in_model), shape=tensor.shape
            )


def _check_tensors(
    there: Sequence[_Tensor],
    wanted: Sequence[_Tensor],
    tensors: _Tensors,
    settings: AdapterSettings,
) -> None:
    """Checks the weights of one parameter that are stored whole."""
    for tensor in there:
        if not any(tensor.module.endswith(key) for key in settings.modules_to_save):
            raise ValueError(f"holds {tensor.name}, which 'modules_to_save' does not name")
        shape = tensors[tensor.name].shape
        if shape != tensor.shape:
            raise ValueError(
                f"{tensor.name} has shape {list(shape)}, expected {list(tensor.shape)}"
            )
    missing = [tensor for tensor in wanted if tensor not in there]
    if missing:
        raise ValueError(
            f"holds {there[0].name} without {missing[0].name}; they are trained together"
        )


def _check_modules(
    saved: Sequence[tuple[Rule, Rule]], table: WeightTable, settings: AdapterSettings
) -> None:
    """Checks that modules are stored with all their tensors, and that none is missing."""
    there = {
        tensor
        for rule, in_model in saved
        for layer in layers_of(rule)
        for tensor in _tensors_of(rule, in_model, layer)
    }
    modules = {tensor.module for tensor in there}
    for key in settings.modules_to_save:
        if not any(module.endswith(key) for module in modules):
            raise ValueError(f"'modules_to_save' names {key}, of which no weight is there")
    for rule, in_model in _rules(table) if modules else ():
        for layer in layers_of(rule):
            for tensor in _tensors_of(rule, in_model, layer):
                if tensor.module in modules and tensor not in there:
                    raise ValueError(f"holds module {tensor.module} without {tensor.name}")
