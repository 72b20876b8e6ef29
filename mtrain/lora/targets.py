"""STAND-IN of the main session so that its tests run: the helper "targets" replaces this whole file."""

from __future__ import annotations

import re

from mtrain.bridge.rules import WeightTable
from mtrain.config.tuner import TunerConfig
from mtrain.lora.plan import AdaptedLinear, Adapter, LoraPlan, module_name


def choose_targets(table: WeightTable, tuner: TunerConfig) -> LoraPlan:
    adapter = Adapter(rank=tuner.lora_rank, alpha=tuner.lora_alpha, use_rslora=tuner.use_rslora)
    linears = []
    for rule in table.rules:
        if rule.is_duplicate or not rule.megatron.endswith(".weight") or len(rule.hf[0].shape) < 2:
            continue
        kind = "all-linear" if re.search(r"linear_\w+\.weight$", rule.megatron) else ""
        kind = "all-router" if "router" in rule.megatron else kind
        kind = "all-embedding" if "word_embeddings" in rule.megatron else kind
        chosen = tuple(
            adapter
            if kind in tuner.target_modules or module_name(t).split(".")[-1] in tuner.target_modules
            else None
            for t in rule.hf
        )
        if any(chosen):
            linears.append(AdaptedLinear(rule=rule, adapters=chosen, layers=rule.layers))
    saved = [
        rule
        for rule in table.rules
        if module_name(rule.hf[0]).split(".")[-1] in tuner.modules_to_save
    ]
    return LoraPlan(linears=tuple(linears), modules_to_save=tuple(saved))
