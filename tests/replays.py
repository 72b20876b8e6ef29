"""Training with layers that are replayed beside training with layers as they are."""

from pathlib import Path

import torch

from mtrain.config import MoEConfig, OptimizerConfig, ParallelConfig
from mtrain.model.build import fuse_weight_gradients
from mtrain.model.replay import replay_layers
from mtrain.parallel import ParallelState
from mtrain.platform.cuda_graphs import Record
from mtrain.training.optimizer import build_optimizer, build_scheduler
from mtrain.training.random_state import reseed
from mtrain.training.step import train_step
from mtrain.training.wrap import gather_parameters, unwrap
from tests.adapters import attached
from tests.megatron import load_model
from tests.test_overlap import wrapped
from tests.training.rig import documents, packed

STEPS = 4
# One pack has more documents than fit the fewest that recordings are made for.
GROUPS = ([3, 5], [70, 2], [4, 4], [66, 3])
LENGTH = 256
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_decay_style="constant")


def micro_batches(step: int, *, rank: int) -> list:
    """Two packs of one length; there is padding, which is a document of its own."""
    made = []
    for index, count in enumerate(GROUPS[step]):
        seed = 1000 * rank + 10 * step + index
        if count > 10:
            group = [documents(1, shortest=3, seed=seed + number)[0] for number in range(count)]
        else:
            group = documents(count, shortest=20, seed=seed)
        made.append(packed(group, length=LENGTH))
    return made


def train(
    state: ParallelState,
    folder: Path,
    record: Record | None,
    *,
    lora=None,
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    dropout: float = 0.0,
    num_next_tokens: int = 0,
    overlaps: bool = False,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and buffers after some steps, and the summed losses and gradient norms of the steps.

    Args:
        state: A data-parallel rank.
        folder: A checkpoint.
        record: What replays record with; None: layers as they are.
        lora: Plan of an adapter; None trains everything.
        dtype: Of the model.
        backend: See `build_model`.
        dropout: Of the adapter.
        num_next_tokens: Layers of multi-token prediction.
        overlaps: Whether communication overlaps, with a bucket for every parameter and segments of
            one layer.
    """
    reseed(1)
    moe = MoEConfig(
        moe_aux_loss_coeff=(0.01,),
        moe_z_loss_coeff=0.001,
        # Biases that choose experts belong to the model, which an adapter leaves as it is.
        moe_router_bias_update_rate=0.01 if lora is None else 0.0,
    )
    options = {"dtype": dtype, "backend": backend, "moe": moe, "num_next_tokens": num_next_tokens}
    if lora is None:
        [model] = load_model(state, folder, **options)
        if not overlaps:
            # First of all, and no micro-batch uses it. A reduction would wait for its gradient.
            unused = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype, device=state.device))
            unused.can_overwrite_main_grad = True
            model.decoder.layers[0].register_parameter("unused", unused)
        fuse_weight_gradients([model])
    else:
        [model] = attached(state, folder, lora, dropout=dropout, **options)
    parallel = ParallelConfig() if overlaps else ParallelConfig(overlap_grad_reduce=False)
    [chunk] = wrapped([model], parallel, splits=overlaps)
    assert chunk.overlaps is overlaps
    if record is not None:
        replay_layers(model, record, chunk, segment_length=1)
        # A graph calls no module, so none may have to wait by itself.
        for module in model.decoder.modules():
            module._forward_pre_hooks.clear()
    optimizer = build_optimizer([chunk], OPTIMIZER)
    scheduler = build_scheduler(optimizer, OPTIMIZER, total_steps=STEPS)
    numbers = []
    for step in range(STEPS):
        batches = micro_batches(step, rank=state.rank)
        result = train_step([chunk], optimizer, scheduler, batches, state=state, step=step)
        numbers += [*result.sums.tolist(), result.grad_norm]
    gather_parameters([chunk])
    bare = unwrap(chunk)
    tensors = {**dict(bare.named_parameters()), **dict(bare.named_buffers())}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, numbers


def compare(state: ParallelState, folder: Path, record: Record, **options) -> list[str]:
    """Names of what differs with replays; nothing should."""
    expected, expected_numbers = train(state, folder, None, **options)
    found, numbers = train(state, folder, record, **options)
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    if numbers != expected_numbers:
        differing.append(f"losses and gradient norms {numbers} instead of {expected_numbers}")
    return differing
