"""Replayed layers, with a stand-in for graphs that does the work again each time."""

from unittest import mock

import pytest
import torch

from mtrain.config import MoEConfig, TrainingConfig
from mtrain.model.replay import why_not_replayed
from mtrain.parallel import ParallelLayout
from tests.adapters import plan_of
from tests.megatron import SINGLE, load_model
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.replays import compare, train
from tests.tiny import make_checkpoint


class Recorder:
    """Counts recordings and how often they are repeated."""

    def __init__(self) -> None:
        self.recorded, self.repeated = 0, 0

    def __call__(self, work):
        self.recorded += 1

        def repeat():
            self.repeated += 1
            work()

        return repeat


class FullRecorder(Recorder):
    """Finds no memory for the second backward."""

    def __call__(self, work):
        if self.recorded == 3:
            raise torch.OutOfMemoryError("no memory\nat all")
        return super().__call__(work)


def compare_without_memory(state, folder):
    recorder = FullRecorder()
    with pytest.warns(UserWarning, match="layers could not be recorded .*: no memory$"):
        differing = compare(state, folder, recorder)
    return differing, recorder.recorded


def reasons(state, folder, options):
    """What keeps layers from being recorded: here, and with a GPU."""
    [model] = load_model(state, folder, **{"dtype": torch.bfloat16} | options)
    without = why_not_replayed(model)
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        return without, why_not_replayed(model)


def compare_and_count(state, folder, options):
    recorder = Recorder()
    differing = compare(state, folder, recorder, **options)
    return differing, recorder.recorded, recorder.repeated


NAMES = ["qwen3_tied", "qwen2", "qwen2_moe", "deepseek_v3", "gpt_oss_moe", "gemma3"]


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same_bit_for_bit(name, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    [(differing, recorded, repeated)] = run_ranks(SINGLE, compare_and_count, folder, {})
    assert differing == []
    # Forward and backward, of packs of few and of many documents, first and later ones.
    assert recorded >= 6
    assert repeated == 2 * 6


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.2)])
def test_training_of_an_adapter_is_the_same_bit_for_bit(dtype, dropout, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe_mixed")
    _, lora = plan_of(folder)
    options = {"lora": lora, "dtype": dtype, "dropout": dropout}
    [(differing, recorded, repeated)] = run_ranks(SINGLE, compare_and_count, folder, options)
    assert differing == []
    assert recorded >= 4
    assert repeated >= 2 * 6


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("uses_lora", [False, True])
def test_data_parallel_ranks_train_the_same_bit_for_bit(uses_lora, overlaps, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe_mixed")
    options = {"lora": plan_of(folder)[1], "dropout": 0.2} if uses_lora else {}
    options["overlaps"] = overlaps
    found = run_ranks(ParallelLayout(world_size=2), compare_and_count, folder, options)
    assert [differing for differing, *_ in found] == [[], []]


def test_layers_of_multi_token_prediction_stay_as_they_are(tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "deepseek_v3")
    options = {"num_next_tokens": 1}
    [(differing, *_)] = run_ranks(SINGLE, compare_and_count, folder, options)
    assert differing == []


def largest_gradients(state, folder):
    """Bytes of gradients that one backward pass hands out, of memory that is not main gradients."""
    handed_out = []

    def grad(output, tensors, *args, **options):
        grads = torch_grad(output, tensors, *args, **options)
        owned = {t.main_grad.data_ptr() for t in tensors if hasattr(t, "main_grad")}
        others = [g for g in grads if g is not None and g.data_ptr() not in owned]
        handed_out.append(sum(g.nbytes for g in others))
        return grads

    torch_grad = torch.autograd.grad
    with mock.patch.object(torch.autograd, "grad", grad):
        train(state, folder, Recorder())
    return max(handed_out)


def test_gradients_of_experts_are_not_kept_until_all_layers_have_theirs(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    # That of hidden states alone: 256 tokens of 64 channels in float32.
    assert run_ranks(SINGLE, largest_gradients, folder) == [4 * 256 * 64]


SELECTIVE = TrainingConfig(recompute_granularity="selective")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("qwen3_moe", {}, ""),
        ("qwen3", {"dtype": torch.float32}, "the model is not in half precision"),
        ("qwen3", {"training": SELECTIVE}, "activations are recomputed"),
        ("qwen3_next_moe", {}, "the model has gated delta nets"),
        (
            "qwen3_moe",
            {"moe": MoEConfig(moe_token_dispatcher_type="allgather")},
            "tokens travel to their experts",
        ),
        (
            "qwen3_moe",
            {"moe": MoEConfig(moe_router_load_balancing_type=("global_aux_loss",))},
            "experts are balanced over the global batch",
        ),
    ],
)
def test_layers_that_cannot_be_recorded_say_why(name, options, reason, tmp_path):
    folder = make_checkpoint(tmp_path, name)
    [(without, found)] = run_ranks(SINGLE, reasons, folder, options)
    assert without.startswith("there is no GPU")
    assert found == reason


def test_without_memory_for_a_recording_training_goes_on(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3_tied")
    assert run_ranks(SINGLE, compare_without_memory, folder) == [([], 3)]
