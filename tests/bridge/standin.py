"""Stand-ins for the bridge's tests: modules with the parameters of a plan, and random checkpoints.

The parameters start as NaN, so that one that was not filled shows.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mtrain.bridge.plan import Plan, hf_tensors, weight_table
from tests.tiny import tiny_config


def make_chunks(plan: Plan, *, num_chunks: int, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Modules whose parameters have the names and shapes of a plan."""
    chunks = [torch.nn.Module() for _ in range(num_chunks)]
    for parameter in plan:
        *path, leaf = parameter.name.split(".")
        module = chunks[parameter.chunk]
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        values = torch.full(parameter.shape, float("nan"), dtype=dtype)
        module.register_parameter(leaf, torch.nn.Parameter(values))
    return chunks


def random_tensors(name: str, *, dtype: torch.dtype = torch.float32, **changes: object):
    """Random Hugging Face tensors of a tiny model, by name."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator).to(dtype)
        for key, shape in hf_tensors(weight_table(tiny_config(name, **changes))).items()
    }


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], *, num_files: int = 1) -> Path:
    """Writes tensors as a single file or as shards, in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {key: f"{i % num_files}.safetensors" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
