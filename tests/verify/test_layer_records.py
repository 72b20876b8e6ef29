"""What layers give and how near their routers are to a tie, seen from outside."""

import torch
from torch import nn

from mtrain.verify.layer_records import recorded, router_margins


class Router(nn.Module):
    top_k = 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

    def forward(self, hidden):
        logits = hidden.squeeze(0) @ self.weight
        return logits, logits.softmax(-1)


class Layer(nn.Module):
    def __init__(self, router=None):
        super().__init__()
        self.router = router

    def forward(self, hidden):
        if self.router is not None:
            self.router(hidden)
        return (hidden + 1,)


def test_outputs_and_margins_are_those_of_the_last_run():
    layers = [Layer(), Layer(Router())]
    hidden = torch.tensor([[[1.0, 3.0], [5.0, 4.0]]], dtype=torch.bfloat16).float()
    with recorded(layers) as records:
        for start in (torch.zeros_like(hidden), hidden):
            outputs = start
            for layer in layers:
                (outputs,) = layer(outputs)
        found = records.hidden_states()
    assert torch.equal(found, torch.stack([hidden[0] + 1, hidden[0] + 2]))
    margins = records.router_margins()
    assert margins[0].isinf().all()
    torch.testing.assert_close(margins[1], torch.tensor([2 / 4, 1 / 6]))


def test_hooks_are_gone_afterwards():
    layers = [Layer(Router())]
    with recorded(layers):
        pass
    assert not any(module._forward_hooks for module in layers[0].modules())


def test_a_margin_lies_between_the_last_chosen_and_the_first_not_chosen():
    logits = torch.tensor([[1.0, -4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(router_margins(logits, 2), torch.tensor([1 / 4, 0.0, 0.0]))
    torch.testing.assert_close(router_margins(logits, 3), torch.tensor([5 / 4, 4 / 5, 0.0]))
    assert router_margins(logits, 4).isinf().all()
