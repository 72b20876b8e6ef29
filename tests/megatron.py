"""What tests of the whole model share: a tiny checkpoint on the ranks of a layout."""

import json
from pathlib import Path
from typing import Any

import torch

from mtrain.bridge.families import find_family
from mtrain.bridge.load import load_weights
from mtrain.bridge.plan import weight_table
from mtrain.bridge.rules import WeightTable
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.sources import StoredWeights
from mtrain.bridge.storage.stored_as import StoredAs, stored_as
from mtrain.bridge.storage.view import arranged
from mtrain.config import ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from mtrain.model.build import build_model, transformer_config
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelLayout, ParallelState


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint."""
    return json.loads(Path(folder, "config.json").read_text())


def load_model(
    state: ParallelState,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    training: TrainingConfig | None = None,
    moe: MoEConfig | None = None,
    backend: str = "torch",
    weights: StoredWeights | None = None,
    sequence_parallel: bool | None = None,
    num_next_tokens: int = 0,
    fuses_rope: bool = True,
) -> list[LanguageModel]:
    """The chunks of this rank with the weights of a checkpoint, or with others that fit it."""
    hf_config = read_config(folder)
    described = find_family(hf_config).megatron_config(hf_config, num_next_tokens)
    table = weight_table(hf_config, num_next_tokens)
    layout = state.layout
    if sequence_parallel is None:
        sequence_parallel = layout.tp_size > 1
    config = transformer_config(
        described,
        layout,
        model=ModelConfig(),
        parallel=ParallelConfig(sequence_parallel=sequence_parallel),
        training=training or TrainingConfig(),
        moe=moe or MoEConfig(),
        dtype=dtype,
    )
    chunks = build_model(described, config, state, backend=backend, fuses_rope=fuses_rope)
    load_weights(
        chunks,
        weights or arranged(open_checkpoint(folder), table),
        table=table,
        layout=layout,
        rank=state.rank,
    )
    return chunks


def form_of(folder: Path, table: WeightTable) -> StoredAs:
    """How a checkpoint stores its tensors."""
    return stored_as(arranged(open_checkpoint(folder), table), table, keeps_fp8=False)


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model, with tensors on the GPU."""
    return {
        name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()
    }


def losses_and_gradients(
    model: LanguageModel, inputs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of the tokens, and of their sum the gradients of all parameters."""
    losses, _ = model(**inputs)
    losses.sum().backward()
    return losses.detach(), {key: weight.grad for key, weight in model.named_parameters()}


def packed_inputs(lengths: list[int], vocab_size: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random documents of these lengths in one row, as arguments of the model."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    labels = torch.randint(0, vocab_size, (1, total), generator=generator)
    ends = torch.tensor(lengths).cumsum(0)
    labels[0, ends - 1] = -100
    return {
        "input_ids": torch.randint(0, vocab_size, (1, total), generator=generator),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


SINGLE = ParallelLayout()
