"""Published model shapes as config.json files, and random checkpoints of them.

`python benchmarks/shapes.py qwen3-4b OUT --tokenizer DIR` writes a bfloat16 checkpoint with the
tensor names of the hub, tensor by tensor, so that models larger than memory can be made.
"""

import argparse
import json
import shutil
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
}


def write_checkpoint(folder: Path, config: dict[str, Any], *, seed: int = 0) -> None:
    """Writes config.json and random bfloat16 weights (standard deviation 0.02, norms one)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = hf_tensors(weight_table(config))
    entries = [(name, "BF16", shape) for name, shape in tensors.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for shape in tensors.values():
            values = torch.ones(shape, dtype=torch.bfloat16, device=device)
            if len(shape) > 1:
                values.normal_(std=0.02, generator=generator)
            writer.append(values.cpu().flatten().view(torch.uint8))


def main() -> None:
    """Writes one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="Folder with tokenizer files to copy.")
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, SHAPES[arguments.shape])
    if arguments.tokenizer is not None:
        for path in arguments.tokenizer.iterdir():
            shutil.copyfile(path, arguments.folder / path.name)


if __name__ == "__main__":
    main()
