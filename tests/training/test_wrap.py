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

OVERLAP = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wrap") / "qwen3", "qwen3")


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


def refuse(state: ParallelState, folder: Path) -> str:
    chunks = load_model(state, folder)
    with pytest.raises(ValueError) as caught:
        wrap_chunks(
            chunks, parallel=ParallelConfig(overlap_param_gather=True), grad_reduce_in_fp32=True
        )
    return str(caught.value)


def test_gathering_parameters_during_forward_needs_reduction_during_backward(folder):
    [message] = run_ranks(ParallelLayout(), refuse, folder)
    assert "--overlap_param_gather true needs --overlap_grad_reduce true" in message


def updated(state: ParallelState, folder: Path) -> tuple[bool, dict[str, torch.Tensor]]:
    rig = make_rig(state, folder, parallel=OVERLAP)
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
