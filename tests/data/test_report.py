import numpy as np

from mtrain.data.encode import Drop, Encoded, Why
from mtrain.data.report import PreparationReport, Tally


def sample(length, truncated=False):
    labels = np.full(length, -100, dtype=np.int32)
    labels[0] = 7
    return Encoded(np.arange(length, dtype=np.int32), labels, "f, line 1", truncated)


def filled_tally():
    tally = Tally(rows=6, bad_rows=2)
    drops = [Drop(Why.TOO_LONG), Drop(Why.REFUSED, "odd"), Drop(Why.NO_LABEL)]
    kept = tally.add([sample(5), *drops, sample(9, truncated=True)])
    kept += tally.add([Drop(Why.REFUSED, "odd")])
    assert [len(encoded.input_ids) for encoded in kept] == [5, 9]
    return tally


def test_every_row_is_counted_once():
    report = filled_tally().report()
    assert report.rows == report.kept + report.too_long + report.refused + report.no_label
    assert (report.kept, report.truncated, report.bad_rows) == (2, 1, 2)
    assert (report.tokens, report.label_tokens) == (14, 2)
    assert (report.longest, report.max_token_id) == (9, 8)
    assert report.refusals == {"odd": 2}


def test_the_summary_names_what_was_left_out():
    summary = filled_tally().report().summary()
    assert summary.startswith(
        "2 of 6 rows kept; 1 too long; 2 refused (2 x odd); 1 without a label"
    )
    assert "2 bad lines; 1 truncated; 14 tokens, 2 with loss; longest 9" in summary


def test_a_stored_report_comes_back_marked_as_reused(tmp_path):
    report = PreparationReport(
        train=filled_tally().report(),
        validation=None,
        max_length=9,
        pad_token_id=0,
        seconds=1.5,
        reused=False,
    )
    report.write(tmp_path / "report.json")
    back = PreparationReport.read(tmp_path / "report.json")
    assert back.reused
    assert back.train == report.train
    assert (back.validation, back.max_length) == (None, 9)
