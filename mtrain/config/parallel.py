"""How the model and the data are spread over the ranks.

The one thing to know: data parallelism has no flag. Its size is what remains of the world after
tensor, pipeline and context parallelism; expert parallelism divides the same ranks a second time.
"""

import dataclasses
from dataclasses import dataclass

from mtrain.config.fields import flag

__all__ = ["ParallelConfig", "resolve_overlaps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions and how they communicate."""

    tensor_model_parallel_size: int = flag(1, "Ranks that share every matrix (TP).", minimum=1)
    sequence_parallel: bool | None = flag(
        None,
        "Split activations between the matrices over the TP ranks; default: on when TP > 1.",
    )
    pipeline_model_parallel_size: int = flag(1, "Groups of layers, one a stage (PP).", minimum=1)
    virtual_pipeline_model_parallel_size: int | None = flag(
        None, "Model chunks on each pipeline stage (VPP), for a smaller bubble.", minimum=1
    )
    microbatch_group_size_per_vp_stage: int | None = flag(
        None, "Micro-batches in a row on a virtual stage; default: the pipeline size.", minimum=1
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        None, "Layers on the first stage, when they do not divide evenly.", minimum=1
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        None, "Layers on the last stage, when they do not divide evenly.", minimum=1
    )
    account_for_embedding_in_pipeline_split: bool = flag(
        False, "Count the embedding as a layer when layers are spread."
    )
    account_for_loss_in_pipeline_split: bool = flag(
        False, "Count the output layer as a layer when layers are spread."
    )
    pipeline_model_parallel_layout: str | None = flag(None, "Layers of every stage, written out.")
    overlap_p2p_comm: bool = flag(True, "Overlap sends between stages with work (VPP only).")
    batch_p2p_comm: bool | None = flag(None, "Send and receive between stages in one call.")

    expert_model_parallel_size: int = flag(1, "Ranks that share out the experts (EP).", minimum=1)
    expert_tensor_parallel_size: int = flag(
        1, "Ranks that share the matrices of each expert (ETP).", minimum=1
    )
    context_parallel_size: int = flag(1, "Ranks that share every sequence (CP).", minimum=1)
    tp_comm_overlap: bool = flag(False, "Overlap tensor-parallel communication with products.")

    use_distributed_optimizer: bool = flag(
        True, "Share out the optimizer state over the data-parallel ranks."
    )
    use_megatron_fsdp: bool = flag(False, "Share out the parameters as well.")
    overlap_grad_reduce: bool | None = flag(
        None,
        "Overlap the reduction of gradients with backward; default: on with several "
        "data-parallel ranks.",
    )
    overlap_param_gather: bool | None = flag(
        None,
        "Overlap the gathering of parameters with forward; default: on with several data-parallel "
        "ranks, --overlap_grad_reduce and --use_distributed_optimizer.",
    )
    align_param_gather: bool = flag(
        True, "Start parameter gathers of all stages together (VPP only)."
    )

    ddp_timeout: int = flag(
        600, "Seconds a rank waits for the others before it gives up.", minimum=1
    )
    ddp_backend: str | None = flag(
        None, "Communication library; default: nccl on GPUs, gloo on CPU.", choices=("nccl", "gloo")
    )


def resolve_overlaps(parallel: ParallelConfig, *, num_ranks: int) -> ParallelConfig:
    """Decides what of data parallelism's communication overlaps with computation.

    Afterwards `overlap_grad_reduce` and `overlap_param_gather` are not None. What was given stays.

    Args:
        parallel: The communication settings.
        num_ranks: Ranks that share gradients, of experts or of the rest. With one there is nothing
            to overlap, and what watches for it costs the host time.

    Raises:
        ValueError: `overlap_param_gather` without what it needs.
    """
    reduces, gathers = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if reduces is None:
        reduces = num_ranks > 1 or gathers is True
    if gathers is None:
        gathers = num_ranks > 1 and reduces and parallel.use_distributed_optimizer
    if gathers and not reduces:
        raise ValueError(
            "--overlap_param_gather true needs --overlap_grad_reduce true: drop one of them"
        )
    if gathers and not parallel.use_distributed_optimizer:
        raise ValueError("--overlap_param_gather true needs --use_distributed_optimizer true")
    return dataclasses.replace(parallel, overlap_grad_reduce=reduces, overlap_param_gather=gathers)
