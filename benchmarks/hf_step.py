"""The training step of `cpu_step.py` in transformers and PEFT, for a process of its own.

What a user of both would write: SDPA attention, the model's own loss, `clip_grad_norm_`, torch's
fused AdamW. The process never imports Megatron-Core, so nothing of torch is replaced in it.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

LR = 1e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0


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
    """

    model: Path
    adapter: Path | None
    layout: str
    threads: int


class Trainer:
    """Model and optimizer."""

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        self._layout = settings.layout
        self._model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, attn_implementation="sdpa"
        )
        if settings.adapter is not None:
            self._model = _with_adapter(self._model, settings.adapter)
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
            lr=LR,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def step(self, batch: dict[str, Any]) -> Timing:
        """Trains on one batch."""
        inputs = _padded(batch) if self._layout == "padded" else _as_it_comes(batch)
        wall, cpu = time.perf_counter(), time.process_time()
        self._optimizer.zero_grad()
        loss = self._model(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, CLIP)
        self._optimizer.step()
        values = (loss.item(), norm.item())
        return Timing(time.perf_counter() - wall, time.process_time() - cpu, *values)


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


def step(batch: dict[str, Any]) -> Timing:
    """One step of it."""
    return _trainers[0].step(batch)
