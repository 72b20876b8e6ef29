"""T42: the figures and the verdict, on made-up outputs."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from mtrain.verify.precision import ModelOutputs, thresholds_for
from mtrain.verify.precision import compare_outputs as compare_any_outputs
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


def compare_outputs(*arguments, dtype, has_experts=False):
    return compare_any_outputs(*arguments, dtype=dtype, has_experts=has_experts)


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


def test_the_bound_of_half_precision_grows_with_depth():
    thresholds = thresholds_for(torch.bfloat16, has_experts=False)
    assert thresholds.min_cosine(1) == pytest.approx(1 - 4.4e-4)
    assert thresholds.min_cosine(28) == pytest.approx(1 - 15.2e-4)
    assert thresholds_for(torch.float32, has_experts=True).min_cosine(28) is None


def test_logits_are_as_deep_as_the_last_layer(outputs, texts):
    report = compare_outputs(outputs, outputs, texts, dtype=torch.bfloat16)
    assert [row.depth for row in report.rows] == [1, 2, 3, 3] * 2


@pytest.mark.parametrize("has_experts", [False, True])
def test_a_router_near_a_tie_may_send_a_token_elsewhere(has_experts):
    """One token in 200 departs: a fault without experts, allowed with them."""
    length = 200
    texts = [
        TokenText(
            input_ids=torch.zeros(length, dtype=torch.int64),
            loss_mask=torch.ones(length, dtype=torch.bool),
        )
    ]
    generator = torch.Generator().manual_seed(0)
    theirs = ModelOutputs(
        hidden_states=torch.randn(2, length, 8, generator=generator),
        logits=torch.randn(length, VOCAB, generator=generator),
    )

    def departing(num_tokens):
        hidden = theirs.hidden_states.clone()
        hidden[1, :num_tokens] *= 1.01
        return [ModelOutputs(hidden_states=hidden, logits=theirs.logits)]

    options = {"dtype": torch.float32, "has_experts": has_experts}
    report = compare_outputs(departing(1), [theirs], texts, **options)
    assert report.passed is has_experts
    assert rows_of(report, "layer 1")[0].departed == pytest.approx(1 / length)
    report = compare_outputs(departing(3), [theirs], texts, **options)
    assert report.first_departure == "layer 1"


def test_the_report_is_json_of_its_fields(outputs, texts):
    report = compare_outputs(outputs, outputs, texts, dtype=torch.float32)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document.keys() == {field.name for field in dataclasses.fields(report)}
    assert document["passed"] is True
    assert document["dtype"] == "float32"
    assert document["thresholds"]["max_relative"] == 1e-3
    assert document["rows"][3]["top1_agreement"] == 1


def test_the_table_has_a_line_a_row_and_ends_with_the_verdict(outputs, texts):
    lines = compare_outputs(outputs, outputs, texts, dtype=torch.float32).table()
    assert len(lines) == 1 + 2 * (1 + 4) + 1
    assert "14 tokens, 8 of them with a loss" in lines[0]
    assert len({len(line) for line in lines[1:-1] if "layer" not in line}) == 1
    assert lines[-1] == "passed (max_relative 0.001, min_top1 1)"
    ours = changed(outputs, lambda hidden, _: hidden[1].add_(1))
    lines = compare_outputs(ours, outputs, texts, dtype=torch.float32).table()
    assert lines[-1].startswith("FAILED")
    assert lines[-1].endswith("the first that departs: layer 1")


def test_models_of_other_sizes_are_not_compared(outputs, texts):
    fewer = [
        ModelOutputs(hidden_states=one.hidden_states[:2], logits=one.logits) for one in outputs
    ]
    with pytest.raises(ValueError, match="other sizes"):
        compare_outputs(fewer, outputs, texts, dtype=torch.float32)
