"""A training step in transformers and PEFT that ours is compared with, for a process of its own.

What a user of both would write: SDPA attention, the model's own loss, `clip_grad_norm_`, torch's
fused AdamW; weights in float32, computing in float32 or in torch's autocast to bfloat16. The
process never imports Megatron-Core, so nothing of torch is replaced in it.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

LR = 1e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
# The same for `megatron sft`. Both leave norms and biases undecayed.
SFT_FLAGS = {
    "lr": LR,
    "lr_decay_style": "constant",
    "weight_decay": WEIGHT_DECAY,
    "adam_beta1": BETAS[0],
    "adam_beta2": BETAS[1],
    "clip_grad": CLIP,
}


@dataclass(frozen=True, slots=True)
class Timing:
    """One step: seconds, seconds of all threads, loss, gradient norm before clipping."""

    wall: float
    cpu: float
    loss: float
    grad_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        model: Checkpoint folder.
        adapter: Where the fresh adapter is written; None trains all weights.
        layout: How batches are given: "rows" and "pack" as they come, "padded" a document a row.
        threads: Of torch.
        lr: Learning rate of all steps.
        device: "cpu" or "cuda".
        dtype: What the model computes in: "float32", or "bfloat16" by autocast.
    """

    model: Path
    adapter: Path | None
    layout: str
    threads: int
    lr: float = LR
    device: str = "cpu"
    dtype: str = "float32"


class Trainer:
    """Model and optimizer.

    Raises:
        RuntimeError: This transformers lets the documents of a pack see each other.
    """

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        self._settings = settings
        self._model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, attn_implementation="sdpa"
        ).to(settings.device)
        if settings.adapter is not None:
            self._model = _with_adapter(self._model, settings.adapter)
        if settings.layout == "pack":
            _check_documents_are_apart(self._model, settings.device)
        if settings.device == "cuda":
            _make_room(self._model)
        self._model.train()
        self._trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in self._trained if weight.dim() > 1]},
            {
                "params": [weight for weight in self._trained if weight.dim() == 1],
                "weight_decay": 0,
            },
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def step(self, batches: Sequence[dict[str, Any]]) -> Timing:
        """Trains on the micro-batches of one step; every token with a label counts the same."""
        layout = _padded if self._settings.layout == "padded" else _as_it_comes
        inputs = [layout(batch) for batch in batches]
        num_labels = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        wall, cpu = time.perf_counter(), time.process_time()
        self._optimizer.zero_grad()
        loss = sum(self._differentiate(micro_batch, num_labels) for micro_batch in inputs)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, CLIP)
        self._optimizer.step()
        values = (loss.item(), norm.item())
        return Timing(time.perf_counter() - wall, time.process_time() - cpu, *values)

    def _differentiate(self, inputs: dict[str, torch.Tensor], num_labels: int) -> torch.Tensor:
        """Adds the gradients of a micro-batch; returns its part of the loss."""
        device = self._settings.device
        inputs = {name: values.to(device) for name, values in inputs.items()}
        is_half = self._settings.dtype == "bfloat16"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=is_half):
            loss = self._model(**inputs, num_items_in_batch=num_labels, use_cache=False).loss
        loss.backward()
        return loss.detach()


def _check_documents_are_apart(model: torch.nn.Module, device: str) -> None:
    """The positions, which begin anew, are all that transformers is told of a pack."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    packs = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 5, 6]], device=device)
    with torch.no_grad():
        one, other = (
            model(input_ids=pack[None], position_ids=positions, use_cache=False).logits[0, 3:]
            for pack in packs
        )
    if not torch.equal(one, other):
        raise RuntimeError("this transformers lets the documents of a pack see each other")


def _make_room(model: torch.nn.Module) -> None:
    """Recomputes layers, for the logits of a whole pack; the numbers stay the same."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Its gradients of packs were wrong in torch 2.11 (docs/benchmarks.md).
    torch.backends.cuda.enable_cudnn_sdp(False)


def _with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    adapted = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder)
    return adapted


def _as_it_comes(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The batch; labels are shifted already, which the loss is told by their name."""
    labels = torch.from_numpy(batch["labels"])
    inputs = {"input_ids": torch.from_numpy(batch["input_ids"])}
    if batch["cu_seqlens"] is not None:
        inputs["position_ids"] = torch.from_numpy(batch["position_ids"])
    return {**inputs, "labels": labels, "shift_labels": labels}


def _padded(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The documents of a pack that have labels, one a row."""
    (ids,), (labels,), ends = batch["input_ids"], batch["labels"], batch["cu_seqlens"]
    documents = [slice(start, end) for start, end in itertools.pairwise(ends)]
    documents = [document for document in documents if (labels[document] >= 0).any()]
    longest = max(document.stop - document.start for document in documents)

    def rows(values: np.ndarray, padding: int) -> torch.Tensor:
        filled = np.full((len(documents), longest), padding, dtype=np.int64)
        for row, document in zip(filled, documents, strict=True):
            row[: document.stop - document.start] = values[document]
        return torch.from_numpy(filled)

    padded_labels = rows(labels, -100)
    return {
        "input_ids": rows(ids, 0),
        "attention_mask": rows(np.ones_like(ids), 0),
        "labels": padded_labels,
        "shift_labels": padded_labels,
    }


_trainers: list[Trainer] = []


def start(settings: Settings) -> None:
    """Makes the trainer of this process."""
    _trainers[:] = [Trainer(settings)]


def is_ready() -> bool:
    """Whether it has one."""
    return bool(_trainers)


def step(batches: Sequence[dict[str, Any]]) -> Timing:
    """One step of it."""
    return _trainers[0].step(batches)
