"""Settings against the model: can its heads, layers and experts be divided like that?

The one thing to know: everything here works on the plain dict of `config.json`, so it can be called
as soon as that file is there, also for a model that was just downloaded. Keys that a family does
not have are not checked; whether a family is supported at all is known by the bridge.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrain.config.model import ModelConfig
from mtrain.config.parallel import ParallelConfig

__all__ = [
    "check_model_folder",
    "check_parallel_sizes",
    "check_precision",
    "read_hf_config",
]

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_model_folder(folder: Path, *, model: ModelConfig, parallel: ParallelConfig) -> None:
    """All checks of a model that is on this disk.

    Raises:
        ValueError: A file is missing, or does not fit the settings or the other files.
    """
    hf_config = read_hf_config(folder)
    check_parallel_sizes(hf_config, parallel)
    check_precision(hf_config, model)
    _check_vocabulary(folder, hf_config)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ValueError: The file is missing or not a JSON object.
    """
    return _read_json(folder / "config.json")


def check_parallel_sizes(hf_config: Mapping[str, Any], parallel: ParallelConfig) -> None:
    """Checks that every parallel size divides what it splits.

    Raises:
        ValueError: Naming the entry of config.json, its value and the flag.
    """
    text_config = hf_config.get("text_config", hf_config)
    num_experts = _num_experts(text_config)
    _check_tensor_parallel(text_config, parallel, has_experts=num_experts > 0)
    _check_experts(text_config, parallel, num_experts=num_experts)
    num_layers = _count(text_config, "num_hidden_layers")
    if num_layers is not None:
        _check_pipeline(num_layers, parallel)


def check_precision(hf_config: Mapping[str, Any], model: ModelConfig) -> None:
    """Checks that the precision of training suits the model.

    Raises:
        ValueError: float16 with experts, whose gradients Megatron-Core scales on their own.
    """
    text_config = hf_config.get("text_config", hf_config)
    of_checkpoint = text_config.get("dtype") or text_config.get("torch_dtype")
    dtype = model.torch_dtype or of_checkpoint
    if dtype == "float16" and _num_experts(text_config):
        raise ValueError("float16 does not work with experts: use --torch_dtype bfloat16")


def _check_vocabulary(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """The embedding has a row for every token of the tokenizer.

    Only a `tokenizer.json` is looked into; other formats are left to transformers.
    """
    vocab_size = _count(hf_config.get("text_config", hf_config), "vocab_size")
    path = folder / "tokenizer.json"
    if vocab_size is None or not path.is_file():
        return
    tokenizer = _read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    added = [token["id"] for token in tokenizer.get("added_tokens", ())]
    # A unigram model lists its pieces; all others map them to ids.
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    largest = max((*ids, *added), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{path}: token id {largest} has no row in the embedding, vocab_size of config.json is "
            f"{vocab_size}: the tokenizer belongs to another model, or the embedding must be grown"
        )


def _num_experts(text_config: Mapping[str, Any]) -> int:
    counts = (_count(text_config, key) for key in _EXPERT_KEYS)
    return next((count for count in counts if count), 0)


def _count(text_config: Mapping[str, Any], name: str) -> int | None:
    """A number of config.json; the families refuse what is none."""
    value = text_config.get(name)
    return value if isinstance(value, int) else None


def _check_tensor_parallel(
    text_config: Mapping[str, Any], parallel: ParallelConfig, *, has_experts: bool
) -> None:
    tp = parallel.tensor_model_parallel_size
    names = ["num_attention_heads"]
    num_groups = _count(text_config, "num_key_value_heads")
    # More ranks than groups: several ranks hold parts of the same group.
    if not num_groups or tp % num_groups:
        names.append("num_key_value_heads")
    if not has_experts or text_config.get("mlp_only_layers"):
        names.append("intermediate_size")
    for name in names:
        _check_divides(text_config, name, size=tp, flag="tensor_model_parallel_size")
    if has_experts and tp > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"a model with experts and --tensor_model_parallel_size {tp} needs "
            "--sequence_parallel true"
        )


def _check_experts(
    text_config: Mapping[str, Any], parallel: ParallelConfig, *, num_experts: int
) -> None:
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if not num_experts:
        for name, size in (("expert_model", ep), ("expert_tensor", etp)):
            if size > 1:
                raise ValueError(f"--{name}_parallel_size {size}: the model has no experts; use 1")
        return
    if num_experts % ep:
        raise ValueError(
            f"{num_experts} experts of the model cannot be divided by "
            f"--expert_model_parallel_size {ep}"
        )
    _check_divides(
        text_config, "moe_intermediate_size", size=etp, flag="expert_tensor_parallel_size"
    )


def _check_divides(text_config: Mapping[str, Any], name: str, *, size: int, flag: str) -> None:
    value = _count(text_config, name)
    if value is not None and value % size:
        raise ValueError(f"{name} {value} of the model cannot be divided by --{flag} {size}")


def _check_pipeline(num_layers: int, parallel: ParallelConfig) -> None:
    """Every stage holds the same number of layers but for the first and the last, if given."""
    num_stages = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    left = num_layers
    spelled = f"{num_layers} layers of the model"
    for name in ("first", "last"):
        flag = f"decoder_{name}_pipeline_num_layers"
        given = getattr(parallel, flag)
        if given is None:
            continue
        if given % vpp:
            raise ValueError(
                f"--{flag} {given} cannot be divided by "
                f"--virtual_pipeline_model_parallel_size {vpp}"
            )
        left, num_stages = left - given, num_stages - 1
        spelled += f", {given} on the {name} stage"
    if num_stages == 0:
        fits = left == 0
    else:
        fits = left >= num_stages * vpp and left % (num_stages * vpp) == 0
    if not fits:
        raise ValueError(
            f"{spelled}: the other {left} cannot be divided by {num_stages} pipeline stages"
            + (f" x {vpp} virtual stages" if vpp > 1 else "")
            + "; see --decoder_first_pipeline_num_layers and --decoder_last_pipeline_num_layers"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: --model must be a Hugging Face checkpoint") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return content
