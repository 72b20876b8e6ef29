"""Names that PEFT knows, where files of a model have other ones than its class in transformers.

In the files of Mixtral a layer's router and experts are in `block_sparse_moe`, in the class of
transformers 5 in `mlp`. PEFT names what it saves and looks up as the class does. The one thing to
know: experts one by one are in no class any more, so they always have the names of the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mtrain.bridge.rules import Rule, WeightTable
from mtrain.lora.fused_experts import fused_parameters
from mtrain.lora.plan import PEFT_PREFIX, LoraPlan, module_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Renaming:
    """A module around experts.

    Attributes:
        in_files: Its name in files, with `{layer}` open.
        in_model: Its name in the model of transformers.
    """

    in_files: str
    in_model: str

    def rule_in_model(self, rule: Rule) -> Rule:
        """A rule with the names of the model; experts one by one keep theirs."""
        if rule.num_experts is not None:
            return rule
        start, new = f"{self.in_files}.", f"{self.in_model}."
        renamed = [
            replace(tensor, name=new + tensor.name.removeprefix(start))
            if tensor.name.startswith(start)
            else tensor
            for tensor in rule.hf
        ]
        return replace(rule, hf=tuple(renamed))

    def file_name(self, stored: str) -> str:
        """The name of a stored tensor of an adapter with the module's name in files."""
        start = re.escape(f"{PEFT_PREFIX}{self.in_model}.").replace(r"\{layer\}", r"(\d+)")
        match = re.match(rf"{start}(?!experts\.)", stored)
        if match is None:
            return stored
        new = f"{PEFT_PREFIX}{self.in_files}.".replace("{layer}", match[1])
        return new + stored[match.end() :]


def renaming(table: WeightTable) -> Renaming | None:
    """What transformers calls otherwise; None where it has the names of the files."""
    for parameter in fused_parameters(table):
        experts, _, _ = parameter.rule.hf[0].name.partition(".{expert}.")
        if experts != parameter.container:
            return Renaming(in_files=module_of(experts), in_model=module_of(parameter.container))
    return None


def table_in_model(table: WeightTable) -> WeightTable:
    """The weights of a model by the names of its class."""
    renamed = renaming(table)
    if renamed is None:
        return table
    return replace(table, rules=tuple(map(renamed.rule_in_model, table.rules)))


def plan_in_model(lora: LoraPlan, table: WeightTable) -> LoraPlan:
    """An adapter by the names of the model's class.

    Args:
        lora: The adapters.
        table: Weights of the model, by their names in files.
    """
    renamed = renaming(table)
    if renamed is None:
        return lora
    return LoraPlan(
        linears=tuple(
            replace(linear, rule=renamed.rule_in_model(linear.rule)) for linear in lora.linears
        ),
        modules_to_save=tuple(map(renamed.rule_in_model, lora.modules_to_save)),
    )


def file_names(stored: Iterable[str], table: WeightTable) -> dict[str, str]:
    """Stored name -> name with the modules' names in files, where these differ.

    Args:
        stored: Names of the tensors of an adapter, in either spelling.
        table: Weights of the model.
    """
    renamed = renaming(table)
    if renamed is None:
        return {}
    names = {name: renamed.file_name(name) for name in stored}
    return {name: there for name, there in names.items() if name != there}
