"""Runs the Hugging Face model, the judge of the precision test, on the same texts.

The one thing to know: it is transformers' own class, loaded from the files without any code of
ours, and refused when a weight is missing or left over.
"""

import dataclasses
import gc
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from mtrain.verify.hf_next_tokens import load_next_tokens, next_token_outputs
from mtrain.verify.layer_records import recorded
from mtrain.verify.precision import ModelOutputs
from mtrain.verify.texts import TokenText

_MAX_NAMED_KEYS = 10
_ACTIVATION_BYTES = 4 * 2**30


def judge_device(folder: Path, *, dtype: torch.dtype, device: torch.device) -> torch.device:
    """Where the Hugging Face model can run: on a GPU if all of it has room there, else on the CPU.

    Args:
        folder: A checkpoint.
        dtype: Dtype of weights and activations.
        device: The device of this rank, which holds its part of the Megatron model already.
    """
    if device.type == "cpu":
        return device
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # Files are of half precision, unless they are larger than what they are loaded to.
    needed = file_bytes * max(1, dtype.itemsize // 2) + _ACTIVATION_BYTES
    return device if needed <= free_bytes else torch.device("cpu")


def check_class(model_type: str) -> None:
    """Makes sure that there is a judge.

    Args:
        model_type: As in config.json.

    Raises:
        ValueError: transformers has no class for such a model.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"--test_convert_precision: transformers has no class for model type {model_type!r}, "
            "so neither its layers nor its multi-token prediction can be compared; leave it out"
        )


@torch.no_grad()
def hf_outputs(
    folder: Path,
    texts: Sequence[TokenText],
    *,
    adapter_folder: Path | None = None,
    dtype: torch.dtype,
    stored_dtype: torch.dtype | None = None,
    left_out: Sequence[str] = (),
    num_next_tokens: int = 0,
    device: torch.device,
) -> list[ModelOutputs]:
    """What the Hugging Face model makes of each text; the model is gone afterwards.

    Args:
        folder: A checkpoint.
        texts: One row each.
        adapter_folder: A PEFT adapter to put on it.
        dtype: Dtype of weights and activations.
        stored_dtype: Dtype that weights are rounded to first, as those of the other model were.
        left_out: Patterns for the names of weights that the class does not have, nor PEFT on it.
        num_next_tokens: Layers of multi-token prediction to run behind it.
        device: Where to run it; the whole model must fit there.

    Raises:
        ValueError: A weight of the model or of the adapter is missing or left over.
        RuntimeError: A weight of multi-token prediction is missing.
    """
    stored_dtype = stored_dtype or dtype
    model = _load_model(folder, stored_dtype, left_out)
    next_tokens = None
    if num_next_tokens:
        next_tokens = load_next_tokens(model, num_next_tokens)
        next_tokens = _converted(next_tokens, stored_dtype, torch.device("cpu"))
        next_tokens = _converted(next_tokens, dtype, device).eval()
    model = adapted = _converted(model, dtype, device).eval()
    if adapter_folder is not None:
        adapted = _attach_adapter(model, adapter_folder, left_out).eval()
    if next_tokens is not None:
        # Where the adapter has changed embedding or head.
        next_tokens.tie_with_main_model(model)
    outputs = []
    with recorded(_decoder_layers(model)) as records, _last_hidden_states(model) as last:
        for text in texts:
            input_ids = text.input_ids[None].to(device)
            logits = adapted(input_ids, use_cache=False).logits
            found = ModelOutputs(
                hidden_states=records.hidden_states(),
                logits=logits[0].float().cpu(),
                router_margins=records.router_margins(),
            )
            if next_tokens is not None:
                further = next_token_outputs(next_tokens, input_ids, last[0])
                found = dataclasses.replace(found, next_tokens=further)
            outputs.append(found)
    del model, adapted, next_tokens
    # PEFT's modules know each other in circles.
    gc.collect()
    torch.cuda.empty_cache()
    return outputs


@contextmanager
def _last_hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """One tensor [1, seq, hidden], what the decoder gave last, behind its last norm."""
    found: list[torch.Tensor] = []

    def keep(_decoder: object, _inputs: object, output: ModelOutput) -> None:
        found[:] = [output.last_hidden_state]

    hook = model.get_decoder().register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _converted(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model elsewhere and its weights in another dtype.

    Buffers keep theirs: rotary frequencies and biases that choose experts are of float32.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    model = model.to(device, dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(device)
    return model


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if model.config.model_type == "gpt2" else decoder.layers


def _load_model(folder: Path, dtype: torch.dtype, left_out: Sequence[str]) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **_without_quantization(folder),
    )
    surplus = [key for key in found["unexpected_keys"] if not _is_left_out(key, left_out)]
    _refuse(folder, missing=found["missing_keys"], surplus=surplus)
    return model


def _is_left_out(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _without_quantization(folder: Path) -> dict[str, Any]:
    """What makes transformers load quantised weights in the dtype that is asked for.

    Without a GPU it does so by itself.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # Only the configs of quantised models have it.
    settings = vars(config).get("quantization_config") or {}
    method, kept = settings.get("quant_method"), settings.get("modules_to_not_convert")
    if method == "fp8":
        return {
            "quantization_config": FineGrainedFP8Config(
                dequantize=True, modules_to_not_convert=kept
            )
        }
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True, modules_to_not_convert=kept)}
    return {}


def _attach_adapter(
    model: PreTrainedModel, folder: Path, left_out: Sequence[str]
) -> peft.PeftModel:
    with warnings.catch_warnings():
        # They guess at what does not fit; here the keys say it.
        warnings.simplefilter("ignore")
        config = peft.LoraConfig.from_pretrained(str(folder))
        adapted = peft.PeftModel(model, config)
        # What `PeftModel.from_pretrained` does, but it returns the keys.
        found = adapted.load_adapter(str(folder), adapted.active_adapter)
    missing = [name for name in found.missing_keys if "lora_" in name]
    surplus = [
        name
        for name in found.unexpected_keys
        if not _is_left_out(name.removeprefix("base_model.model."), left_out)
    ]
    _refuse(folder, missing=missing, surplus=surplus)
    return adapted


def _refuse(folder: Path, *, missing: Sequence[str], surplus: Sequence[str]) -> None:
    if missing or surplus:
        names = [
            *(f"missing {name}" for name in sorted(missing)),
            *(f"left over {name}" for name in sorted(surplus)),
        ]
        raise ValueError(
            f"{folder}: {len(names)} weights do not fit the Hugging Face class: "
            + ", ".join(names[:_MAX_NAMED_KEYS])
        )
