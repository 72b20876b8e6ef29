"""Keeps what layers of a Hugging Face model give, and how near their routers are to a tie.

The one thing to know: forward hooks see it, so the model runs as its class has it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


class LayerRecords:
    """What layers gave when they ran last."""

    def __init__(self) -> None:
        self._hidden_states: dict[int, torch.Tensor] = {}
        self._margins: dict[int, torch.Tensor] = {}

    def hidden_states(self) -> torch.Tensor:
        """Outputs of the layers, float32 [layers, tokens, hidden] on the CPU."""
        return torch.stack([self._hidden_states[index] for index in range(self._num_layers)])

    def router_margins(self) -> torch.Tensor:
        """See `router_margins`; float32 [layers, tokens], infinite in layers without a router."""
        no_router = torch.full(self._hidden_states[0].shape[:1], torch.inf)
        return torch.stack(
            [self._margins.get(index, no_router) for index in range(self._num_layers)]
        )

    @property
    def _num_layers(self) -> int:
        return len(self._hidden_states)

    def keep_hidden_states(self, index: int) -> Callable[..., None]:
        """A forward hook for a decoder layer."""

        def keep(_layer: object, _inputs: object, output: torch.Tensor) -> None:
            # Some layers return a tuple, and some a batch.
            hidden = output[0] if isinstance(output, tuple) else output
            self._hidden_states[index] = hidden.squeeze(0).to("cpu", torch.float32, copy=True)

        return keep

    def keep_margins(self, index: int) -> Callable[..., None]:
        """A forward hook for the router of a decoder layer."""

        def keep(router: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            self._margins[index] = _margins_of(router, output)

        return keep


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[LayerRecords]:
    """Keeps what decoder layers give, as long as it is open."""
    records = LayerRecords()
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            keep = records.keep_hidden_states(index)
            hooks.callback(layer.register_forward_hook(keep).remove)
            for router in _routers(layer):
                keep = records.keep_margins(index)
                hooks.callback(router.register_forward_hook(keep).remove)
        yield records


def _margins_of(router: nn.Module, output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    # Routers of transformers 5 return their logits [tokens, experts] first.
    scores = output[0].to("cpu", torch.float32)
    bias = router._buffers.get("e_score_correction_bias")
    if bias is not None:
        scores = scores.sigmoid() + bias.to("cpu", torch.float32)
    margins = router_margins(scores, router.top_k)
    num_groups = getattr(router, "num_group", None) or 1
    if num_groups > 1:
        # Either the choice of groups is near a tie, or that of experts in them.
        best = scores.view(len(scores), num_groups, -1).topk(1 if bias is None else 2).values
        margins = router_margins(best.sum(-1), router.topk_group)
        margins = margins.minimum(_margins_in_groups(scores, output[2].cpu(), num_groups))
    return margins


def _routers(layer: nn.Module) -> list[nn.Module]:
    """The router of a decoder layer, or none: what has both a weight and a number to choose.

    Source: `Qwen3MoeTopKRouter` in transformers; routers of other families look the same.
    """
    routers = [
        module
        for module in layer.modules()
        if hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    assert len(routers) <= 1, "a decoder layer has one router"
    return routers


def router_margins(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How far each token is from a choice of other experts.

    Args:
        logits: float32 [tokens, experts] of a router.
        top_k: Experts of a token.

    Returns:
        [tokens], what lies between the lowest logit that was chosen and the highest that was not,
        relative to the largest number among the token's logits; infinite where all are chosen.
    """
    if top_k >= logits.shape[-1]:
        return torch.full(logits.shape[:1], torch.inf)
    best = logits.topk(top_k + 1, dim=-1).values
    largest = logits.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (best[:, -2] - best[:, -1]) / largest


def _margins_in_groups(scores: torch.Tensor, chosen: torch.Tensor, num_groups: int) -> torch.Tensor:
    """As `router_margins`, of the groups that a token's experts are in.

    Args:
        scores: float32 [tokens, experts].
        chosen: int64 [tokens, top_k], the experts of each token.
        num_groups: Groups of experts.
    """
    group_size = scores.shape[1] // num_groups
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    has_chosen = is_chosen.view(len(scores), num_groups, group_size).any(-1)
    is_near = has_chosen.repeat_interleave(group_size, dim=1) & ~is_chosen
    lowest = scores.masked_fill(~is_chosen, torch.inf).amin(-1)
    highest = scores.masked_fill(~is_near, -torch.inf).amax(-1)
    return (lowest - highest) / scores.abs().amax(-1)
