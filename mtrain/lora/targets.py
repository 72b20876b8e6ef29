"""Chooses what LoRA trains, from the flags and the weight table alone: no torch, no model.

Targets are named as Hugging Face or as Megatron-Core names them, or by a shorthand; names and
regular expressions match as in PEFT. The one thing to know: all names have the layer numbers of the
whole model, and the unit of choice is one Hugging Face tensor in one layer, so a fused linear may
have adapters for some of its projections. Only experts go together: all of a layer or none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mtrain.bridge.rules import Rule, WeightTable, filled, layers_of
from mtrain.config.tuner import TunerConfig
from mtrain.lora.name_patterns import match_names
from mtrain.lora.plan import (
    AdaptedLinear,
    Adapter,
    Kind,
    LoraPlan,
    endings,
    kind_of,
    module_of,
)

# Shorthand -> kinds of the weights that it stands for; no output layer is among them.
_SHORTHANDS: dict[str, tuple[Kind, ...]] = {
    "all-linear": ("column", "row", "replicated", "gate", "experts"),
    "all-router": ("router",),
    "all-embedding": ("embedding",),
}
_NOT_GIVEN = ("all-linear",)
_TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """A Hugging Face tensor of a rule in one layer; in a rule of experts, that of each expert.

    Attributes:
        rule: The rule.
        layer: Layer of the whole model; None outside of the layers.
        tensors: Full names of the tensors.
        megatron: Full names of the parameter, in both spellings.
    """

    rule: Rule
    layer: int | None
    tensors: tuple[str, ...]
    megatron: tuple[str, ...]


def choose_targets(table: WeightTable, tuner: TunerConfig) -> LoraPlan:
    """Turns the flags into the plan of an adapter.

    Args:
        table: Weights of the model.
        tuner: The flags.

    Returns:
        What gets an adapter, and what is trained whole, in the order of the table; layers that are
        alike are one entry.

    Raises:
        ValueError: A name or pattern matches nothing, a choice cannot be had, nothing is chosen.
    """
    _refuse_flags_of_full_training(tuner)
    parts = tuple(_parts(table))
    frozen = _frozen(parts, tuner)
    adapted = _targeted(parts, tuner) - frozen
    saved = _saved(parts, tuner.modules_to_save)
    _refuse_conflicts(parts, adapted=adapted, frozen=frozen, saved=saved)
    adapter = Adapter(rank=tuner.lora_rank, alpha=tuner.lora_alpha, use_rslora=tuner.use_rslora)
    linears = [
        AdaptedLinear(
            rule=rule,
            adapters=tuple(adapter if chosen else None for chosen in choice),
            layers=layers,
        )
        for rule in table.rules
        for choice, layers in _layers_by_choice(rule, parts, adapted).items()
    ]
    if not linears:
        raise ValueError(
            "no linear is left to get an adapter: choose some with --target_modules, "
            "or freeze less with --freeze_parameters"
        )
    return LoraPlan(
        linears=tuple(linears), modules_to_save=tuple(_saved_rules(table, parts, saved))
    )


def _parts(table: WeightTable) -> Iterator[_Part]:
    """All tensors of the model; of a tied one also the head, so that its name can be refused."""
    for rule in table.rules:
        if rule.is_duplicate and rule.place != "last":
            # The copy of the embedding that multi-token prediction has on the last stage.
            continue
        for layer in layers_of(rule):
            spellings = (rule.megatron, rule.plain)
            megatron = tuple(filled(name, layer=layer) for name in spellings if name)
            for tensor in rule.hf:
                name = _TIED_HEAD if rule.is_duplicate else filled(tensor.name, layer=layer)
                experts = range(rule.num_experts or 1)
                names = tuple(filled(name, expert=expert) for expert in experts)
                yield _Part(rule=rule, layer=layer, tensors=names, megatron=megatron)


def _is_meant(rule: Rule, shorthand: str) -> bool:
    return rule.place != "last" and kind_of(rule) in _SHORTHANDS[shorthand]


def _targeted(parts: Sequence[_Part], tuner: TunerConfig) -> set[_Part]:
    """What --target_modules or --target_regex choose."""
    candidates = [part for part in parts if kind_of(part.rule) is not None]
    if tuner.target_regex is None:
        flag, tensors = "--target_modules", _named_targets(candidates, tuner.target_modules)
    else:
        if tuner.target_modules != _NOT_GIVEN:
            raise ValueError(
                "--target_modules and --target_regex are two ways to choose the same: "
                "drop one of them"
            )
        flag, tensors = "--target_regex", _regex_targets(candidates, tuner.target_regex)
    chosen = _with_all_experts(candidates, tensors, flag)
    if any(part.rule.is_duplicate for part in chosen):
        raise ValueError(
            f"{flag} chooses lm_head, but the head of this model is its embedding "
            "(tie_word_embeddings) and cannot have an adapter of its own; leave it out"
        )
    return chosen


def _named_targets(candidates: Sequence[_Part], targets: Sequence[str]) -> set[str]:
    by_ending = _by_ending(candidates)
    for part in candidates:
        for ending in endings(_megatron_name(part)):
            by_ending[ending].update(part.tensors)
    for shorthand in _SHORTHANDS:
        by_ending[shorthand].update(
            tensor
            for part in candidates
            if _is_meant(part.rule, shorthand)
            for tensor in part.tensors
        )
    for target in targets:
        if not by_ending.get(target):
            existing = _existing_targets(candidates, by_ending)
            raise ValueError(f"--target_modules {target!r} matches nothing; there are: {existing}")
    return set().union(*(by_ending[target] for target in targets))


def _regex_targets(candidates: Sequence[_Part], pattern: str) -> set[str]:
    tensors = {module_of(tensor): tensor for part in candidates for tensor in part.tensors}
    try:
        matched = match_names(pattern, tensors)
    except ValueError as error:
        raise ValueError(f"--target_regex {error}") from None
    if not matched:
        raise ValueError(
            f"--target_regex {pattern!r} matches no whole name of a linear; there are: "
            + ", ".join(module_of(name) for name in _existing_tensors(candidates))
        )
    return {tensors[module] for module in matched}


def _frozen(parts: Sequence[_Part], tuner: TunerConfig) -> set[_Part]:
    """What --freeze_parameters and --freeze_parameters_regex name, as in full training."""
    names = {name for part in parts for name in (*part.megatron, *part.tensors)}
    found: dict[str, set[str]] = {}
    for prefix in tuner.freeze_parameters:
        flag = f"--freeze_parameters {prefix!r}"
        found[flag] = {name for name in names if name.startswith(prefix)}
    if tuner.freeze_parameters_regex is not None:
        flag = f"--freeze_parameters_regex {tuner.freeze_parameters_regex!r}"
        try:
            found[flag] = match_names(tuner.freeze_parameters_regex, names, anywhere=True)
        except ValueError as error:
            raise ValueError(f"--freeze_parameters_regex {error}") from None
    for flag, matched in found.items():
        if not matched:
            raise ValueError(
                f"{flag} matches no parameter; there are: " + ", ".join(_existing_tensors(parts))
            )
    matched = set().union(*found.values())
    whole = {part for part in parts if not matched.isdisjoint(part.megatron)}
    rest = [part for part in parts if part not in whole]
    return whole | _with_all_experts(rest, matched, "--freeze_parameters")


def _saved(parts: Sequence[_Part], modules: Sequence[str]) -> set[_Part]:
    """What --modules_to_save names."""
    by_ending = _by_ending(parts)
    for module in modules:
        if module not in by_ending:
            raise ValueError(
                f"--modules_to_save {module!r} matches nothing; there are: "
                + " ".join(_leaves(parts))
            )
    tensors = set().union(*(by_ending[module] for module in modules))
    chosen = _with_all_experts(parts, tensors, "--modules_to_save")
    is_tied = any(part.rule.is_duplicate for part in parts)
    for part in parts:
        if part in chosen and part.rule.num_experts is not None:
            raise ValueError(
                f"--modules_to_save {_leaf(part.tensors[0])}: PEFT cannot hold whole experts; "
                "give them an adapter with --target_modules"
            )
        is_head_or_embedding = part.rule.place in ("first", "last") and kind_of(part.rule)
        if part in chosen and is_tied and is_head_or_embedding:
            raise ValueError(
                f"--modules_to_save {_leaf(part.tensors[0])}: head and embedding of this model are "
                "one weight (tie_word_embeddings), which training a copy of it would break; "
                "leave it out"
            )
    return chosen


def _saved_rules(table: WeightTable, parts: Sequence[_Part], saved: set[_Part]) -> Iterator[Rule]:
    for rule in table.rules:
        for choice, layers in _layers_by_choice(rule, parts, saved).items():
            if not all(choice):
                named = [_leaf(tensor.name) for tensor in rule.hf]
                missing = [name for name, chosen in zip(named, choice, strict=True) if not chosen]
                raise ValueError(
                    f"--modules_to_save names a part of {_leaf(rule.megatron)}, which is one "
                    f"parameter ({', '.join(named)}): name {', '.join(missing)} too, or none"
                )
            yield replace(rule, layers=layers)


def _with_all_experts(parts: Sequence[_Part], tensors: set[str], flag: str) -> set[_Part]:
    """The parts whose tensors are chosen.

    Raises:
        ValueError: Some but not all experts of a layer are.
    """
    chosen = set()
    for part in parts:
        num_chosen = sum(tensor in tensors for tensor in part.tensors)
        if num_chosen == len(part.tensors):
            chosen.add(part)
        elif num_chosen:
            raise ValueError(
                f"{flag} chooses {_leaf(part.tensors[0])} of {num_chosen} of the "
                f"{len(part.tensors)} experts in layer {part.layer}; the experts of a layer are "
                "one parameter: choose all of them or none"
            )
    return chosen


def _layers_by_choice(
    rule: Rule, parts: Sequence[_Part], chosen: set[_Part]
) -> dict[tuple[bool, ...], tuple[int, ...]]:
    """Which tensors of a rule are chosen, and the layers where it is these; none is left out."""
    choices: dict[int | None, tuple[bool, ...]] = {}
    for part in parts:
        if part.rule is rule:
            choices[part.layer] = (*choices.get(part.layer, ()), part in chosen)
    layers = {choice: [] for choice in choices.values() if any(choice)}
    for layer, choice in choices.items():
        if layer is not None and any(choice):
            layers[choice].append(layer)
    return {choice: tuple(numbers) for choice, numbers in layers.items()}


def _refuse_flags_of_full_training(tuner: TunerConfig) -> None:
    given = {
        "freeze_parameters_ratio": tuner.freeze_parameters_ratio > 0,
        "trainable_parameters": bool(tuner.trainable_parameters),
        "trainable_parameters_regex": tuner.trainable_parameters_regex is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"--{name} has no meaning with LoRA, where all weights of the model are frozen; "
                "use --modules_to_save for modules to train besides the adapter"
            )


def _refuse_conflicts(
    parts: Sequence[_Part], *, adapted: set[_Part], frozen: set[_Part], saved: set[_Part]
) -> None:
    for part in parts:
        if part in saved and part in frozen:
            raise ValueError(
                f"{_leaf(part.tensors[0])} is in --modules_to_save and frozen by "
                "--freeze_parameters: leave it out of one of them"
            )
        if part in saved and part in adapted:
            raise ValueError(
                f"{_leaf(part.tensors[0])} is in --modules_to_save and gets an adapter too, but "
                "is trained either way alone: leave it out of --modules_to_save or of the targets"
            )


def _by_ending(parts: Iterable[_Part]) -> defaultdict[str, set[str]]:
    """Tensors by every ending of their module's name: `q_proj`, `self_attn.q_proj` and so on."""
    by_ending: defaultdict[str, set[str]] = defaultdict(set)
    for part in parts:
        for tensor in part.tensors:
            for ending in endings(module_of(tensor)):
                by_ending[ending].add(tensor)
    return by_ending


def _megatron_name(part: _Part) -> str:
    """Name of the module, or of the parameter where that is no module's `weight`."""
    return part.megatron[0].removesuffix(".weight")


def _leaf(parameter: str) -> str:
    return module_of(parameter).rpartition(".")[2]


def _leaves(parts: Iterable[_Part]) -> list[str]:
    """Last words of the modules that there are, each once."""
    own = (part for part in parts if not part.rule.is_duplicate)
    return list(dict.fromkeys(_leaf(part.tensors[0]) for part in own))


def _existing_targets(candidates: Sequence[_Part], by_ending: Mapping[str, set[str]]) -> str:
    own = [part for part in candidates if not part.rule.is_duplicate]
    megatron = dict.fromkeys(_megatron_name(part).rpartition(".")[2] for part in own)
    shorthands = [shorthand for shorthand in _SHORTHANDS if by_ending[shorthand]]
    longest = max((module_of(part.tensors[0]) for part in own), key=len)
    return (
        f"{' '.join(_leaves(own))} (Hugging Face), {' '.join(megatron)} (Megatron), "
        f"{' '.join(shorthands)}; or longer ends of a name, as {longest}"
    )


def _existing_tensors(parts: Iterable[_Part]) -> list[str]:
    """Names with `*` for layers and experts, each once."""
    own = (part for part in parts if not part.rule.is_duplicate)
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", part.tensors[0]) for part in own))
