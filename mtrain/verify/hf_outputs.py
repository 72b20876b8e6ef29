"""Runs the Hugging Face model, the judge of the precision test, on the same texts.

The one thing to know: it is transformers' own class, loaded from the files without any code of
ours, and refused when a weight is missing or left over.
"""

import gc
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

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


@torch.no_grad()
def hf_outputs(
    folder: Path,
    texts: Sequence[TokenText],
    *,
    adapter_folder: Path | None = None,
    dtype: torch.dtype,
    stored_dtype: torch.dtype | None = None,
    left_out: Sequence[str] = (),
    device: torch.device,
) -> list[ModelOutputs]:
    """What the Hugging Face model makes of each text; the model is gone afterwards.

    Args:
        folder: A checkpoint.
        texts: One row each.
        adapter_folder: A PEFT adapter to put on it.
        dtype: Dtype of weights and activations.
        stored_dtype: Dtype that weights are rounded to first, as those of the other model were.
        left_out: Patterns for the names of weights that the class does not have.
        device: Where to run it; the whole model must fit there.

    Raises:
        ValueError: A weight of the model or of the adapter is missing or left over.
    """
    model = _load_model(folder, stored_dtype or dtype, left_out)
    model = _converted(model, dtype, device).eval()
    layers = _decoder_layers(model)
    adapted = model if adapter_folder is None else _attach_adapter(model, adapter_folder).eval()
    hidden_states: dict[int, torch.Tensor] = {}
    margins: dict[int, torch.Tensor] = {}

    outputs = []
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            keep = _keep_hidden_states(hidden_states, index)
            hooks.callback(layer.register_forward_hook(keep).remove)
            for router in _routers(layer):
                keep = _keep_margins(margins, index)
                hooks.callback(router.register_forward_hook(keep).remove)
        for text in texts:
            logits = adapted(text.input_ids[None].to(device), use_cache=False).logits
            no_router = torch.full([len(text.input_ids)], torch.inf)
            outputs.append(
                ModelOutputs(
                    hidden_states=torch.stack([hidden_states[i] for i in range(len(layers))]),
                    logits=logits[0].float().cpu(),
                    router_margins=torch.stack(
                        [margins.get(i, no_router) for i in range(len(layers))]
                    ),
                )
            )
    del model, layers, adapted
    # PEFT's modules know each other in circles.
    gc.collect()
    torch.cuda.empty_cache()
    return outputs


def _converted(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model elsewhere and in another dtype, but for biases that choose experts."""
    kept = [(router, router.e_score_correction_bias) for router in _biased_routers(model)]
    model = model.to(device, dtype)
    for router, bias in kept:
        router.e_score_correction_bias = bias.to(device)
    return model


def _biased_routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "e_score_correction_bias" in module._buffers]


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if model.config.model_type == "gpt2" else decoder.layers


def _keep_hidden_states(found: dict[int, torch.Tensor], index: int) -> Callable[..., None]:
    def keep(_layer: object, _inputs: object, output: torch.Tensor) -> None:
        # Some layers return a tuple, and some a batch.
        hidden = output[0] if isinstance(output, tuple) else output
        found[index] = hidden.squeeze(0).to("cpu", torch.float32, copy=True)

    return keep


def _keep_margins(found: dict[int, torch.Tensor], index: int) -> Callable[..., None]:
    def keep(router: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        # Routers of transformers 5 return their logits [tokens, experts] first.
        scores = output[0].to("cpu", torch.float32)
        bias = router._buffers.get("e_score_correction_bias")
        if bias is not None:
            scores = scores.sigmoid() + bias.to("cpu", torch.float32)
        margins = router_margins(scores, router.top_k)
        num_groups = getattr(router, "num_group", None) or 1
        if num_groups > 1:
            # Either the choice of groups is near a tie, or that of experts in them.
            best = scores.view(len(scores), num_groups, -1).topk(1 if bias is None else 2).values
            margins = router_margins(best.sum(-1), router.topk_group)
            margins = margins.minimum(_margins_in_groups(scores, output[2].cpu(), num_groups))
        found[index] = margins

    return keep


def _routers(layer: nn.Module) -> list[nn.Module]:
    """The router of a decoder layer, or none: what has both a weight and a number to choose.

    Source: `Qwen3MoeTopKRouter` in transformers; routers of other families look the same.
    """
    routers = [
        module
        for module in layer.modules()
        if hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    assert len(routers) <= 1, "a decoder layer has one router"
    return routers


def router_margins(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How far each token is from a choice of other experts.

    Args:
        logits: float32 [tokens, experts] of a router.
        top_k: Experts of a token.

    Returns:
        [tokens], what lies between the lowest logit that was chosen and the highest that was not,
        relative to the largest number among the token's logits; infinite where all are chosen.
    """
    if top_k >= logits.shape[-1]:
        return torch.full(logits.shape[:1], torch.inf)
    best = logits.topk(top_k + 1, dim=-1).values
    largest = logits.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (best[:, -2] - best[:, -1]) / largest


def _margins_in_groups(scores: torch.Tensor, chosen: torch.Tensor, num_groups: int) -> torch.Tensor:
    """As `router_margins`, of the groups that a token's experts are in.

    Args:
        scores: float32 [tokens, experts].
        chosen: int64 [tokens, top_k], the experts of each token.
        num_groups: Groups of experts.
    """
    group_size = scores.shape[1] // num_groups
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    has_chosen = is_chosen.view(len(scores), num_groups, group_size).any(-1)
    is_near = has_chosen.repeat_interleave(group_size, dim=1) & ~is_chosen
    lowest = scores.masked_fill(~is_chosen, torch.inf).amin(-1)
    highest = scores.masked_fill(~is_near, -torch.inf).amax(-1)
    return (lowest - highest) / scores.abs().amax(-1)


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
    surplus = [
        key
        for key in found["unexpected_keys"]
        if not any(re.fullmatch(pattern, key) for pattern in left_out)
    ]
    _refuse(folder, missing=found["missing_keys"], surplus=surplus)
    return model


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


def _attach_adapter(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        # They guess at what does not fit; here the keys say it.
        warnings.simplefilter("ignore")
        config = peft.LoraConfig.from_pretrained(str(folder))
        adapted = peft.PeftModel(model, config)
        # What `PeftModel.from_pretrained` does, but it returns the keys.
        found = adapted.load_adapter(str(folder), adapted.active_adapter)
    missing = [name for name in found.missing_keys if "lora_" in name]
    _refuse(folder, missing=missing, surplus=found.unexpected_keys)
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
