"""From settings to Megatron-Core's configuration, and from that to the chunks of a rank."""

import os

import pytest
import torch

from mtrain.bridge.families import find_family
from mtrain.config import ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from mtrain.model.build import (
    build_model,
    fuse_weight_gradients,
    transformer_config,
)
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks
from tests.tiny import tiny_config

# Of Transformer Engine, which Megatron-Core looks for.
KERNELS = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)


def config_of(
    name="qwen3",
    *,
    layout=None,
    model=None,
    parallel=None,
    training=None,
    moe=None,
    dtype=torch.float32,
    **changes,
):
    described = find_family(tiny_config(name)).megatron_config(tiny_config(name, **changes))
    return transformer_config(
        described,
        layout or ParallelLayout(),
        model=model or ModelConfig(),
        parallel=parallel or ParallelConfig(),
        training=training or TrainingConfig(),
        moe=moe or MoEConfig(),
        dtype=dtype,
    )


def test_the_architecture_is_that_of_the_checkpoint() -> None:
    config = config_of("qwen3", hidden_size=128, rms_norm_eps=1e-5)
    assert (config.hidden_size, config.num_layers, config.kv_channels) == (128, 4, 32)
    assert (config.layernorm_epsilon, config.qk_layernorm) == (1e-5, True)
    assert config.activation_func is torch.nn.functional.silu
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [
        (torch.float32, False, False),
        (torch.bfloat16, True, False),
        (torch.float16, False, True),
    ],
)
def test_weights_activations_and_pipeline_share_the_precision(dtype, bf16, fp16) -> None:
    config = config_of(dtype=dtype)
    assert (config.params_dtype, config.pipeline_dtype) == (dtype, dtype)
    assert (config.bf16, config.fp16) == (bf16, fp16)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"training": TrainingConfig()}, {"recompute_granularity": None}),
        (
            {
                "training": TrainingConfig(
                    recompute_granularity="full",
                    recompute_method="block",
                    recompute_num_layers=2,
                )
            },
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 2,
            },
        ),
        (
            {
                "training": TrainingConfig(
                    recompute_granularity="selective", recompute_modules=("mlp", "layernorm")
                )
            },
            {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]},
        ),
        (
            {"model": ModelConfig(bias_activation_fusion=False)},
            {"bias_activation_fusion": False},
        ),
        (
            {"model": ModelConfig(megatron_extra_kwargs={"layernorm_epsilon": 0.5})},
            {"layernorm_epsilon": 0.5},
        ),
        (
            {
                "name": "qwen3_moe",
                "moe": MoEConfig(
                    moe_router_load_balancing_type=("aux_loss", "seq_aux_loss"),
                    moe_aux_loss_coeff=(0.1, 0.2),
                    moe_z_loss_coeff=0.3,
                    moe_router_dtype="fp64",
                    moe_token_dispatcher_type="allgather",
                ),
            },
            {
                "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
                "moe_aux_loss_coeff": [0.1, 0.2],
                "moe_z_loss_coeff": 0.3,
                "moe_router_dtype": "fp64",
                "moe_token_dispatcher_type": "allgather",
            },
        ),
        (
            {
                "name": "qwen3_moe",
                "moe": MoEConfig(
                    moe_expert_capacity_factor=2.0,
                    moe_pad_expert_input_to_capacity=True,
                    moe_token_drop_policy="position",
                ),
            },
            {
                "moe_expert_capacity_factor": 2.0,
                "moe_pad_expert_input_to_capacity": True,
                "moe_token_drop_policy": "position",
            },
        ),
        (
            {
                "layout": ParallelLayout(world_size=4, tp_size=2, pp_size=2, vpp_size=2),
                "parallel": ParallelConfig(
                    sequence_parallel=True, microbatch_group_size_per_vp_stage=4
                ),
            },
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "sequence_parallel": True,
                "microbatch_group_size_per_vp_stage": 4,
            },
        ),
    ],
)
def test_settings_reach_megatron(settings, expected) -> None:
    config = config_of(**settings)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("moe", "fuses"),
    [
        (MoEConfig(), True),
        (MoEConfig(moe_permute_fusion=False), False),
        (MoEConfig(moe_expert_capacity_factor=2.0), True),
        (
            MoEConfig(moe_expert_capacity_factor=2.0, moe_pad_expert_input_to_capacity=True),
            False,
        ),
    ],
)
def test_tokens_are_sorted_by_a_kernel_where_it_is_right(moe, fuses, monkeypatch) -> None:
    monkeypatch.setattr("mtrain.model.build.has_transformer_engine", lambda: False)
    assert not config_of("qwen3_moe", moe=moe).moe_permute_fusion
    monkeypatch.setattr("mtrain.model.build.has_transformer_engine", lambda: True)
    for name in KERNELS:
        monkeypatch.setattr(f"megatron.core.transformer.moe.moe_utils.{name}", print, raising=False)
    assert config_of("qwen3_moe", moe=moe).moe_permute_fusion is fuses


def test_routing_settings_do_not_touch_a_dense_model() -> None:
    config = config_of(moe=MoEConfig(moe_token_dispatcher_type="allgather", moe_z_loss_coeff=1.0))
    assert config.num_moe_experts is None
    assert config.moe_z_loss_coeff is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": ModelConfig(megatron_extra_kwargs={"hiden_size": 1})}, "hiden_size"),
        (
            {
                "training": TrainingConfig(
                    recompute_granularity="selective", recompute_modules=("attn",)
                )
            },
            "attn",
        ),
        (
            {
                "training": TrainingConfig(
                    recompute_granularity="selective", recompute_modules=("mla_up_proj",)
                )
            },
            "mla_up_proj",
        ),
    ],
)
def test_what_megatron_refuses_is_an_error_of_ours(settings, reason) -> None:
    with pytest.raises(ValueError, match=f"Megatron-Core refuses this configuration: .*{reason}"):
        config_of(**settings)


@pytest.mark.parametrize(
    ("name", "modules"), [("gpt2", ("mlp",)), ("deepseek_v3", ("core_attn", "mla_up_proj"))]
)
def test_what_cannot_be_recomputed_is_refused(name, modules) -> None:
    training = TrainingConfig(recompute_granularity="selective", recompute_modules=modules)
    with pytest.raises(ValueError, match=f"--recompute_modules {modules[-1]}"):
        config_of(name, training=training)


def test_experts_with_biases_may_be_split() -> None:
    layout = ParallelLayout(world_size=2, tp_size=2, etp_size=2)
    parallel = ParallelConfig(sequence_parallel=True)
    config = config_of("gpt_oss_moe", layout=layout, parallel=parallel)
    assert config.expert_tensor_parallel_size == 2


def dtypes_of(state, name, dtype):
    config = tiny_config(name)
    described = find_family(config).megatron_config(config)
    (model,) = build_model(described, config_of(name, dtype=dtype), state, backend="torch")
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
def test_all_parameters_have_the_dtype_of_the_model(name) -> None:
    """Megatron-Core makes learned positions in float32."""
    assert run_ranks(ParallelLayout(), dtypes_of, name, torch.bfloat16) == [{torch.bfloat16}]


def build_with_kernels(state, kernels):
    """What building models with these kernels for attention leaves in the environment."""
    described = find_family(tiny_config("qwen3")).megatron_config(tiny_config("qwen3"))
    for kernel in kernels:
        config = config_of(model=ModelConfig(attention_backend=kernel))
        build_model(described, config, state, backend="torch")
    return [name for name in os.environ if name.startswith("NVTE_")]


def test_a_process_may_build_models_with_different_kernels_for_attention() -> None:
    """Megatron-Core sets Transformer Engine's variables, and refuses those of another model."""
    assert run_ranks(ParallelLayout(), build_with_kernels, ("auto", "flash")) == [[]]


@pytest.mark.parametrize("kernel", ["auto", "fused"])
def test_an_environment_that_forbids_the_kernel_is_refused(kernel, monkeypatch) -> None:
    model = LanguageModel.__new__(LanguageModel)
    torch.nn.Module.__init__(model)
    model.config = config_of(model=ModelConfig(attention_backend=kernel))
    model.packed_format = "thd"
    for name in ("NVTE_FLASH_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "1" if kernel == "auto" else "0")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    model._set_attention_backend()
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(ValueError, match="NVTE_FUSED_ATTN set to 0, but expected 1"):
        model._set_attention_backend()


def test_every_balance_loss_wants_a_coefficient() -> None:
    losses = MoEConfig(moe_router_load_balancing_type=("aux_loss", "seq_aux_loss"))
    with pytest.raises(ValueError, match="--moe_aux_loss_coeff has 1 values for 2 balance losses"):
        config_of("qwen3_moe", moe=losses)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout is not built"):
        config_of(model=ModelConfig(megatron_extra_kwargs={"attention_dropout": 0.1}))


def build(state, name):
    """Chunks of a rank: shape, mark and layer numbers of what they hold."""
    hf_config = tiny_config(name)
    described = find_family(hf_config).megatron_config(hf_config)
    config = config_of(
        name,
        layout=state.layout,
        parallel=ParallelConfig(sequence_parallel=state.layout.tp_size > 1),
    )
    return [
        (
            {
                parameter_name: (
                    tuple(parameter.shape),
                    getattr(parameter, "tensor_model_parallel", False),
                    getattr(parameter, "allreduce", True),
                )
                for parameter_name, parameter in chunk.named_parameters()
            },
            [layer.layer_number for layer in chunk.decoder.layers],
        )
        for chunk in build_model(described, config, state, backend="torch")
    ]


@pytest.mark.parametrize("name", ["qwen2", "qwen3_tied", "qwen3_moe"])
def test_exactly_the_split_parameters_are_marked(name) -> None:
    """Without the mark the gradient norm leaves out all tensor ranks but the first."""
    (((whole, _),),) = run_ranks(ParallelLayout(), build, name)
    for ((split, _),) in run_ranks(ParallelLayout(world_size=2, tp_size=2), build, name):
        assert split.keys() == whole.keys()
        dense = {name for name, (_, _, is_dense) in split.items() if is_dense}
        assert dense < split.keys() or name != "qwen3_moe"
        differ = {name for name in dense if split[name][0] != whole[name][0]}
        assert {name for name in dense if split[name][1]} == differ
        assert "embedding.word_embeddings.weight" in differ


def test_the_vocabulary_is_padded_to_equal_parts_and_no_more() -> None:
    (((whole, _),),) = run_ranks(ParallelLayout(), build, "qwen3")
    parts = run_ranks(ParallelLayout(world_size=4, tp_size=4), build, "qwen3")
    for weight in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert whole[weight][0] == (131, 64)
        assert {part[0][0][weight][0] for part in parts} == {(33, 64)}


def test_virtual_stages_hold_the_layers_that_the_schedule_expects() -> None:
    layout = ParallelLayout(world_size=2, pp_size=2, vpp_size=2)
    first, last = run_ranks(layout, build, "qwen3")
    assert [layers for _, layers in first] == [[1], [3]]
    assert [layers for _, layers in last] == [[2], [4]]
    has_embedding = ["embedding.word_embeddings.weight" in named for named, _ in (*first, *last)]
    has_output = ["output_layer.weight" in named for named, _ in (*first, *last)]
    assert has_embedding == [True, False, False, False]
    assert has_output == [False, False, False, True]


def weight_gradients(state, name):
    """Largest difference between gradients with and without fusion, and how many were fused."""
    results = []
    for fuses in (False, True):
        torch.manual_seed(0)
        config = config_of(name)
        described = find_family(tiny_config(name)).megatron_config(tiny_config(name))
        (model,) = build_model(described, config, state, backend="torch")
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1)
            parameter.main_grad = torch.zeros(parameter.shape)
            parameter.grad_added_to_main_grad = False
        if fuses:
            fuse_weight_gradients([model])
        tokens = torch.arange(10)[None]
        for _ in range(2):
            losses, _ = model(tokens, tokens, labels=tokens + 1)
            losses.sum().backward()
            for parameter in model.parameters():
                # As data parallelism does, since nobody is to read it.
                if parameter.grad_added_to_main_grad:
                    parameter.grad = None
        results.append(dict(model.named_parameters()))
    plain, fused = results
    count = 0
    for key, parameter in fused.items():
        if parameter.grad_added_to_main_grad:
            count += 1
            torch.testing.assert_close(parameter.main_grad, plain[key].grad, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(parameter.grad, plain[key].grad), key
    return count


def test_linears_add_weight_gradients_to_the_main_gradient() -> None:
    # Four linears a layer; the output layer does so by itself.
    assert run_ranks(ParallelLayout(), weight_gradients, "qwen3") == [4 * 4]
