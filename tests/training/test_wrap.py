from pathlib import Path

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file

from mtrain.config.parallel import ParallelConfig
from mtrain.model.gpt import LanguageModel
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.wrap import gather_parameters, unwrap, wrap_chunks
from tests.megatron import load_model
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wrap") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wrap") / "qwen3_moe", "qwen3_moe")


def wrap(state: ParallelState, folder: Path, dtype: torch.dtype) -> tuple[bool, bool, bool]:
    chunks = load_model(state, folder, dtype=dtype)
    before = {name: weight.clone() for name, weight in chunks[0].named_parameters()}
    [wrapped] = wrap_chunks(chunks, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
    bare = unwrap(wrapped)
    same = all(torch.equal(before[name], weight) for name, weight in bare.named_parameters())
    main_grads = {weight.main_grad.dtype for weight in bare.parameters()}
    return (
        isinstance(wrapped.module, Float16Module),
        isinstance(bare, LanguageModel) and same,
        main_grads == {torch.float32},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_wrapped_once_more_and_weights_stay(folder, dtype):
    is_half = dtype != torch.float32
    assert run_ranks(ParallelLayout(), wrap, folder, dtype) == [(is_half, True, True)]


def biases_that_choose_experts(state: ParallelState, folder: Path) -> list[torch.Tensor]:
    chunks = load_model(state, folder, dtype=torch.bfloat16)
    [wrapped] = wrap_chunks(chunks, parallel=ParallelConfig(), grad_reduce_in_fp32=True)
    return [buffer for name, buffer in wrapped.named_buffers() if "expert_bias" in name]


def test_biases_that_choose_experts_stay_in_float32(tmp_path):
    folder = make_checkpoint(tmp_path, "deepseek_v3")
    stored = load_file(folder / "model.safetensors")
    (biases,) = run_ranks(ParallelLayout(), biases_that_choose_experts, folder)
    expected = [stored[key] for key in sorted(stored) if key.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for bias, of_file in zip(biases, expected, strict=True):
        assert torch.equal(bias, of_file)


def overlaps(state: ParallelState, folder: Path, parallel: ParallelConfig) -> tuple[bool, ...]:
    """Whether reduction and gather overlap and gathers are aligned, and the functions for it."""
    chunks = wrap_chunks(load_model(state, folder), parallel=parallel, grad_reduce_in_fp32=True)
    ddp_config, config = chunks[0].ddp_config, chunks[0].config
    assert (config.grad_sync_func is not None) is ddp_config.overlap_grad_reduce
    hooked = [len(module._forward_pre_hooks) for chunk in chunks for module in chunk.modules()]
    trained = [
        any(True for _ in module.parameters(recurse=False))
        for chunk in chunks
        for module in chunk.modules()
    ]
    assert hooked == [has_own and ddp_config.overlap_param_gather for has_own in trained]
    return (
        ddp_config.overlap_grad_reduce,
        ddp_config.overlap_param_gather,
        config.param_sync_func is not None,
    )


@pytest.mark.parametrize(
    ("model", "sizes", "flags", "expected"),
    [
        ("qwen3", {}, {}, (False, False, False)),
        ("qwen3", {"world_size": 2}, {}, (True, True, False)),
        ("qwen3", {"world_size": 2}, {"overlap_param_gather": False}, (True, False, False)),
        ("qwen3", {"world_size": 2}, {"overlap_grad_reduce": False}, (False, False, False)),
        ("qwen3", {"world_size": 2}, {"use_distributed_optimizer": False}, (True, False, False)),
        ("qwen3", {"world_size": 2, "tp_size": 2}, {}, (False, False, False)),
        # Experts that ranks do not split are reduced over them.
        ("qwen3_moe", {"world_size": 2, "tp_size": 2}, {}, (True, True, False)),
        ("qwen3_moe", {"world_size": 2, "ep_size": 2}, {}, (True, True, False)),
        ("qwen3", {"world_size": 4, "pp_size": 2}, {}, (True, True, False)),
        ("qwen3", {"world_size": 4, "pp_size": 2, "vpp_size": 2}, {}, (True, True, True)),
        ("qwen3", {}, {"overlap_param_gather": True}, (True, True, False)),
    ],
)
def test_communication_overlaps_where_there_is_some(
    model, sizes, flags, expected, folder, moe_folder
):
    """Only modules with parameters wait for them, and only virtual stages align gathers."""
    source = moe_folder if model == "qwen3_moe" else folder
    layout = ParallelLayout(**sizes)
    results = run_ranks(layout, overlaps, source, ParallelConfig(**flags))
    assert results == [expected] * layout.world_size


def refuse(state: ParallelState, folder: Path) -> str:
    chunks = load_model(state, folder)
    parallel = ParallelConfig(overlap_param_gather=True, overlap_grad_reduce=False)
    with pytest.raises(ValueError) as caught:
        wrap_chunks(chunks, parallel=parallel, grad_reduce_in_fp32=True)
    return str(caught.value)


def test_gathering_parameters_during_forward_needs_reduction_during_backward(folder):
    [message] = run_ranks(ParallelLayout(), refuse, folder)
    assert "--overlap_param_gather true needs --overlap_grad_reduce true" in message


def updated(state: ParallelState, folder: Path) -> tuple[bool, dict[str, torch.Tensor]]:
    rig = make_rig(state, folder)
    rig.step([rows([document]) for document in documents(4)[state.rank :: 2]])
    bare = unwrap(rig.chunks[0])
    stale = {name: weight.detach().clone() for name, weight in bare.named_parameters()}
    gather_parameters(rig.chunks)
    fresh = {name: weight.detach().clone() for name, weight in bare.named_parameters()}
    return any(not torch.equal(stale[name], fresh[name]) for name in stale), fresh


def test_gathered_parameters_are_the_same_on_all_ranks(folder):
    """Without the gather each rank would save only its own share of an update."""
    (was_stale, ours), (_, theirs) = run_ranks(ParallelLayout(world_size=2), updated, folder)
    assert was_stale
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
