"""Model chunks wrapped for training: half precision and data parallelism.

The one thing to know: the loss is divided by the tokens of the whole global batch before backward
(see `mtrain.training.step`), so Megatron-Core's own per-token scaling stays off and its gradient
reduction is a plain mean over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer

from mtrain.config.parallel import ParallelConfig, resolve_overlaps
from mtrain.training.data_parallel import DataParallel

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

__all__ = ["gather_parameters", "unwrap", "wrap_chunks"]

_MAX_NAMED_PARAMETERS = 10


def wrap_chunks(
    chunks: Sequence[GPTModel],
    *,
    parallel: ParallelConfig,
    grad_reduce_in_fp32: bool,
) -> list[DataParallel]:
    """Wraps loaded chunks; their parameters move into contiguous buffers.

    Args:
        chunks: Bare chunks with their weights loaded and `requires_grad` decided.
        parallel: The communication settings.
        grad_reduce_in_fp32: Accumulate and reduce gradients in float32.

    Raises:
        ValueError: `overlap_param_gather` without what it needs.
    """
    config = chunks[0].config
    assert not config.calculate_per_token_loss, "the step divides by tokens, not Megatron-Core"
    parallel = resolve_overlaps(parallel, num_ranks=_num_data_parallel_ranks(config))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grad_reduce_in_fp32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # Then the schedule starts all gathers, which only that of virtual stages does. Otherwise
        # each bucket starts the gather of the next one.
        align_param_gather=parallel.align_param_gather and len(chunks) > 1,
    )
    is_half = config.bf16 or config.fp16
    wrapped = [
        DataParallel(
            config=config,
            ddp_config=ddp_config,
            module=_in_half_precision(config, chunk) if is_half else chunk,
            # The reduction of a later chunk overlaps with the backward of the one before it.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    if ddp_config.overlap_param_gather:
        for chunk in wrapped:
            _wait_where_parameters_are_read(chunk)
    _connect_schedule(wrapped, ddp_config)
    return wrapped


def _num_data_parallel_ranks(config: TransformerConfig) -> int:
    """Ranks that share gradients: those of the experts, if there are any, or of the rest.

    Asked of Megatron-Core, whose wrapper reduces over these groups.
    """
    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if config.num_moe_experts is None:
        return dense
    return max(dense, parallel_state.get_expert_data_parallel_world_size())


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


def _wait_where_parameters_are_read(chunk: DataParallel) -> None:
    """Corrects which modules wait for parameters that are still being gathered.

    Megatron-Core lets every module wait for its own parameters before it is called. Most have none
    that are trained, and asking costs the host time in every forward pass. And shared experts that
    overlap with the token exchange are never called: only their parts are, and their gate is none.
    """
    for module, handle in chunk.remove_forward_pre_hook_handles.items():
        if chunk.param_to_bucket_group.keys().isdisjoint(module.parameters(recurse=False)):
            handle.remove()
    for layer in chunk.modules():
        if isinstance(layer, MoELayer) and layer.shared_experts and layer.shared_expert_overlap:
            layer.register_forward_pre_hook(
                lambda layer, _inputs: chunk.wait_for_parameters([layer.shared_experts])
            )


def _connect_schedule(
    chunks: list[DataParallel], ddp_config: DistributedDataParallelConfig
) -> None:
    """Tells the pipeline schedule how gradients and parameters are synchronised.

    Source: `megatron.training.training.train` sets the same fields of the model configuration.
    """
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.finalize_model_grads_func = _finalize_gradients
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        start_grad_sync = [chunk.start_grad_sync for chunk in chunks]
        config.grad_sync_func = start_grad_sync if len(chunks) > 1 else start_grad_sync[0]
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]


def _finalize_gradients(
    chunks: Sequence[DistributedDataParallel], *args: Any, **kwargs: Any
) -> None:
    """Megatron-Core's, which would stop without a reason where a gradient is missing.

    Raises:
        RuntimeError: Naming the parameters that got none, although a reduction waits for it.
    """
    names = [name for chunk in chunks for name in _without_gradient(chunk)]
    if names:
        more = len(names) - _MAX_NAMED_PARAMETERS
        raise RuntimeError(
            f"no gradient came for {', '.join(names[:_MAX_NAMED_PARAMETERS])}"
            + (f" and {more} more" if more > 0 else "")
            + ": freeze what is not trained, or use --overlap_grad_reduce false"
        )
    finalize_model_grads(chunks, *args, **kwargs)


def _without_gradient(chunk: DistributedDataParallel) -> Iterator[str]:
    """Names of parameters without which the gradients of their bucket are not reduced."""
    missing = {
        parameter
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        # Where the schedule starts reductions, nobody counts gradients.
        if group.grad_reduce_handle is None
        and (group.per_param_grad_ready_counts or not group.is_first_batch)
        for parameter in group.params - group.per_param_grad_ready_counts.keys()
    }
    return (name for name, value in unwrap(chunk).named_parameters() if value in missing)


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
