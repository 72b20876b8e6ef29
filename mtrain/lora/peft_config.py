"""The adapter_config.json that is written beside an adapter.

The one thing to know: PEFT builds an adapter from its config alone, so the config has to select
exactly the modules that the file has factors for. Names in it are as short as that allows.

Experts are the hard part. In the files of a model each is a linear, and so it is in an adapter
with one adapter an expert. transformers 5 fuses them, and PEFT follows: whatever `target_modules`
has with the name of an expert's projection becomes a target parameter of the whole model, with
twice the rank for gate and up. Ranks and alphas are therefore written for both spellings where that
would go wrong, and linears that PEFT would take for an expert's are named as parameters.

Source: `LoraConfig`, `check_target_module_exists`, `_inject_parameters`, `_set_trainable`,
`get_pattern_key` and `_convert_peft_config_moe` of PEFT.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtrain.bridge.rules import HFTensor, Rule, WeightTable, filled, layers_of
from mtrain.lora.adapter_settings import scale_ratio
from mtrain.lora.fused_experts import (
    ExpertLayout,
    FusedFactors,
    fused_factors,
    fused_parameters,
)
from mtrain.lora.model_names import plan_in_model, table_in_model
from mtrain.lora.name_patterns import ANY_NUMBER
from mtrain.lora.plan import (
    AdaptedLinear,
    Adapter,
    LoraPlan,
    endings,
    module_name,
    module_of,
    tied_tensors,
)

# `mlp.gate.weight` or `mlp.experts.down_proj`: the last two names alone say too little to people.
_PARAMETER_PARTS = 3
# PEFT 0.21 converts adapters of all that fuses its experts like this one, but not of itself.
_NOT_CONVERTED = ("qwen2_moe",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Something that PEFT looks up by name.

    Attributes:
        name: Full name; the number of an expert is open.
        rank: Its rank.
        alpha: Its alpha.
        is_parameter: Whether it belongs to `target_parameters`.
        num_experts: Numbers that the open one stands for.
        has_default: Whether it takes `r` and `lora_alpha` where no pattern names it.
        is_in_class: Whether the class of transformers has it. Else only mtrain looks it up.
    """

    name: str
    rank: int
    alpha: float
    is_parameter: bool = False
    num_experts: int = 0
    has_default: bool = True
    is_in_class: bool = True


def adapter_config(
    lora: LoraPlan,
    table: WeightTable,
    *,
    base: str | None,
    layout: ExpertLayout,
    dropout: float,
) -> dict[str, Any]:
    """What adapter_config.json holds.

    Args:
        lora: The adapters.
        table: Weights of the model.
        base: Name or path of the model, for `base_model_name_or_path`.
        layout: How experts are stored.
        dropout: Dropout that it is trained with. PEFT has none for parameters and refuses to load
            an adapter that asks for it; 0 is written then, which is the same for inference.

    Raises:
        ValueError: PEFT has no way to express the adapter.
    """
    lora, table = plan_in_model(lora, table), table_in_model(table)
    adapters = [adapter for linear in lora.linears for _, _, adapter in _adapted(linear)]
    (use_rslora,) = {adapter.use_rslora for adapter in adapters}
    rank = _most_common(adapter.rank for adapter in adapters)
    alpha = _most_common(adapter.alpha for adapter in adapters)
    targets = list(_targets(lora, table, layout))
    target_parameters = _target_parameters(targets, table)
    looked_up = [_as_looked_up(target, target_parameters) for target in targets]
    looked_up += _converted(lora, table, layout, rank=rank, alpha=alpha)
    has_parameters = any(t.is_parameter or t.num_experts for t in targets)
    return {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "target_modules": _target_modules(targets, table),
        "exclude_modules": None,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0 if has_parameters else dropout,
        "fan_in_fan_out": _is_transposed(lora, table),
        "bias": "none",
        "use_rslora": use_rslora,
        "modules_to_save": _modules_to_save(lora, table) or None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _pattern({t: t.rank for t in looked_up}, default=rank),
        "alpha_pattern": _pattern({t: t.alpha for t in looked_up}, default=alpha),
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "use_dora": False,
        "layer_replication": None,
        "lora_bias": False,
        "target_parameters": target_parameters or None,
    }


def per_expert_problem(lora: LoraPlan, table: WeightTable, *, model_type: str) -> str | None:
    """Why PEFT with transformers 5 does not load experts that are stored one by one.

    Its conversion needs gate and up together, takes them for the inner one of two parameters, and
    targets all layers. In the fused layout there is no such limit.

    Args:
        lora: The adapters.
        table: Weights of the model.
        model_type: That of the model's config.json.

    Returns:
        The reason, or None if it loads them.
    """
    fused = fused_factors(lora, table)
    is_converted = model_type not in _NOT_CONVERTED
    if not all(factors.parameter.has_linears and is_converted for factors in fused):
        return f"PEFT does not load experts of a {model_type} model that are stored one by one"
    found = {(factors.parameter.name, factors.layer) for factors in fused}
    everywhere = [
        {(parameter.name, layer) for layer in parameter.rule.layers}
        for parameter in fused_parameters(table)
    ]
    convertible = [set().union(*everywhere[start:]) for start in range(len(everywhere) + 1)]
    if found in convertible and all(all(factors.spans) for factors in fused):
        return None
    return (
        "PEFT with transformers 5 does not load experts that are stored one by one unless all "
        "their projections, or down_proj alone, are adapted in all layers that have experts"
    )


def next_tokens_problem(lora: LoraPlan) -> str | None:
    """What PEFT leaves out because transformers has no layers of multi-token prediction.

    Args:
        lora: The adapters.

    Returns:
        The reason, or None if it loads all.
    """
    if all(_is_in_class(linear.rule) for linear in lora.linears):
        return None
    return (
        "PEFT leaves out the adapters of multi-token prediction, which no class of transformers "
        "has; mtrain reads them"
    )


def _targets(lora: LoraPlan, table: WeightTable, layout: ExpertLayout) -> Iterator[_Target]:
    """What the config selects, in the order of the plan."""
    fused = fused_factors(lora, table)
    for factors in fused:
        _check_one_scale(factors, lora)
    like_experts = {
        module_name(tensor).rpartition(".")[2]
        for parameter in fused_parameters(table)
        for tensor in parameter.rule.hf
    }
    for linear in lora.linears:
        is_fused = layout == "fused" and linear.rule in [one.parameter.rule for one in fused]
        for layer, tensor, adapter in _adapted(linear) if not is_fused else ():
            module = filled(module_name(tensor), layer=layer, expert=ANY_NUMBER)
            # transformers 5 has no linear for the router.
            is_parameter = _is_in_class(linear.rule) and (
                linear.kind == "router"
                or (linear.kind != "experts" and module.rpartition(".")[2] in like_experts)
            )
            yield _Target(
                name=f"{module}.weight" if is_parameter else module,
                rank=adapter.rank,
                alpha=adapter.alpha,
                is_parameter=is_parameter,
                num_experts=linear.rule.num_experts or 0,
                is_in_class=_is_in_class(linear.rule),
            )
    if layout == "fused":
        yield from (_fused_target(factors, lora) for factors in fused)


def _as_looked_up(target: _Target, target_parameters: list[str]) -> _Target:
    """What is in no class is looked up as a parameter where its name ends like a target's."""
    parameter = f"{target.name}.weight"
    is_parameter = any(f".{parameter}".endswith(f".{key}") for key in target_parameters)
    if target.is_in_class or not is_parameter:
        return target
    return replace(target, name=parameter, is_parameter=True)


def _converted(
    lora: LoraPlan, table: WeightTable, layout: ExpertLayout, *, rank: int, alpha: float
) -> list[_Target]:
    """What PEFT looks up besides when it converts experts that are stored one by one.

    It gives the pair of gate and up twice `r` and `lora_alpha`; pairs are left out where that is
    right for all of them.
    """
    if layout == "fused":
        return []
    whole = [factors for factors in fused_factors(lora, table) if all(factors.spans)]
    targets = [_fused_target(factors, lora) for factors in whole]
    pairs = [target for factors, target in zip(whole, targets, strict=True) if factors.spans[1:]]
    singles = [target for target in targets if target not in pairs]
    if all((pair.rank, pair.alpha) == (2 * rank, 2 * alpha) for pair in pairs):
        return singles
    return [*singles, *(replace(pair, has_default=False) for pair in pairs)]


def _fused_target(factors: FusedFactors, lora: LoraPlan) -> _Target:
    adapter = _adapters_of(factors, lora)[0]
    ratio = scale_ratio(factors.rank, adapter.rank, use_rslora=adapter.use_rslora)
    return _Target(
        name=factors.parameter.lookup_name(factors.layer),
        rank=factors.rank,
        alpha=adapter.alpha * ratio,
        is_parameter=True,
    )


def _adapters_of(factors: FusedFactors, lora: LoraPlan) -> list[Adapter]:
    """The adapters that became these factors."""
    return [
        adapter
        for linear in lora.linears
        if linear.rule == factors.parameter.rule and factors.layer in linear.layers
        for adapter in linear.adapters
        if adapter
    ]


def _check_one_scale(factors: FusedFactors, lora: LoraPlan) -> None:
    scales = [adapter.scale for adapter in _adapters_of(factors, lora)]
    if not all(math.isclose(scale, scales[0], rel_tol=1e-9) for scale in scales):
        raise ValueError(
            f"projections of the experts of layer {factors.layer} are adapted with the scales "
            f"{scales}, and PEFT knows one scale for {factors.parameter.name}; merge the adapter "
            "instead, or start with a new one"
        )


def _is_transposed(lora: LoraPlan, table: WeightTable) -> bool:
    """Whether the model has matrices as [in, out], in transformers' `Conv1D`."""
    transposed = {
        form.stored for form in table.forms if form.is_transposed and not form.has_experts
    }
    return any(tensor.name in transposed for linear in lora.linears for tensor in linear.rule.hf)


def _adapted(linear: AdaptedLinear) -> Iterator[tuple[int | None, HFTensor, Adapter]]:
    for layer in linear.layers or (None,):
        for source in linear.sources:
            adapter = linear.adapters[source]
            assert adapter is not None
            yield layer, linear.rule.hf[source], adapter


def _target_modules(targets: list[_Target], table: WeightTable) -> list[str]:
    chosen = {t.name: t.num_experts for t in targets if t.is_in_class and not t.is_parameter}
    others = set(_all_modules(table)) - chosen.keys()
    names = []
    for name, full_name in _shortest(chosen, others).items():
        numbers = range(chosen[full_name]) if ANY_NUMBER in name else (0,)
        names += [name.replace(ANY_NUMBER, str(number)) for number in numbers]
    return names


def _target_parameters(targets: list[_Target], table: WeightTable) -> list[str]:
    chosen = [t.name for t in targets if t.is_in_class and t.is_parameter]
    universe = {f"{module}.weight" for module in _all_modules(table)}
    for parameter in fused_parameters(table):
        universe |= {parameter.lookup_name(layer) for layer in parameter.rule.layers}
    return list(_shortest(chosen, universe - set(chosen), num_parts=_PARAMETER_PARTS))


def _modules_to_save(lora: LoraPlan, table: WeightTable) -> list[str]:
    """Names of modules that are saved whole; PEFT takes them for ends of names, dot or not."""
    tied = tied_tensors(table)
    chosen: list[str] = []
    for rule in lora.modules_to_save:
        if rule.num_experts is not None:
            raise ValueError("experts cannot be among the modules to save: PEFT has no such module")
        if tied.intersection(rule.hf):
            raise ValueError(
                f"{rule.hf[0].name} cannot be among the modules to save: the model uses it as "
                "output layer too, and PEFT would train the two apart"
            )
        chosen += [
            filled(module_of(t.name), layer=layer, expert=ANY_NUMBER)
            for layer in layers_of(rule)
            for t in rule.hf
        ]
    others = set(_all_modules(table)) - set(chosen)
    names = []
    for module in chosen:
        names.append(
            next(e for e in endings(module) if not any(other.endswith(e) for other in others))
        )
    return list(dict.fromkeys(names))


def _pattern(values: Mapping[_Target, float], *, default: float) -> dict[str, float]:
    """PEFT's pattern for all values that are not the default."""
    pattern: dict[str, float] = {}
    for value in dict.fromkeys(values.values()):
        others = [target.name for target, other in values.items() if other != value]
        named = [
            target
            for target, other in values.items()
            if other == value and (value != default or not target.has_default)
        ]
        for is_parameter, num_parts in ((False, 1), (True, _PARAMETER_PARTS)):
            alike = [target.name for target in named if target.is_parameter == is_parameter]
            names = _shortest(alike, others, num_parts=num_parts)
            pattern |= dict.fromkeys(names, _number(value))
    return pattern


def _shortest(
    chosen: Iterable[str], others: Iterable[str], *, num_parts: int = 1
) -> dict[str, str]:
    """The shortest ends of names that no other name has, each with one of the names it ends.

    Args:
        chosen: Names to select.
        others: Names that must not be selected.
        num_parts: Least number of parts of an end.
    """
    taken = {end for name in others for end in endings(name)}
    found: dict[str, str] = {}
    for name in chosen:
        ends = [
            end
            for end in endings(name)
            if end.count(".") + 1 >= num_parts and not end.startswith((ANY_NUMBER, *"0123456789"))
        ]
        found.setdefault(next((end for end in ends if end not in taken), name), name)
    return found


def _all_modules(table: WeightTable) -> Iterator[str]:
    """All modules of the class that have weights; the number of an expert is open."""
    for rule in table.rules:
        # A tied output layer is a module of its own, though its weight has another name.
        if not rule.is_duplicate and _is_in_class(rule):
            for layer in layers_of(rule):
                for tensor in rule.hf:
                    yield filled(module_of(tensor.name), layer=layer, expert=ANY_NUMBER)


def _is_in_class(rule: Rule) -> bool:
    """No class of transformers has the layers of multi-token prediction."""
    return rule.place != "mtp"


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> float:
    """A whole number without a point, as PEFT's fields have it."""
    return int(value) if value == int(value) else value
