"""Combinations of settings that cannot work, found before anything is started.

The one thing to know: every check raises a ValueError of one line that names the flags and what to
do. Nothing here needs the model; `mtrain.config.model_checks` compares with its config.json, and
`mtrain.config.path_checks` looks at the disk.
"""

import dataclasses

from mtrain.config.checkpoint import parse_byte_size
from mtrain.config.data import DataConfig, TemplateConfig
from mtrain.config.fields import check_values, spell
from mtrain.config.later import refuse_later_features
from mtrain.config.moe import MoEConfig
from mtrain.config.optimizer import OptimizerConfig
from mtrain.config.parallel import ParallelConfig, resolve_overlaps
from mtrain.config.run import ExportConfig, SftConfig
from mtrain.config.training import TrainingConfig
from mtrain.config.tuner import TunerConfig

__all__ = ["check_export", "check_sft", "why_not_recorded"]


def check_sft(config: SftConfig, *, world_size: int) -> None:
    """Checks a resolved configuration of `megatron sft` without touching the disk.

    Args:
        config: Result of `resolve_sft`.
        world_size: Ranks of the run, over all nodes.

    Raises:
        ValueError: The first setting that cannot work.
    """
    _check_sections(config)
    refuse_later_features(config)
    _check_base(config)
    _check_tuner(config.tuner)
    _check_base_stays(config)
    _check_data(config.data, config.template)
    if config.training.train_iters is None and config.training.num_train_epochs is None:
        raise ValueError("give --num_train_epochs or --train_iters")
    _check_recompute(config.training)
    _check_cuda_graphs(config)
    _check_schedule(config.optimizer, train_iters=config.training.train_iters)
    _check_shard_size(config.checkpoint.max_shard_size)
    _check_fp8_training(config)
    _check_world_size(config.parallel, world_size=world_size)
    _check_optimizer(config.optimizer, config.parallel)
    _check_batches(config.training, config.parallel, world_size=world_size)
    _check_moe(config.moe, config.parallel, packing=config.data.packing)


def _check_base_stays(config: SftConfig) -> None:
    """An adapter is saved without the model, of which nothing may change then."""
    rate = config.moe.moe_router_bias_update_rate
    if rate and config.tuner.tuner_type != "full":
        raise ValueError(
            f"--moe_router_bias_update_rate {rate:g}: biases that choose experts belong to the "
            f"model, which --tuner_type {config.tuner.tuner_type} leaves as it is; use 0"
        )


def _check_optimizer(optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    if optimizer.optimizer == "sgd" and parallel.use_distributed_optimizer:
        raise ValueError("--optimizer sgd needs --use_distributed_optimizer false")
    if optimizer.use_precision_aware_optimizer:
        if optimizer.optimizer != "adam" or not parallel.use_distributed_optimizer:
            raise ValueError(
                "--use_precision_aware_optimizer true needs --optimizer adam and "
                "--use_distributed_optimizer true"
            )
        return
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if (value := getattr(optimizer, name)) != "fp32":
            raise ValueError(f"--{name} {value} needs --use_precision_aware_optimizer true")


def check_export(config: ExportConfig, *, world_size: int) -> None:
    """Checks a resolved configuration of `megatron export` without touching the disk.

    Args:
        config: Result of `resolve_export`.
        world_size: Ranks of the export, over all nodes.

    Raises:
        ValueError: The first setting that cannot work.
    """
    _check_sections(config)
    if config.export.to_hf == config.export.to_mcore:
        raise ValueError("give exactly one of --to_hf true and --to_mcore true")
    refuse_later_features(config)
    _check_base(config)
    _check_one_adapter(config.tuner)
    if config.export.test_convert_precision:
        _check_precision_test(config)
    _check_fp8_export(config)
    _check_shard_size(config.checkpoint.max_shard_size)
    _check_world_size(config.parallel, world_size=world_size)


def _check_fp8_training(config: SftConfig) -> None:
    """8-bit floats are a form of whole weights, and too coarse for training to go on from."""
    if not config.checkpoint.fp8_export:
        return
    if config.tuner.tuner_type == "full":
        if not config.checkpoint.no_save_optim:
            raise ValueError(
                "--fp8_export true: a run cannot go on bit for bit from 8-bit weights; add "
                "--no_save_optim true"
            )
    elif not config.tuner.merge_lora:
        raise ValueError("--fp8_export true: an adapter is not saved in 8 bits; add --merge_lora")


def _check_fp8_export(config: ExportConfig) -> None:
    if not config.checkpoint.fp8_export:
        return
    if config.export.to_mcore:
        raise ValueError("--fp8_export true: torch_dist has no 8-bit weights; use --to_hf true")
    tuner = config.tuner
    if (tuner.adapters or tuner.mcore_adapter) and not tuner.merge_lora:
        raise ValueError("--fp8_export true: an adapter is not saved in 8 bits; use --merge_lora")


def _check_base(config: SftConfig | ExportConfig) -> None:
    """There is a model to start from; `fill_base` has looked for one beside the adapter."""
    if config.model.model is None and config.model.mcore_model is None:
        raise ValueError(
            "--model is missing: give a Hugging Face folder or id, or a torch_dist folder as "
            "--mcore_model"
        )


def _check_precision_test(config: ExportConfig) -> None:
    """A Hugging Face model is on one side of the comparison, with an adapter of PEFT if any."""
    tuner, to_mcore = config.tuner, config.export.to_mcore
    has_adapter = bool(tuner.adapters or tuner.mcore_adapter)
    needs_model = to_mcore or (has_adapter and not tuner.merge_lora)
    if needs_model and config.model.model is None:
        raise ValueError(
            "--test_convert_precision true needs --model: the Hugging Face model to compare with"
        )
    if to_mcore and has_adapter and (tuner.merge_lora or tuner.mcore_adapter):
        raise ValueError(
            "--test_convert_precision true: there is no Hugging Face model to compare the result "
            "with; convert to Hugging Face first (--to_hf true)"
        )


def _check_sections(config: SftConfig | ExportConfig) -> None:
    # The last first: a wrong --save_steps is also the default of --eval_steps.
    for part in reversed(dataclasses.fields(config)):
        check_values(getattr(config, part.name))


def _check_tuner(tuner: TunerConfig) -> None:
    """Adapters are only for LoRA, and one can be trained."""
    if tuner.tuner_type != "full":
        _check_one_adapter(tuner)
        if tuner.lora_dropout == 1:
            raise ValueError("--lora_dropout 1.0 must be below 1: nothing would be learnt")
        return
    for flag, given in (("adapters", tuner.adapters), ("mcore_adapter", tuner.mcore_adapter)):
        if given:
            raise ValueError(
                f"--{flag} {spell(given)} needs --tuner_type lora; to train all weights, "
                "merge it first (megatron export) and give the result as --model"
            )
    if tuner.modules_to_save:
        raise ValueError(
            f"--modules_to_save {spell(tuner.modules_to_save)} needs --tuner_type lora; full "
            "training saves all modules"
        )


def _check_one_adapter(tuner: TunerConfig) -> None:
    if len(tuner.adapters) > 1:
        raise ValueError(
            f"--adapters {spell(tuner.adapters)}: give one; merge the others first with "
            "megatron export"
        )
    if tuner.adapters and tuner.mcore_adapter:
        raise ValueError(
            f"--adapters {spell(tuner.adapters)} and --mcore_adapter {tuner.mcore_adapter}: give "
            "one of them"
        )


def _check_shard_size(text: str) -> None:
    try:
        parse_byte_size(text)
    except ValueError as error:
        raise ValueError(f"--max_shard_size {error}") from error


def _check_world_size(parallel: ParallelConfig, *, world_size: int) -> None:
    """The ranks can be divided by the parallel sizes, and these fit each other."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    _divide_world(world_size, sizes=(tp, cp, pp), what="tensor x context x pipeline")
    _divide_world(world_size, sizes=(etp, ep, pp), what="expert tensor x expert x pipeline")
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        raise ValueError(
            f"--virtual_pipeline_model_parallel_size {vpp} needs "
            "--pipeline_model_parallel_size above 1"
        )
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        if getattr(parallel, name) is not None and pp == 1:
            raise ValueError(f"--{name} needs --pipeline_model_parallel_size above 1")
    resolve_overlaps(parallel, num_ranks=world_size)


def _divide_world(world_size: int, *, sizes: tuple[int, int, int], what: str) -> None:
    needed = sizes[0] * sizes[1] * sizes[2]
    if world_size % needed:
        spelled = " x ".join(map(str, sizes))
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise ValueError(
            f"{processes} cannot be divided by {what} parallel size {spelled} = {needed}: "
            f"set NPROC_PER_NODE (x NNODES) to a multiple of {needed}"
        )


def _check_batches(training: TrainingConfig, parallel: ParallelConfig, *, world_size: int) -> None:
    """The global batch divides into micro-batches that fill the pipeline."""
    pp = parallel.pipeline_model_parallel_size
    model_size = parallel.tensor_model_parallel_size * pp * parallel.context_parallel_size
    dp_size = world_size // model_size
    rows = training.micro_batch_size * dp_size
    if training.global_batch_size % rows:
        raise ValueError(
            f"--global_batch_size {training.global_batch_size} cannot be divided by "
            f"--micro_batch_size {training.micro_batch_size} x {dp_size} data-parallel ranks"
        )
    if parallel.virtual_pipeline_model_parallel_size is None:
        return
    num_microbatches = training.global_batch_size // rows
    group = parallel.microbatch_group_size_per_vp_stage or pp
    if group < pp:
        raise ValueError(
            f"--microbatch_group_size_per_vp_stage {group} must be at least "
            f"--pipeline_model_parallel_size {pp}"
        )
    if num_microbatches < group or 0 < num_microbatches % group < pp:
        raise ValueError(
            f"virtual pipeline stages need micro-batches in groups of {group}, a step has "
            f"{num_microbatches}: raise --global_batch_size to a multiple of {rows * group}"
        )


def _check_moe(moe: MoEConfig, parallel: ParallelConfig, *, packing: bool) -> None:
    losses, coefficients = moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff
    if len(coefficients) != max(1, len(losses)):
        raise ValueError(
            f"--moe_aux_loss_coeff has {len(coefficients)} values for {max(1, len(losses))} losses "
            "of --moe_router_load_balancing_type: give one each"
        )
    if parallel.expert_model_parallel_size == 1 or packing:
        return
    # These exchange blocks of one size, but without packing the ranks' micro-batches differ.
    if moe.moe_token_dispatcher_type == "allgather":
        raise ValueError(
            "--moe_token_dispatcher_type allgather with --expert_model_parallel_size above 1 needs "
            "--packing true; or use alltoall"
        )
    if moe.moe_pad_expert_input_to_capacity:
        raise ValueError(
            "--moe_pad_expert_input_to_capacity true with --expert_model_parallel_size above 1 "
            "needs --packing true"
        )


def _check_data(data: DataConfig, template: TemplateConfig) -> None:
    if not data.dataset:
        raise ValueError("--dataset is missing: give one or more files or ids")
    if data.val_dataset and data.split_dataset_ratio:
        raise ValueError("--val_dataset and --split_dataset_ratio exclude each other: drop one")
    if data.split_dataset_ratio == 1:
        raise ValueError("--split_dataset_ratio 1.0 leaves nothing to train on")
    if not data.packing:
        return
    if template.max_length is None or data.packing_length is None:
        raise ValueError("--packing true needs --max_length (the tokens of a row)")
    if data.packing_length < template.max_length:
        raise ValueError(
            f"--packing_length {data.packing_length} must be at least "
            f"--max_length {template.max_length}"
        )


def _check_recompute(training: TrainingConfig) -> None:
    if training.recompute_granularity == "full":
        return
    for name in ("recompute_method", "recompute_num_layers"):
        value = getattr(training, name)
        if value is not None:
            raise ValueError(f"--{name} {value} is only for --recompute_granularity full")


def why_not_recorded(config: SftConfig) -> str:
    """What of the settings keeps layers from being recorded as CUDA graphs; empty if nothing does.

    Args:
        config: Resolved.
    """
    parallel = config.parallel
    sizes = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "context_parallel_size",
    )
    reasons = {
        "--packing true, whose batches have one shape": not config.data.packing,
        "--recompute_granularity none": config.training.recompute_granularity != "none",
        **{f"--{name} 1": getattr(parallel, name) > 1 for name in sizes},
    }
    return next((need for need, is_missing in reasons.items() if is_missing), "")


def _check_cuda_graphs(config: SftConfig) -> None:
    if config.model.cuda_graph_impl == "local" and (need := why_not_recorded(config)):
        raise ValueError(f"--cuda_graph_impl local needs {need}")


def _check_schedule(optimizer: OptimizerConfig, *, train_iters: int | None) -> None:
    lr = optimizer.lr
    assert lr is not None, "resolve_sft fills it"
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(optimizer, name)
        if value > lr:
            raise ValueError(f"--{name} {value} must not be above --lr {lr}")
    fraction, warmup = optimizer.lr_warmup_fraction, optimizer.lr_warmup_iters
    if fraction is not None and warmup:
        raise ValueError("--lr_warmup_fraction and --lr_warmup_iters exclude each other: drop one")
    if fraction == 1:
        raise ValueError("--lr_warmup_fraction 1.0 must be below 1")
    num_steps = optimizer.lr_decay_iters or train_iters
    if num_steps is not None and warmup >= num_steps:
        raise ValueError(f"--lr_warmup_iters {warmup} must be below the {num_steps} steps of decay")
    if optimizer.lr_decay_style == "WSD":
        last = optimizer.lr_wsd_decay_iters
        if last is None or (num_steps is not None and last > num_steps):
            raise ValueError(
                "--lr_decay_style WSD needs --lr_wsd_decay_iters, not more than the decay has steps"
            )
    _check_weight_decay(optimizer)


def _check_weight_decay(optimizer: OptimizerConfig) -> None:
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    start = optimizer.weight_decay if start is None else start
    end = optimizer.weight_decay if end is None else end
    if optimizer.weight_decay_incr_style == "constant" and start != end:
        raise ValueError(
            f"weight decay from {start} to {end} needs --weight_decay_incr_style linear or cosine"
        )
    if end < start:
        raise ValueError(f"--end_weight_decay {end} must not be below --start_weight_decay {start}")
