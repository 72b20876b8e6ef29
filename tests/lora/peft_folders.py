"""Adapter folders and what PEFT makes of them: the judge of the tests of mtrain.lora's format."""

import json
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.rules import layers_of
from mtrain.lora.adapter_file import join_adapter_files
from mtrain.lora.peft_config import adapter_config
from mtrain.lora.plan import (
    AdaptedLinear,
    Adapter,
    LoraPlan,
    adapter_table,
    factor_names,
    kind_of,
)
from tests.megatron import read_config

# Of PEFT's warnings these say nothing about what was written: the first is about parameters, whose
# patterns it uses all the same; the others come with every model that is tied or adapts embeddings.
EXPECTED_WARNINGS = (
    "keys did not match any targeted module and were ignored",
    "Model has `tie_word_embeddings=True`",
    "is deprecated",
)


def table_of(folder):
    return weight_table(read_config(folder))


def hf_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def views_of(model) -> dict[str, torch.Tensor]:
    """Weights by their names in files, where each expert has its own; changing one changes it."""
    views = {}
    for name, tensor in model.state_dict().items():
        container, _, leaf = name.rpartition(".")
        if container.endswith(".experts"):
            for expert, stacked in enumerate(tensor):
                views |= _views_of_expert(model.config.model_type, container, expert, leaf, stacked)
        else:
            views[_in_files(model, name)] = (
                tensor.t() if model.config.model_type == "gpt2" and _is_linear(name) else tensor
            )
    return views


def _in_files(model, name):
    if model.config.model_type == "mixtral":
        return name.replace(".mlp.", ".block_sparse_moe.")
    return name


def _is_linear(name):
    return ".h." in name and ".c_" in name and name.endswith("weight")


def _views_of_expert(model_type, container, expert, leaf, tensor):
    """Projections of one expert, from its part of a stacked parameter."""
    kind = "bias" if leaf.endswith("_bias") else "weight"
    if model_type == "gpt_oss" and kind == "weight":
        tensor = tensor.t()
    if leaf.startswith("down_proj"):
        parts = {"down_proj": tensor}
    elif model_type == "gpt_oss":
        parts = {"gate_proj": tensor[::2], "up_proj": tensor[1::2]}
    else:
        parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True))
    if model_type == "mixtral":
        container = container.replace(".mlp.", ".block_sparse_moe.")
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        parts = {names[name]: part for name, part in parts.items()}
    return {f"{container}.{expert}.{name}.{kind}": part for name, part in parts.items()}


def weights_of(model) -> dict[str, torch.Tensor]:
    """The same as copies."""
    return {name: view.detach().clone() for name, view in views_of(model).items()}


def in_float64(model):
    """The Hugging Face model, its experts one by one: grouped products know no float64."""
    model.set_experts_implementation("eager")
    return model.double()


@torch.no_grad()
def merged_by_hand(folder, changes, *, dtype=torch.float32):
    """The Hugging Face model with changed weights."""
    model = hf_model(folder)
    if dtype == torch.float64:
        model = in_float64(model)
    # An adapter of the embedding does not change an output layer that is tied to it.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    views = views_of(model)
    for name, change in changes.items():
        views[name].add_(change)
    return model


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12)).logits


def save_with_peft(folder, output, *, is_b_random=True, seed=0, **config) -> dict:
    """Saves an adapter with PEFT; returns how it changes the weights it changes, by name."""
    base = hf_model(folder)
    before = weights_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (is_b_random or "lora_B" not in name):
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
        model.save_pretrained(output)
        after = weights_of(model.merge_and_unload())
    changes = {name: after[name] - before[name] for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def changes_of(lora: LoraPlan, source, table, before) -> dict[str, torch.Tensor]:
    """How an adapter changes the weights it changes: scale * B @ A of every projection."""
    changes = {}
    for linear in lora.linears:
        is_embedding = linear.kind == "embedding"
        for layer in linear.layers or (None,):
            for expert in range(linear.rule.num_experts or 1):
                for index in linear.sources:
                    tensor, adapter = linear.rule.hf[index], linear.adapters[index]
                    names = (tensor.name, *factor_names(tensor, is_embedding=is_embedding))
                    name, a_name, b_name = (
                        n.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                        for n in names
                    )
                    delta = adapter.scale * (source(b_name) @ source(a_name))
                    changes[name] = delta.t() if is_embedding else delta
    for name in hf_tensors(
        adapter_table(table, LoraPlan(linears=(), modules_to_save=lora.modules_to_save))
    ):
        plain = name.removeprefix("base_model.model.")
        changes[plain] = source(name) - before[plain]
    return changes


def make_plan(table, choose, *, modules_to_save=()) -> LoraPlan:
    """A plan; `choose(name of a Hugging Face weight, layer)` gives its adapter or None."""
    linears = []
    for rule in table.rules:
        if rule.is_duplicate or kind_of(rule) is None:
            continue
        groups: dict[tuple, list[int]] = {}
        for layer in layers_of(rule):
            adapters = tuple(choose(tensor.name, layer) for tensor in rule.hf)
            if any(adapters):
                groups.setdefault(adapters, []).append(layer)
        linears += [
            AdaptedLinear(
                rule=rule, adapters=adapters, layers=() if layers == [None] else tuple(layers)
            )
            for adapters, layers in groups.items()
        ]
    saved = [r for r in table.rules if any(t.name in modules_to_save for t in r.hf)]
    return LoraPlan(linears=tuple(linears), modules_to_save=tuple(saved))


def uniform_plan(table, *leaves, rank=4, alpha=6.0, use_rslora=False, **options) -> LoraPlan:
    adapter = Adapter(rank=rank, alpha=alpha, use_rslora=use_rslora)
    return make_plan(
        table, lambda name, _: adapter if name.split(".")[-2] in leaves else None, **options
    )


def random_values(lora, table, *, seed=7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_tensors(adapter_table(table, lora))
    return {name: torch.randn(s, generator=generator) * 0.1 for name, s in shapes.items()}


def write_adapter(
    folder: Path, lora, table, values, *, layout="per_expert", dropout=0.0, base=None
) -> Path:
    """Writes an adapter of these values as a run does that ended on two ranks."""
    folder.mkdir(parents=True)
    names = sorted(values)
    parts = []
    for index in range(2):
        parts.append(folder / f"part-{index}.safetensors")
        save_file({name: values[name] for name in names[index::2]}, parts[-1])
    target = folder / "adapter_model.safetensors"
    join_adapter_files(parts, target, lora=lora, table=table, layout=layout)
    for part in parts:
        part.unlink()
    config = adapter_config(lora, table, base=base, layout=layout, dropout=dropout)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load_with_peft(folder, adapter):
    """A PEFT model that was loaded without anything missing, left over or unexpected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = peft.LoraConfig.from_pretrained(str(adapter))
        model = peft.PeftModel(hf_model(folder), config)
        result = model.load_adapter(str(adapter), "default")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    texts = [str(warning.message) for warning in caught]
    assert not [t for t in texts if not any(known in t for known in EXPECTED_WARNINGS)]
    return model
