import torch
from megatron.core.transformer.mlp import MLP
from torch.autograd.graph import saved_tensors_hooks

from mtrain.parallel import ParallelLayout
from tests.megatron import load_model, packed_inputs
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint


def outputs(state, folder):
    (model,) = load_model(state, folder)
    mlp = model.decoder.layers[0].mlp
    hidden = torch.randn(7, 1, model.config.hidden_size)
    ours, _ = mlp(hidden)
    theirs, _ = MLP.forward(mlp, hidden)
    losses, _ = model(**packed_inputs([5, 4], 131))
    is_finite = torch.isfinite(losses).all().item()
    return mlp.is_swiglu, ours.detach(), theirs.detach(), is_finite


def test_the_activation_of_llama_is_ours_and_gives_the_same(tmp_path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3")
    [(is_swiglu, ours, theirs, is_finite)] = run_ranks(ParallelLayout(), outputs, folder)
    assert is_swiglu
    assert is_finite
    torch.testing.assert_close(ours, theirs)


def test_other_activations_are_those_of_megatron_core(tmp_path) -> None:
    for name in ("gemma3", "gpt2"):
        folder = make_checkpoint(tmp_path / name, name)
        [(is_swiglu, ours, theirs, _)] = run_ranks(ParallelLayout(), outputs, folder)
        assert not is_swiglu
        assert torch.equal(ours, theirs)


def kept_for_backward(state, folder):
    """Widths of what is kept, and results, with SwiGLU in the linear and before it."""
    (model,) = load_model(state, folder)
    mlp = model.decoder.layers[0].mlp
    inputs = torch.randn(7, 1, model.config.hidden_size)
    found = []
    for fuses in (True, False):
        mlp.linear_fc2.fuses_swiglu = lambda _hidden, fuses=fuses: fuses
        kept = []
        hidden = inputs.clone().requires_grad_()
        with saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            output, _ = mlp(hidden)
        mlp.zero_grad()
        output.square().sum().backward()
        grads = [hidden.grad, *(weight.grad.clone() for weight in mlp.parameters())]
        widths = {x.shape[-1] for x in kept if x.shape[0] == 7}
        found.append((widths, [output.detach(), *grads]))
    return model.config.ffn_hidden_size, found


def test_the_linear_behind_it_may_apply_the_activation_and_keep_none(tmp_path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3")
    [(inner, found)] = run_ranks(ParallelLayout(), kept_for_backward, folder)
    (fused, ours), (plain, theirs) = found
    assert inner in plain
    assert fused == plain - {inner}
    assert 2 * inner in fused
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
