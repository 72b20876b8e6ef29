"""Combinations that cannot work are refused in one line, others are not."""

import dataclasses

import pytest

from mtrain.config import (
    DataConfig,
    ExportConfig,
    ModelConfig,
    SftConfig,
    TrainingConfig,
    resolve_export,
    resolve_sft,
)
from mtrain.config.checks import check_export, check_sft

VALID = SftConfig(
    model=ModelConfig(model="owner/name"),
    data=DataConfig(dataset=("owner/data",)),
    training=TrainingConfig(train_iters=100),
)
SECTION_OF = {
    name: part.name
    for part in dataclasses.fields(SftConfig)
    for name in getattr(VALID, part.name).__dataclass_fields__
}


def changed(**flags: object) -> SftConfig:
    config = VALID
    for name, value in flags.items():
        section = dataclasses.replace(getattr(config, SECTION_OF[name]), **{name: value})
        config = dataclasses.replace(config, **{SECTION_OF[name]: section})
    return config


def check(*, world_size: int = 1, **flags: object) -> None:
    check_sft(resolve_sft(changed(**flags)), world_size=world_size)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"train_iters": None, "num_train_epochs": 1},
        {"tuner_type": "lora"},
        {"moe_router_bias_update_rate": 0.001},
        {"model": None, "mcore_model": "a"},
        {"tuner_type": "lora", "mcore_adapter": "a"},
        {"tuner_type": "lora_llm", "adapters": ("a",), "modules_to_save": ("lm_head",)},
        {"tuner_type": "lora", "merge_lora": True, "lora_export_layout": "fused"},
        {"tuner_type": "lora", "merge_lora": True, "fp8_export": True},
        {"fp8_export": True, "no_save_optim": True},
        # Of LoRA alone, as in Megatron-SWIFT.
        {"lora_rank": 16, "lora_dropout": 1.0, "merge_lora": True},
        {"packing": True, "max_length": 128},
        {"packing": True, "packing_length": 128},
        {"packing": True, "packing_length": 128, "max_length": 64},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ("mlp", "layernorm")},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10},
        {
            "weight_decay_incr_style": "linear",
            "start_weight_decay": 0.0,
            "end_weight_decay": 0.1,
        },
        {"optimizer": "sgd", "use_distributed_optimizer": False},
        {"world_size": 2, "overlap_grad_reduce": False},
        {"overlap_param_gather": True},
        {"start_weight_decay": 0.1},
        {"lr_warmup_fraction": 0.1},
        {"lr_warmup_iters": 99},
        {"world_size": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"world_size": 4, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        {"world_size": 16},
        {
            "world_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ],
)
def test_good_combinations_pass(flags: dict[str, object]) -> None:
    check(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"model": None},
            "--model is missing: give a Hugging Face folder or id, or a torch_dist folder as "
            "--mcore_model",
        ),
        (
            {"tuner_type": "lora", "adapters": ("a",), "mcore_adapter": "b"},
            "--adapters a and --mcore_adapter b: give one of them",
        ),
        ({"mcore_adapter": "b"}, "--mcore_adapter b needs --tuner_type lora; to train all weights"),
        ({"dataset": ()}, "--dataset is missing"),
        ({"train_iters": None}, "give --num_train_epochs or --train_iters"),
        ({"micro_batch_size": 0}, "--micro_batch_size 0: must be at least 1"),
        ({"data_seed": -1}, "--data_seed -1: must be at least 0"),
        ({"save_steps": 0}, "--save_steps 0: must be at least 1"),
        ({"eval_steps": 0}, "--eval_steps 0: must be at least 1"),
        ({"tuner_type": "dora"}, "--tuner_type dora: must be one of full, lora, lora_llm"),
        ({"tuner_type": "lora", "lora_bias": "all"}, "biases are not trained with an adapter"),
        (
            {"tuner_type": "lora", "moe_router_bias_update_rate": 0.001},
            "--moe_router_bias_update_rate 0.001: biases that choose experts belong to the model",
        ),
        ({"tuner_type": "lora", "lora_dropout": 1.0}, "--lora_dropout 1.0 must be below 1"),
        ({"tuner_type": "lora", "adapters": ("a", "b")}, "--adapters a b: give one; merge the"),
        ({"adapters": ("a",)}, "--adapters a needs --tuner_type lora; to train all weights, merge"),
        ({"modules_to_save": ("lm_head",)}, "--modules_to_save lm_head needs --tuner_type lora"),
        ({"max_shard_size": "big"}, "--max_shard_size big: must be a size"),
        ({"val_dataset": ("a/b",), "split_dataset_ratio": 0.1}, "exclude each other"),
        ({"split_dataset_ratio": 1.0}, "leaves nothing to train on"),
        ({"packing": True}, "--packing true needs --max_length"),
        (
            {"packing": True, "max_length": 64, "packing_length": 32},
            "--packing_length 32 must be at least --max_length 64",
        ),
        ({"cuda_graph_impl": "local"}, "--cuda_graph_impl local needs --packing true"),
        (
            {
                "cuda_graph_impl": "local",
                "packing": True,
                "max_length": 64,
                "recompute_granularity": "selective",
            },
            "--cuda_graph_impl local needs --recompute_granularity none",
        ),
        ({"recompute_method": "block"}, "only for --recompute_granularity full"),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": 2},
            "--recompute_num_layers 2 is only for --recompute_granularity full",
        ),
        ({"min_lr": 1e-3}, "--min_lr 0.001 must not be above --lr 1e-05"),
        ({"lr_warmup_init": 1e-3}, "--lr_warmup_init 0.001 must not be above"),
        ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, "exclude each other"),
        ({"lr_warmup_fraction": 1.0}, "must be below 1"),
        ({"lr_warmup_iters": 100}, "--lr_warmup_iters 100 must be below the 100 steps"),
        ({"lr_warmup_iters": 20, "lr_decay_iters": 10}, "must be below the 10 steps"),
        ({"lr_decay_style": "WSD"}, "WSD needs --lr_wsd_decay_iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 101}, "not more than the decay has"),
        ({"start_weight_decay": 0.0}, "needs --weight_decay_incr_style linear or cosine"),
        (
            {"weight_decay_incr_style": "linear", "end_weight_decay": 0.0},
            "--end_weight_decay 0.0 must not be below --start_weight_decay 0.1",
        ),
        ({"optimizer": "sgd"}, "--optimizer sgd needs --use_distributed_optimizer false"),
        (
            {"moe_aux_loss_coeff": (0.1, 0.2)},
            "--moe_aux_loss_coeff has 2 values for 1 losses of --moe_router_load_balancing_type",
        ),
        (
            {
                "world_size": 2,
                "expert_model_parallel_size": 2,
                "moe_token_dispatcher_type": "allgather",
            },
            "--moe_token_dispatcher_type allgather with --expert_model_parallel_size above 1",
        ),
        (
            {
                "world_size": 2,
                "expert_model_parallel_size": 2,
                "moe_pad_expert_input_to_capacity": True,
            },
            "--moe_pad_expert_input_to_capacity true with --expert_model_parallel_size above 1",
        ),
        ({"optimizer": "muon"}, "--optimizer muon: it comes with a later release"),
        ({"global_batch_size": 3, "micro_batch_size": 2}, "--global_batch_size 3 cannot be"),
        (
            {"world_size": 3},
            "--global_batch_size 16 cannot be divided by --micro_batch_size 1 x 3 data-parallel",
        ),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3},
            "1 process cannot be divided by tensor x context x pipeline parallel size 2 x 1 x 3 = 6"
            ": set NPROC_PER_NODE (x NNODES) to a multiple of 6",
        ),
        (
            {"world_size": 2, "expert_model_parallel_size": 4},
            "2 processes cannot be divided by expert tensor x expert x pipeline",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "--virtual_pipeline_model_parallel_size 2 needs --pipeline_model_parallel_size above 1",
        ),
        ({"decoder_last_pipeline_num_layers": 2}, "needs --pipeline_model_parallel_size above 1"),
        (
            {"world_size": 2, "overlap_param_gather": True, "overlap_grad_reduce": False},
            "--overlap_param_gather true needs --overlap_grad_reduce true",
        ),
        ({"fp8_export": True}, "cannot go on bit for bit from 8-bit weights; add --no_save_optim"),
        ({"fp8_export": True, "tuner_type": "lora"}, "an adapter is not saved in 8 bits"),
        (
            {
                "overlap_param_gather": True,
                "use_distributed_optimizer": False,
            },
            "needs --use_distributed_optimizer true",
        ),
    ],
)
def test_bad_combinations_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(**flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("global_batch_size", "group", "message"),
    [
        (2, None, None),
        (8, None, None),
        (1, None, "raise --global_batch_size to a multiple of 2"),
        (3, None, "raise --global_batch_size to a multiple of 2"),
        (4, 4, None),
        (2, 4, "raise --global_batch_size to a multiple of 4"),
        (4, 1, "--microbatch_group_size_per_vp_stage 1 must be at least"),
    ],
)
def test_virtual_stages_need_enough_micro_batches(global_batch_size, group, message) -> None:
    flags = {
        "world_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "global_batch_size": global_batch_size,
        "microbatch_group_size_per_vp_stage": group,
    }
    if message is None:
        check(**flags)
        return
    with pytest.raises(ValueError, match=message):
        check(**flags)


MERGE = {"to_hf": True, "model": "owner/name", "adapters": ("a",)}


def check_export_with(*, world_size: int = 1, **flags: object) -> None:
    config = ExportConfig()
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        mine = {n: v for n, v in flags.items() if n in section.__dataclass_fields__}
        config = dataclasses.replace(config, **{part.name: dataclasses.replace(section, **mine)})
    check_export(resolve_export(config), world_size=world_size)


@pytest.mark.parametrize(
    "flags",
    [
        MERGE,
        MERGE | {"merge_lora": False, "lora_export_layout": "fused"},
        MERGE | {"world_size": 4, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        MERGE | {"adapters": (), "mcore_adapter": "a"},
        MERGE | {"to_hf": False, "to_mcore": True},
        MERGE | {"to_hf": False, "to_mcore": True, "merge_lora": False},
        {"to_hf": True, "model": "a/b"},
        {"to_mcore": True, "model": "a/b"},
        {"to_hf": True, "mcore_model": "a"},
        {"to_mcore": True, "mcore_model": "a", "adapters": ("b",)},
        MERGE | {"fp8_export": True},
    ],
)
def test_models_and_adapters_can_be_exported(flags: dict[str, object]) -> None:
    check_export_with(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give exactly one of --to_hf true and --to_mcore true"),
        ({"to_hf": True, "to_mcore": True}, "give exactly one"),
        ({"to_hf": True}, "--model is missing: give a Hugging Face folder or id, or a torch_dist"),
        ({"to_mcore": True, "mcore_adapter": "a"}, "--model is missing"),
        (MERGE | {"adapters": ("a", "b")}, "--adapters a b: give one"),
        (MERGE | {"mcore_adapter": "b"}, "--adapters a and --mcore_adapter b: give one of them"),
        (MERGE | {"test_convert_dtype": "int8"}, "--test_convert_dtype int8: must be one of"),
        (MERGE | {"max_shard_size": "big"}, "--max_shard_size big: must be a size"),
        ({"to_mcore": True, "model": "a", "fp8_export": True}, "torch_dist has no 8-bit weights"),
        (MERGE | {"merge_lora": False, "fp8_export": True}, "an adapter is not saved in 8 bits"),
        (
            MERGE | {"tensor_model_parallel_size": 2},
            "1 process cannot be divided by tensor x context x pipeline parallel size 2 x 1 x 1",
        ),
    ],
)
def test_exports_that_cannot_work_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_export_with(**flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


PRECISION = {"test_convert_precision": True}
NEEDS_MODEL = "--test_convert_precision true needs --model: the Hugging Face model to compare with"
NO_SIDE = "--test_convert_precision true: there is no Hugging Face model to compare the result with"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"to_mcore": True, "model": "a/b"}, None),
        ({"to_hf": True, "model": "a/b"}, None),
        # The result is what is compared with.
        ({"to_hf": True, "mcore_model": "a"}, None),
        ({"to_hf": True, "mcore_model": "a", "adapters": ("b",)}, None),
        (MERGE, None),
        (MERGE | {"merge_lora": False}, None),
        ({"to_mcore": True, "model": "a/b", "adapters": ("c",), "merge_lora": False}, None),
        ({"to_mcore": True, "mcore_model": "a"}, NEEDS_MODEL),
        ({"to_hf": True, "mcore_model": "a", "adapters": ("b",), "merge_lora": False}, NEEDS_MODEL),
        ({"to_mcore": True, "model": "a/b", "adapters": ("c",)}, NO_SIDE),
        ({"to_mcore": True, "model": "a/b", "mcore_adapter": "c"}, NO_SIDE),
        ({"to_mcore": True, "model": "a/b", "mcore_adapter": "c", "merge_lora": False}, NO_SIDE),
    ],
)
def test_the_precision_test_needs_a_hugging_face_side(flags, message) -> None:
    check_export_with(**flags)
    if message is None:
        check_export_with(**flags, **PRECISION)
        return
    with pytest.raises(ValueError) as caught:
        check_export_with(**flags, **PRECISION)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
