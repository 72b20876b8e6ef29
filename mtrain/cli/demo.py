"""`megatron demo`: a tiny Qwen3 checkpoint with a tokenizer, to try mtrain without any download.

Its weights are random. It is made for the embedded `swift/self-cognition` questions and learns
them within a minute on two CPU cores; `examples/shell/quickstart.sh` does that.
"""

import json
from pathlib import Path
from typing import Any

from mtrain.cli.errors import OneLineParser
from mtrain.data.self_cognition import self_cognition_rows

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The last words of the tokenizer: padding, and the ends of a message.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 1200
HEAD_DIM = 32


def run(words: list[str]) -> int:
    """Writes the checkpoint and says where.

    Args:
        words: Words after `megatron demo`.

    Returns:
        Exit code.

    Raises:
        ValueError: A flag is wrong, or the output folder is not empty.
    """
    parser = OneLineParser(
        prog="megatron demo",
        description="Write a tiny random Qwen3 checkpoint with a tokenizer.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder to write.")
    parser.add_argument("--hidden_size", type=int, default=128, help="A multiple of 64.")
    parser.add_argument("--num_layers", type=int, default=4)
    arguments = parser.parse_args(words)
    folder: Path = arguments.output_dir
    config = demo_config(hidden_size=arguments.hidden_size, num_layers=arguments.num_layers)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder}: not an empty folder; choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_model(folder, config)
    print(f"A random Qwen3 with {arguments.num_layers} layers is in {folder}")
    return 0


def demo_config(*, hidden_size: int, num_layers: int) -> dict[str, Any]:
    """config.json of a small Qwen3 with tied embeddings and two heads to a query group.

    Raises:
        ValueError: The sizes make no model.
    """
    if hidden_size < 1 or hidden_size % (2 * HEAD_DIM):
        raise ValueError(f"--hidden_size {hidden_size}: must be a multiple of {2 * HEAD_DIM}")
    if num_layers < 1:
        raise ValueError(f"--num_layers {num_layers}: must be at least 1")
    num_heads = hidden_size // HEAD_DIM
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": VOCAB_SIZE - 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 3 * hidden_size,
        "max_position_embeddings": 2048,
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_heads // 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
    }


def write_tokenizer(folder: Path) -> None:
    """Trains a byte-level tokenizer on the embedded questions and writes its files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = self_cognition_rows(names=["mtrain"], authors=["you"])
    texts = [text for row in rows for text in row.values()]
    tokenizer.train_from_iterator([*texts, "user\nassistant\nsystem\n"], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the texts are too few for so many words"
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json, generation_config.json and random float32 weights, always the same."""
    import torch
    from safetensors.torch import save_file

    from mtrain.bridge.plan import hf_tensors, weight_table

    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * config["initializer_range"]
        for name, shape in hf_tensors(weight_table(config)).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    generation = {"eos_token_id": VOCAB_SIZE - 1, "pad_token_id": VOCAB_SIZE - 3}
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
