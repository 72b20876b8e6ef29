"""Model chunks wrapped for training: half precision and data parallelism.

The one thing to know: the loss is divided by the tokens of the whole global batch before backward
(see `mtrain.training.step`), so Megatron-Core's own per-token scaling stays off and its gradient
reduction is a plain mean over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module

from mtrain.config.parallel import ParallelConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

__all__ = ["gather_parameters", "unwrap", "wrap_chunks"]


def wrap_chunks(
    chunks: Sequence[GPTModel],
    *,
    parallel: ParallelConfig,
    grad_reduce_in_fp32: bool,
) -> list[DistributedDataParallel]:
    """Wraps loaded chunks; their parameters move into contiguous buffers.

    Args:
        chunks: Bare chunks with their weights loaded and `requires_grad` decided.
        parallel: The communication settings.
        grad_reduce_in_fp32: Accumulate and reduce gradients in float32.

    Raises:
        ValueError: `overlap_param_gather` without what it needs.
    """
    if parallel.overlap_param_gather and not (
        parallel.overlap_grad_reduce and parallel.use_distributed_optimizer
    ):
        raise ValueError(
            "--overlap_param_gather true needs --overlap_grad_reduce true and "
            "--use_distributed_optimizer true"
        )
    config = chunks[0].config
    assert not config.calculate_per_token_loss, "the step divides by tokens, not Megatron-Core"
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.align_param_gather,
    )
    is_half = config.bf16 or config.fp16
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=_in_half_precision(config, chunk) if is_half else chunk,
            # The reduction of a later chunk overlaps with the backward of the one before it.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    _connect_schedule(wrapped, parallel)
    return wrapped


def _in_half_precision(config: TransformerConfig, chunk: GPTModel) -> Float16Module:
    """The chunk with inputs and outputs converted; parameters have their dtype already.

    Buffers keep theirs: Megatron-Core would round the biases that choose experts, and count tokens
    in half precision.
    """
    kept = [
        (module, name, buffer)
        for module in chunk.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    wrapped = Float16Module(config, chunk)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return wrapped


def _connect_schedule(chunks: list[DistributedDataParallel], parallel: ParallelConfig) -> None:
    """Tells the pipeline schedule how gradients and parameters are synchronised.

    Source: `megatron.training.training.train` sets the same fields of the model configuration.
    """
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        start_grad_sync = [chunk.start_grad_sync for chunk in chunks]
        config.grad_sync_func = start_grad_sync if len(chunks) > 1 else start_grad_sync[0]
    if parallel.overlap_param_gather and parallel.align_param_gather:
        start_param_sync = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = start_param_sync if len(chunks) > 1 else start_param_sync[0]


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Completes parameters that the next forward would have gathered, before they are read.

    Only `overlap_param_gather` leaves a rank with the slices that it updated itself.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrap(chunk: DistributedDataParallel) -> GPTModel:
    """The bare model in a wrapped chunk."""
    module = chunk.module
    return module.module if isinstance(module, Float16Module) else module
