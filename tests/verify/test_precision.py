"""T42: the figures and the verdict, on made-up outputs."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from mtrain.verify.precision import ModelOutputs, compare_outputs
from mtrain.verify.texts import TokenText

LENGTHS = (5, 9)
VOCAB = 11


@pytest.fixture
def texts():
    return [
        TokenText(
            input_ids=torch.zeros(length, dtype=torch.int64), loss_mask=torch.arange(length) >= 3
        )
        for length in LENGTHS
    ]


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return [
        ModelOutputs(
            hidden_states=torch.randn(3, length, 8, generator=generator),
            logits=torch.randn(length, VOCAB, generator=generator),
        )
        for length in LENGTHS
    ]


def changed(outputs, change):
    """A copy in which `change(hidden_states, logits)` of the second text was made in place."""
    copies = [
        ModelOutputs(hidden_states=one.hidden_states.clone(), logits=one.logits.clone())
        for one in outputs
    ]
    change(copies[1].hidden_states, copies[1].logits)
    return copies


def rows_of(report, name):
    """(without, with) the loss mask."""
    return tuple(row for row in report.rows if row.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_outputs_pass(dtype, outputs, texts):
    report = compare_outputs(outputs, outputs, texts, dtype=dtype)
    assert report.passed
    assert report.first_departure is None
    assert (report.num_texts, report.num_tokens, report.num_loss_tokens) == (2, 14, 8)
    assert [row.name for row in report.rows] == 2 * ["layer 0", "layer 1", "layer 2", "logits"]
    assert all(row.max_difference == row.departed == 0 for row in report.rows)
    assert rows_of(report, "logits")[1].top1_agreement == 1


def test_figures_are_what_their_names_say(outputs, texts):
    ours = changed(outputs, lambda hidden, logits: (hidden[1, 4].add_(0.5), logits.mul_(1.5)))
    report = compare_outputs(ours, outputs, texts, dtype=torch.float32)
    whole, masked = rows_of(report, "layer 1")
    assert whole.mean_difference == pytest.approx(0.5 / 14)
    assert masked.mean_difference == pytest.approx(0.5 / 8)
    theirs = outputs[1].hidden_states[1, 4]
    assert whole.max_difference == pytest.approx(0.5)
    assert whole.max_relative == pytest.approx(0.5 / theirs.abs().max().item())
    cosine = F.cosine_similarity(theirs, theirs + 0.5, dim=0).item()
    assert whole.min_cosine == pytest.approx(cosine, abs=1e-6)
    assert whole.mean_cosine == pytest.approx((13 + cosine) / 14, abs=1e-6)
    assert whole.departed == pytest.approx(1 / 14)
    logits, _ = rows_of(report, "logits")
    kl = F.kl_div(
        ours[1].logits.log_softmax(-1),
        outputs[1].logits.log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    assert logits.mean_kl == pytest.approx(kl.item() / 14, rel=1e-4)


def test_the_loss_mask_leaves_out_what_is_before_the_answer(outputs, texts):
    ours = changed(outputs, lambda hidden, _: hidden[0, 1].add_(1))
    report = compare_outputs(ours, outputs, texts, dtype=torch.float32)
    whole, masked = rows_of(report, "layer 0")
    assert whole.max_difference == pytest.approx(1)
    assert masked.max_difference == 0
    assert not report.passed


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda hidden, _: hidden[1:, 2].mul_(1.01), "layer 1"),
        (lambda hidden, logits: (hidden[2].neg_(), logits.neg_()), "layer 2"),
        (lambda _, logits: logits[3].add_(0.1), "logits"),
        (lambda hidden, _: hidden[0, 0, 0].fill_(torch.nan), "layer 0"),
        (lambda _, logits: logits[0, 0].fill_(torch.inf), "logits"),
    ],
)
def test_the_first_departure_is_named(change, first, outputs, texts):
    report = compare_outputs(changed(outputs, change), outputs, texts, dtype=torch.float32)
    assert not report.passed
    assert report.first_departure == first


def test_small_numbers_are_not_hidden_behind_the_large_ones_of_another_token(outputs, texts):
    def enlarge(hidden, _):
        hidden[0, 0].mul_(1e4)

    theirs = changed(outputs, enlarge)
    ours = changed(theirs, lambda hidden, _: hidden[0, 5].mul_(1.5))
    report = compare_outputs(ours, theirs, texts, dtype=torch.float32)
    assert report.first_departure == "layer 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["ours", "theirs", "both"])
def test_nan_never_passes(place, dtype, outputs, texts):
    """T46: also where both have it, which a difference of 0 might hide."""
    broken = changed(outputs, lambda hidden, _: hidden[1, 0].fill_(torch.nan))
    ours, theirs = {
        "ours": (broken, outputs),
        "theirs": (outputs, broken),
        "both": (broken, broken),
    }[place]
    report = compare_outputs(ours, theirs, texts, dtype=dtype)
    assert report.first_departure == "layer 1"
    row = report.to_json()["rows"][1]
    assert row["mean_difference"] is None
    json.dumps(report.to_json(), allow_nan=False)


def test_words_that_share_the_highest_logit_agree(outputs, texts):
    def tie(_, logits):
        logits[0, [2, 7]] = 9.0

    theirs = changed(outputs, tie)
    ours = changed(theirs, lambda _, logits: logits[0, 7].add_(1e-4))
    report = compare_outputs(ours, theirs, texts, dtype=torch.float32)
    assert rows_of(report, "logits")[0].top1_agreement == 1
    other = changed(theirs, lambda _, logits: logits[0, 5].fill_(9.001))
    report = compare_outputs(other, theirs, texts, dtype=torch.float32)
    assert rows_of(report, "logits")[0].top1_agreement == pytest.approx(13 / 14)
    assert report.first_departure == "logits"


def test_half_precision_is_judged_by_means(outputs, texts):
    def disturb(size):
        noise = torch.Generator().manual_seed(1)
        return lambda hidden, _: hidden[0].add_(
            size * torch.randn(hidden[0].shape, generator=noise)
        )

    near = changed(outputs, disturb(0.01))
    assert compare_outputs(near, outputs, texts, dtype=torch.bfloat16).passed
    assert not compare_outputs(near, outputs, texts, dtype=torch.float32).passed
    far = changed(outputs, disturb(0.2))
    assert compare_outputs(far, outputs, texts, dtype=torch.bfloat16).first_departure == "layer 0"


def test_logits_are_as_deep_as_the_last_layer(outputs, texts):
    report = compare_outputs(outputs, outputs, texts, dtype=torch.bfloat16)
    assert [row.depth for row in report.rows] == [1, 2, 3, 3] * 2


LENGTH = 40
SMALL, LARGE = 1e-6, 1e-4
DEPARTURE = 1.01


class Routed:
    """Two texts of 40 tokens of a model with routers in its 3 layers, far from any tie."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.texts = [
            TokenText(
                input_ids=torch.zeros(LENGTH, dtype=torch.int64),
                loss_mask=torch.ones(LENGTH, dtype=torch.bool),
            )
            for _ in range(2)
        ]
        self.theirs = [
            ModelOutputs(
                hidden_states=torch.randn(3, LENGTH, 8, generator=generator),
                logits=torch.randn(LENGTH, VOCAB, generator=generator),
                router_margins=torch.full((3, LENGTH), LARGE),
            )
            for _ in range(2)
        ]
        self.ours = [
            ModelOutputs(hidden_states=one.hidden_states.clone(), logits=one.logits.clone())
            for one in self.theirs
        ]

    def tie(self, layer, token):
        """A router near a tie in the second text, without any consequence yet."""
        self.theirs[1].router_margins[layer, token] = SMALL

    def depart(self, layers, tokens):
        self.ours[1].hidden_states[layers, tokens] *= DEPARTURE

    def report(self, dtype=torch.float32):
        return compare_outputs(self.ours, self.theirs, self.texts, dtype=dtype)


@pytest.fixture
def routed():
    return Routed()


def test_a_token_that_departs_at_a_tie_is_excused_and_reported(routed):
    routed.tie(1, 30)
    routed.depart(slice(1, None), 30)
    routed.ours[1].logits[30].neg_()
    report = routed.report()
    assert report.passed
    assert (report.excused.num_tokens, report.excused.is_accepted) == (1, True)
    (tie,) = report.excused.ties
    assert (tie.text, tie.token, tie.layer) == (1, 30, 1)
    assert tie.margin == pytest.approx(SMALL)
    assert [row.excused for row in report.rows] == 2 * [0, 1, 1, 1]
    # What is left agrees in every figure.
    assert all(row.departed == row.max_difference == 0 for row in report.rows)
    assert report.to_json()["excused"] == {
        "num_tokens": 1,
        "is_accepted": True,
        "ties": ({"text": 1, "token": 30, "layer": 1, "margin": tie.margin},),
    }
    assert report.table()[-2] == (
        "excused: 1 tokens at or after router ties, as in text 1, token 30, layer 1 "
        "(margin 1.0e-06)"
    )


def test_a_token_that_departs_without_a_tie_fails(routed):
    """T46: one token is enough; a model without routers has no ties at all."""
    routed.depart(slice(1, None), 30)
    report = routed.report()
    assert report.first_departure == "layer 1"
    assert report.excused.num_tokens == 0
    routed.theirs[1] = dataclasses.replace(routed.theirs[1], router_margins=None)
    assert routed.report().first_departure == "layer 1"


@pytest.mark.parametrize(
    ("layers", "token"),
    [(slice(0, None), 30), (slice(2, None), 30), (slice(1, None), 29)],
    ids=["before_the_tie", "after_the_tie", "of_another_token"],
)
def test_a_tie_excuses_only_what_departs_there_for_the_first_time(layers, token, routed):
    routed.tie(1, 30)
    routed.depart(layers, token)
    report = routed.report()
    assert report.first_departure == f"layer {layers.start}"
    assert report.excused.ties == ()


def test_what_comes_after_an_excused_token_is_excused_from_the_next_layer_on(routed):
    routed.tie(1, 30)
    routed.depart(1, 30)
    routed.depart(2, slice(32, 35))
    # A word that changes within the bound.
    theirs, ours = routed.theirs[1].logits, routed.ours[1].logits
    theirs[36, :2] = 9
    theirs[36, 0] += 1e-5
    ours[36] = theirs[36]
    ours[36, 1] += 2e-5
    report = routed.report()
    assert report.passed, "\n".join(report.table())
    assert [row.excused for row in report.rows] == 2 * [0, 1, 3, 1]
    assert report.excused.num_tokens == 5
    assert len(report.excused.ties) == 1


@pytest.mark.parametrize(
    ("text", "layer", "token"),
    [(1, 1, 31), (1, 2, 29), (0, 2, 31)],
    ids=["same_layer", "before_it", "other_text"],
)
def test_what_cannot_see_an_excused_token_is_not_excused(text, layer, token, routed):
    routed.tie(1, 30)
    routed.depart(slice(1, None), 30)
    routed.ours[text].hidden_states[layer, token] *= DEPARTURE
    report = routed.report()
    assert report.first_departure == f"layer {layer}"
    assert report.excused.num_tokens == 1


@pytest.mark.parametrize(("num_tokens", "passed"), [(8, True), (9, False)])
def test_more_than_a_tenth_of_the_tokens_is_not_excused(num_tokens, passed, routed):
    """Nor is any of them then; 80 tokens in all."""
    for token in range(num_tokens):
        routed.tie(1, token)
        routed.depart(1, token)
    report = routed.report()
    assert report.passed is passed
    assert report.excused.num_tokens == len(report.excused.ties) == num_tokens
    assert report.excused.is_accepted is passed
    if not passed:
        assert report.first_departure == "layer 1"
        assert all(row.excused == 0 for row in report.rows)
        assert report.table()[-2].startswith("TOO MANY to be excused: 9 tokens")


def test_no_more_than_a_tenth_of_the_tokens_with_a_loss_is_excused(routed):
    for text in routed.texts:
        text.loss_mask[:-2] = False
    routed.tie(1, LENGTH - 1)
    routed.depart(1, LENGTH - 1)
    assert not routed.report().passed


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_tie_excuses_no_nan_and_no_infinity(number, routed):
    routed.tie(1, 30)
    routed.ours[1].hidden_states[1, 30, 0] = number
    report = routed.report()
    assert report.first_departure == "layer 1"
    assert report.excused.num_tokens == 0


def test_half_precision_excuses_nothing(routed):
    routed.tie(1, 30)
    routed.ours[1].hidden_states[1, 30].neg_()
    report = routed.report(torch.bfloat16)
    assert report.first_departure == "layer 1"
    assert report.excused.ties == ()


def test_models_of_other_sizes_are_not_compared(outputs, texts):
    fewer = [
        ModelOutputs(hidden_states=one.hidden_states[:2], logits=one.logits) for one in outputs
    ]
    with pytest.raises(ValueError, match="other sizes"):
        compare_outputs(fewer, outputs, texts, dtype=torch.float32)
