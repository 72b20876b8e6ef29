"""The figures of multi-token prediction and the verdict, on made-up outputs."""

import dataclasses

import pytest
import torch

from mtrain.verify.precision import NextTokenOutputs, compare_outputs
from tests.verify.test_precision import DEPARTURE, LARGE, LENGTH, SMALL, VOCAB, Routed, rows_of

LAYER_0, LOGITS_0, LAYER_1, LOGITS_1 = NAMES = [
    f"multi-token prediction {what} {number}" for number in (0, 1) for what in ("layer", "logits")
]


class Predicting(Routed):
    """With two layers of multi-token prediction behind the 3 others."""

    def __init__(self):
        super().__init__()
        self.theirs, self.ours = (with_next_tokens(outputs) for outputs in (self.theirs, self.ours))

    @property
    def changed(self):
        """What our model makes of the second text."""
        return self.ours[1].next_tokens


def with_next_tokens(outputs):
    generator = torch.Generator().manual_seed(1)
    return [
        dataclasses.replace(
            one,
            next_tokens=NextTokenOutputs(
                hidden_states=torch.randn(2, LENGTH, 8, generator=generator),
                logits=torch.randn(2, LENGTH, VOCAB, generator=generator),
                router_margins=torch.full((2, LENGTH), LARGE),
            ),
        )
        for one in outputs
    ]


@pytest.fixture
def model():
    return Predicting()


def test_multi_token_prediction_comes_last_and_is_deeper(model):
    report = model.report(torch.bfloat16)
    assert report.passed
    assert [row.name for row in report.rows] == 2 * [
        *("layer 0", "layer 1", "layer 2", "logits"),
        *NAMES,
    ]
    assert [row.depth for row in report.rows] == 2 * [1, 2, 3, 3, 4, 4, 5, 5]
    assert rows_of(report, LOGITS_1)[0].top1_agreement == 1


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("what", ["layer", "logits"])
def test_a_departure_in_multi_token_prediction_is_named(what, number, model):
    tensor = model.changed.hidden_states if what == "layer" else model.changed.logits
    tensor[number, 2] *= DEPARTURE
    report = model.report()
    assert not report.passed
    assert report.first_departure == f"multi-token prediction {what} {number}"
    model.changed.hidden_states[0, 2, 0] = torch.nan
    assert model.report(torch.bfloat16).first_departure == LAYER_0


def test_what_the_main_model_does_wrong_is_named_before_it(model):
    model.changed.hidden_states[0] *= DEPARTURE
    model.ours[1].logits[3] *= DEPARTURE
    assert model.report().first_departure == "logits"


def test_what_comes_after_the_text_counts_nowhere(model):
    """The last token of the first layer, and the last two of the second one."""
    for layer in (0, 1):
        model.changed.hidden_states[layer, -1 - layer :] = torch.nan
        model.changed.logits[layer, -1 - layer :] = -9
    report = model.report()
    assert report.passed, "\n".join(report.table())
    model.changed.hidden_states[1, -3] *= DEPARTURE
    report = model.report()
    assert report.first_departure == LAYER_1
    assert rows_of(report, LAYER_1)[0].departed == pytest.approx(1 / (2 * (LENGTH - 2)))


def test_a_token_counts_with_the_loss_mask_where_what_it_predicts_has_a_loss(model):
    for text in model.texts:
        text.loss_mask[:] = False
        text.loss_mask[10:12] = True
    for layer, (first, last) in ((0, (9, 10)), (1, (8, 9))):
        model.changed.hidden_states[layer, : first - 1] *= DEPARTURE
        model.changed.hidden_states[layer, last + 1 :] *= DEPARTURE
    report = model.report()
    for name in (LAYER_0, LAYER_1):
        whole, masked = rows_of(report, name)
        assert whole.departed > 0
        assert masked.departed == masked.max_difference == 0
    model.changed.hidden_states[0, 9] *= DEPARTURE
    assert rows_of(model.report(), LAYER_0)[1].departed == pytest.approx(1 / 4)


def test_a_tie_in_multi_token_prediction_excuses_what_follows(model):
    model.theirs[1].next_tokens.router_margins[0, 30] = SMALL
    model.changed.hidden_states[0, 30] *= DEPARTURE
    model.changed.hidden_states[1, 33] *= DEPARTURE
    report = model.report()
    assert report.passed, "\n".join(report.table())
    assert [row.excused for row in report.rows] == 2 * [0, 0, 0, 0, 1, 0, 1, 0]
    (tie,) = report.excused.ties
    assert (tie.token, tie.layer) == (30, 3)
    model.changed.hidden_states[0, 29] *= DEPARTURE
    assert model.report().first_departure == LAYER_0


def test_a_tie_before_it_excuses_multi_token_prediction(model):
    model.tie(1, 30)
    model.depart(1, 30)
    model.changed.logits[0, 31] *= DEPARTURE
    report = model.report()
    assert report.passed, "\n".join(report.table())
    assert rows_of(report, LOGITS_0)[0].excused == 1


def test_models_of_which_one_has_no_multi_token_prediction_are_not_compared(model):
    without = [dataclasses.replace(one, next_tokens=None) for one in model.ours]
    with pytest.raises(ValueError, match="other sizes"):
        compare_outputs(model.ours, without, model.texts, dtype=torch.float32)
    report = compare_outputs(
        without, without, model.texts, dtype=torch.float32, not_compared=["it, because"]
    )
    assert report.passed
    assert report.not_compared == ("it, because",)
