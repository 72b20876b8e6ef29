"""The report of a precision test: its bounds, its lines and its JSON."""

import dataclasses
import json

import pytest
import torch

from mtrain.verify.report import Excused, PrecisionReport, PrecisionRow, RouterTie, thresholds_for

NAMES = ("layer 0", "logits", "multi-token prediction layer 0")


def row(name, *, with_loss_mask, mean_difference=0.0):
    return PrecisionRow(
        name=name,
        depth=1,
        with_loss_mask=with_loss_mask,
        mean_difference=mean_difference,
        max_difference=0.0,
        max_relative=0.0,
        mean_cosine=1.0,
        min_cosine=1.0,
        departed=0.0,
        excused=0,
        top1_agreement=1.0 if "logits" in name else None,
        mean_kl=0.0 if "logits" in name else None,
    )


@pytest.fixture
def report():
    return PrecisionReport(
        passed=True,
        first_departure=None,
        dtype="float32",
        thresholds=thresholds_for(torch.float32),
        num_texts=2,
        num_tokens=14,
        num_loss_tokens=8,
        excused=Excused(num_tokens=0, is_accepted=True, ties=()),
        rows=tuple(row(name, with_loss_mask=mask) for mask in (False, True) for name in NAMES),
    )


def test_the_bound_of_half_precision_grows_with_depth():
    thresholds = thresholds_for(torch.bfloat16)
    assert thresholds.min_cosine(1) == pytest.approx(1 - 4.4e-4)
    assert thresholds.min_cosine(28) == pytest.approx(1 - 15.2e-4)
    assert thresholds_for(torch.float32).min_cosine(28) is None


def test_a_row_with_a_number_that_is_not_finite_never_passes():
    good = row("layer 0", with_loss_mask=False)
    bad = dataclasses.replace(good, mean_difference=float("nan"))
    for dtype in (torch.float32, torch.bfloat16):
        assert thresholds_for(dtype).passed(good)
        assert not thresholds_for(dtype).passed(bad)


def test_the_report_is_json_of_its_fields(report):
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document.keys() == {field.name for field in dataclasses.fields(report)}
    assert document["passed"] is True
    assert document["dtype"] == "float32"
    assert document["excused"] == {"num_tokens": 0, "is_accepted": True, "ties": []}
    assert document["thresholds"]["max_relative"] == 1e-3
    assert document["rows"][1]["top1_agreement"] == 1
    assert document["not_compared"] == []


def test_numbers_that_are_not_finite_are_null_in_json(report):
    rows = (row("layer 0", with_loss_mask=False, mean_difference=float("inf")),)
    document = dataclasses.replace(report, rows=rows).to_json()
    assert document["rows"][0]["mean_difference"] is None
    json.dumps(document, allow_nan=False)


def test_the_table_has_a_line_a_row_and_ends_with_the_verdict(report):
    lines = report.table()
    assert len(lines) == 1 + 2 * (1 + len(NAMES)) + 1
    assert "14 tokens, 8 of them with a loss" in lines[0]
    starts = [line[: len(NAMES[-1])].strip() for line in lines[1:-1]]
    assert starts == ["all tokens", *NAMES, "with the loss mask", *NAMES]
    # Columns stand below each other, whatever the names are.
    assert len({line.rstrip().rfind("%") for line in (lines[2], lines[4])}) == 1
    assert lines[-1] == (
        "passed (max_relative 0.001, router_tie 1e-05, max_excused 0.1, min_top1 1)"
    )
    failed = dataclasses.replace(report, passed=False, first_departure="layer 1")
    assert failed.table()[-1].startswith("FAILED")
    assert failed.table()[-1].endswith("the first that departs: layer 1")


def test_a_router_tie_has_a_line_before_the_verdict(report):
    tie = RouterTie(text=1, token=30, layer=2, margin=1e-6)
    excused = Excused(num_tokens=3, is_accepted=False, ties=(tie,))
    lines = dataclasses.replace(report, excused=excused).table()
    assert lines[-2] == (
        "TOO MANY to be excused: 3 tokens at or after router ties, as in text 1, token 30, layer 2 "
        "(margin 1.0e-06)"
    )


def test_what_was_not_compared_has_a_line_before_the_verdict(report):
    lines = dataclasses.replace(report, not_compared=("this, because of that",)).table()
    assert lines[-2] == "NOT compared: this, because of that"
