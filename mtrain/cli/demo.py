"""`megatron demo`: a tiny Qwen3 checkpoint with a tokenizer, to try mtrain without any download.

Its weights are random. It is made for the embedded `swift/self-cognition` questions and learns
them in a minute on two CPU cores; `examples/shell/quickstart.sh` does that.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mtrain.data.self_cognition import self_cognition_rows

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def run(argv: list[str]) -> int:
    """Writes the checkpoint and says where.

    Args:
        argv: Arguments after `megatron demo`.

    Raises:
        ValueError: The output folder exists and is not empty.
    """
    parser = argparse.ArgumentParser(
        prog="megatron demo", description="Write a tiny random Qwen3 checkpoint with a tokenizer."
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder to write.")
    parser.add_argument("--hidden_size", type=int, default=128, help="Multiple of 32.")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=1200, help="Words of the tokenizer.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.output_dir
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder}: the folder is not empty; choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, vocab_size=arguments.vocab_size)
    config = demo_config(
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        vocab_size=vocab_size,
    )
    write_model(folder, config, seed=arguments.seed)
    print(f"A random Qwen3 with {arguments.num_layers} layers is in {folder}")
    return 0


def demo_config(*, hidden_size: int, num_layers: int, vocab_size: int) -> dict[str, Any]:
    """config.json of a small Qwen3 with tied embeddings."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": vocab_size - 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 3 * hidden_size,
        "max_position_embeddings": 2048,
        "num_attention_heads": hidden_size // 32,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": max(1, hidden_size // 64),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab_size,
    }


def write_tokenizer(folder: Path, *, vocab_size: int) -> int:
    """Trains a byte-level tokenizer on the embedded questions and writes its files.

    Returns:
        Its number of words, special tokens included; they come last, `<|im_end|>` the very last.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = self_cognition_rows(names=["mtrain"], authors=["you"])
    texts = [text for row in rows for text in row.values()]
    tokenizer.train_from_iterator([*texts, "user\nassistant\nsystem\n"], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer.get_vocab_size()


def write_model(folder: Path, config: dict[str, Any], *, seed: int) -> None:
    """Writes config.json, generation_config.json and random float32 weights."""
    import torch
    from safetensors.torch import save_file

    from mtrain.bridge.plan import hf_tensors, weight_table

    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * config["initializer_range"]
        for name, shape in hf_tensors(weight_table(config)).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    eos = config["eos_token_id"]
    _write_json(folder / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos - 2})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
