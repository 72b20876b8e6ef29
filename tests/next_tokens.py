"""Tiny checkpoints with a layer of multi-token prediction, and what it computes.

The reference is put together of parts of transformers, also for models that it has no class for:
the layer is the last one of a model that is one layer deeper, cut off and stored under the other
names. The precision test has another judge, transformers' own `MtpModel`; tests/verify compares it
with the reference.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.families import find_family
from tests.tiny import make_checkpoint

# What the deeper model is, where it is another one, and what begins the names of the layer.
_DEEPER: dict[str, dict[str, Any]] = {
    "mimo": {"name": "qwen2"},
    "qwen3_next_moe": {"layer_types": ["linear_attention"] * 3 + ["full_attention"] * 2},
}
NAMES = ("deepseek_v3", "glm4_moe", "qwen3_next_moe", "mimo")


@dataclass(frozen=True, slots=True)
class Reference:
    """A deeper Hugging Face model, and the tensors that join embedding and hidden state."""

    model: torch.nn.Module
    own: dict[str, torch.nn.Parameter]
    hidden_first: bool

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sum of the losses of one document [1, seq], and of those one token further on."""
        body, head = self.model.model, self.model.lm_head
        last = body.layers[-1]
        del body.layers[-1]
        hidden = body(input_ids).last_hidden_state
        body.layers.append(last)
        main = _loss(head(hidden), labels)
        if input_ids.shape[1] < 3:
            return main, main * 0
        shifted = input_ids.roll(-1, dims=-1)
        parts = [self._norm("enorm", body.embed_tokens(shifted)), self._norm("hnorm", hidden)]
        if self.hidden_first:
            parts.reverse()
        joined = torch.cat(parts, dim=-1) @ self.own["eh_proj"].t()
        positions = torch.arange(input_ids.shape[1])[None]
        mask = torch.full((input_ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        output = last(
            joined,
            position_embeddings=body.rotary_emb(joined, positions),
            attention_mask=mask,
            position_ids=positions,
        )
        next_labels = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
        return main, _loss(head(self._norm("final_layernorm", output)), next_labels)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        norm = type(self.model.model.norm)(hidden.shape[-1], eps=1e-6)
        return torch.func.functional_call(norm, {"weight": self.own[name]}, (hidden,))


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[0], labels[0], ignore_index=-100, reduction="sum"
    )


def make_checkpoint_with_next_tokens(
    folder: Path, name: str, **sizes: Any
) -> tuple[Path, Reference]:
    """Writes a checkpoint whose config says that it has one such layer.

    Args:
        folder: Where to, a new folder.
        name: One of `NAMES`.
        **sizes: Changes of the tiny config.
    """
    from transformers import AutoModelForCausalLM

    changes = _DEEPER.get(name, {}) | sizes
    deeper = make_checkpoint(
        folder.with_name(folder.name + "_deeper"),
        changes.pop("name", name),
        num_hidden_layers=5,
        **changes,
    )
    config = json.loads((deeper / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:4]
    if name == "mimo":
        config["model_type"] = "mimo"
    described = find_family(config).weight_table(config, 1)
    names = {
        rule.megatron.split(".")[3]: rule.hf[0].name
        for rule in described.rules
        if rule.place == "mtp" and rule.megatron.count(".") == 4
    }
    (layer_prefix,) = {
        rule.hf[0].name.removesuffix("self_attn.o_proj.weight")
        for rule in described.rules
        if rule.place == "mtp" and rule.hf[0].name.endswith("self_attn.o_proj.weight")
    }
    hidden_size = config["hidden_size"]
    generator = torch.Generator().manual_seed(5)
    own = {
        kind: torch.randn(hidden_size, 2 * hidden_size, generator=generator) * hidden_size**-0.5
        if kind == "eh_proj"
        else 1 + torch.randn(hidden_size, generator=generator) * 0.2
        for kind in names
    }
    tensors = {
        key.replace("model.layers.4.", layer_prefix): tensor
        for key, tensor in load_file(deeper / "model.safetensors").items()
    }
    dtype = tensors["model.norm.weight"].dtype
    tensors |= {names[kind]: tensor.to(dtype) for kind, tensor in own.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(deeper, dtype=torch.float32)
    parameters = {kind: torch.nn.Parameter(tensor.clone()) for kind, tensor in own.items()}
    return folder, Reference(model, parameters, hidden_first=name == "mimo")


def names_left_out(folder: Path) -> list[str]:
    """Patterns for tensors that the class of a checkpoint does not have: those of these layers."""
    config = json.loads((folder / "config.json").read_text())
    return [one.pattern for one in find_family(config).weight_table(config).ignored]


def with_second_layer(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint of `make_checkpoint_with_next_tokens` with one more such layer.

    Args:
        folder: One whose layers of multi-token prediction lie behind the others.
        target: Where to, a new folder.
    """
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    tensors |= {
        key.replace("layers.4.", "layers.5."): tensor * 0.9
        + torch.randn(tensor.shape, generator=generator) * 0.02
        for key, tensor in tensors.items()
        if key.startswith("model.layers.4.")
    }
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    return target
