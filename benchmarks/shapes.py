"""Published model shapes as config.json files, and random checkpoints of them.

`python benchmarks/shapes.py qwen3-4b OUT --tokenizer DIR` writes a bfloat16 checkpoint with the
tensor names of the hub, part by part, so that models larger than memory can be made.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.safetensors_writer import SafetensorsWriter

_QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
}
_QWEN3_8B = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
_QWEN3_30B_A3B = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3_8B,
    # All its parameters fit one card for training.
    "qwen3-8b-18l": {**_QWEN3_8B, "num_hidden_layers": 18},
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "qwen3-30b-a3b-16l": {**_QWEN3_30B_A3B, "num_hidden_layers": 16},
}
# Weights that are made and written together. An expert's are small: one by one, most of the time
# would go into waiting for the copy from the GPU.
_PART_BYTES = 512 * 2**20


def write_checkpoint(
    folder: Path, config: dict[str, Any], *, tokenizer: Path | None = None, seed: int = 0
) -> None:
    """Writes config.json and random bfloat16 weights (standard deviation 0.02, norms one).

    Args:
        folder: Where to; may exist.
        config: What config.json holds.
        tokenizer: Folder with files to copy beside them.
        seed: Of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in () if tokenizer is None else tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = hf_tensors(weight_table(config))
    entries = [(name, "BF16", shape) for name, shape in tensors.items()]
    parts = list(_parts(tensors.values()))
    largest = max(_num_weights(part) for part in parts)
    values = torch.empty(largest, dtype=torch.bfloat16, device=device)
    # A pinned copy is several times faster than one to ordinary memory.
    host = torch.empty(largest, dtype=torch.bfloat16, pin_memory=True) if device == "cuda" else None
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for part in parts:
            filled = _fill(values, part, generator)
            if host is not None:
                filled = host[: filled.numel()].copy_(filled)
            writer.append(filled.view(torch.uint8))


def _parts(shapes: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Neighbours whose weights fit in `_PART_BYTES`; a larger tensor is a part of its own."""
    part: list[tuple[int, ...]] = []
    for shape in shapes:
        if part and 2 * _num_weights([*part, shape]) > _PART_BYTES:
            yield part
            part = []
        part.append(shape)
    yield part


def _num_weights(part: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in part)


def _fill(
    values: torch.Tensor, part: list[tuple[int, ...]], generator: torch.Generator
) -> torch.Tensor:
    """Makes the weights of a part in front of a buffer [num_weights]; returns what is used."""
    used = values[: _num_weights(part)]
    sizes = [math.prod(shape) for shape in part]
    for shape, weights in zip(part, used.split(sizes), strict=True):
        if len(shape) > 1:
            weights.normal_(std=0.02, generator=generator)
        else:
            weights.fill_(1.0)
    return used


def main() -> None:
    """Writes one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="Folder with tokenizer files to copy.")
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, SHAPES[arguments.shape], tokenizer=arguments.tokenizer)


if __name__ == "__main__":
    main()
