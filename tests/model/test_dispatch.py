from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute

from mtrain.config import MoEConfig
from mtrain.model.dispatch import LocalTokenDispatcher, find_routes
from mtrain.parallel import ParallelLayout
from tests.megatron import load_model, packed_inputs
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

TOKENS, EXPERTS, CHOSEN, HIDDEN = 13, 6, 2, 4


def routed(generator):
    """Weights [tokens, experts] and the map; the last expert gets nothing."""
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, -1] = 0
    values, experts = scores.topk(CHOSEN, dim=1)
    probs = torch.zeros(TOKENS, EXPERTS).scatter(1, experts, values)
    return probs.requires_grad_(), probs > 0


def by_megatron(tokens, probs, routing_map):
    rows, weights, order = permute(tokens, routing_map, probs, num_out_tokens=TOKENS * CHOSEN)
    back = unpermute(rows * weights[:, None], order, tokens.shape, routing_map=routing_map)
    return rows, weights, back


class Config:
    moe_router_topk = CHOSEN


def by_ours(tokens, probs, routing_map):
    dispatcher = LocalTokenDispatcher.__new__(LocalTokenDispatcher)
    dispatcher.config = Config
    sent = dispatcher.dispatch_preprocess(tokens.view(TOKENS, 1, HIDDEN), routing_map, probs)
    rows, counts, weights = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
    assert torch.equal(counts, routing_map.sum(0))
    output = dispatcher.combine_preprocess(rows * weights[:, None])
    back = dispatcher.combine_postprocess(dispatcher.token_combine(output))
    return rows, weights, back.view(TOKENS, HIDDEN)


def compare(state):
    generator = torch.Generator().manual_seed(0)
    probs, routing_map = routed(generator)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    answers = []
    for way in (by_megatron, by_ours):
        rows, weights, back = way(tokens, probs, routing_map)
        grads = torch.autograd.grad((back**2).sum() + (rows**3).sum(), (tokens, probs))
        answers.append((rows, weights, back, *grads))
    theirs, ours = answers
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(one, other)


def test_rows_lie_as_megatron_core_sorts_them_and_come_back() -> None:
    run_ranks(ParallelLayout(), compare)


def test_routes_are_each_others_inverse() -> None:
    _, routing_map = routed(torch.Generator().manual_seed(1))
    routes = find_routes(routing_map, CHOSEN)
    rows = routes.rows.reshape(-1)
    assert torch.equal(rows[routes.places], torch.arange(TOKENS * CHOSEN))
    # Sorted by expert, and by token within one.
    keys = routes.experts.reshape(-1)[routes.places] * TOKENS + routes.places // CHOSEN
    assert torch.equal(keys, keys.sort().values)


def losses_of(state, folder, moe):
    (model,) = load_model(state, folder, moe=moe)
    dispatcher = type(model.decoder.layers[-1].mlp.token_dispatcher).__name__
    losses, _ = model(**packed_inputs([9, 4, 12], 131))
    losses.sum().backward()
    grads = [weight.grad for weight in model.parameters()]
    return dispatcher, losses.detach(), grads


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_model_gives_the_same_whoever_carries_its_tokens(name, tmp_path) -> None:
    folder = make_checkpoint(tmp_path, name)
    local, losses, grads = run_ranks(ParallelLayout(), losses_of, folder, MoEConfig())[0]
    # A capacity that drops nothing.
    moe = MoEConfig(moe_expert_capacity_factor=50.0)
    other, expected, other_grads = run_ranks(ParallelLayout(), losses_of, folder, moe)[0]
    assert (local, other) == ("LocalTokenDispatcher", "MoEAlltoAllTokenDispatcher")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def permute_as_the_kernel(tokens, routing_map, probs, **options):
    """Of Transformer Engine: weights get a gradient with that of tokens only."""
    return permute(
        tokens, routing_map, probs if tokens.requires_grad else probs.detach(), **options
    )


def router_gradients(state, folder):
    """Of a router with nothing in front of it that is trained, without and with the kernel."""
    [model] = load_model(state, folder, moe=MoEConfig(moe_expert_capacity_factor=50.0))
    layer = model.decoder.layers[-1].mlp
    tokens = torch.randn(12, 1, model.config.hidden_size)
    grads = []
    for kernel in (permute, permute_as_the_kernel):
        layer.sorts_by_kernel = kernel is permute_as_the_kernel
        with mock.patch("megatron.core.transformer.moe.token_dispatcher.permute", kernel):
            output, _ = layer(tokens)
        grads += torch.autograd.grad((output**2).sum(), layer.router.weight)
    return grads


def test_a_router_learns_behind_tokens_that_want_no_gradient(tmp_path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    [(expected, found)] = run_ranks(ParallelLayout(), router_gradients, folder)
    assert expected.norm() > 0
    assert torch.equal(found, expected)


def dispatcher_of(state, folder):
    chunks = load_model(state, folder)
    return {
        type(layer.mlp.token_dispatcher).__name__
        for chunk in chunks
        for layer in chunk.decoder.layers
        if hasattr(layer.mlp, "token_dispatcher")
    }


def test_tokens_travel_where_experts_are_on_several_ranks(tmp_path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe")
    layout = ParallelLayout(world_size=2, ep_size=2)
    assert run_ranks(layout, dispatcher_of, folder) == [{"MoEAlltoAllTokenDispatcher"}] * 2
