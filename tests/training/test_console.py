import dataclasses

import pytest

from mtrain.training.console import console_line
from mtrain.training.metrics import LogRecord

RECORD = LogRecord(
    step=55,
    total_steps=100,
    epoch=0.29352,
    loss=7.07321,
    token_accuracy=0.051458,
    grad_norm=1.9655,
    learning_rate=0.00052769,
    consumed_samples=575,
    consumed_tokens=112310,
    tokens_per_second_per_gpu=278.19,
    padded_tokens_per_second_per_gpu=279.28,
    tflops_per_gpu=407.8,
    mfu=0.4123,
    hfu=0.4321,
    memory_gib=1.1513,
    seconds_per_step=3.6666,
    data_share=0.0003122,
    padding_ratio=0.0039062,
    eta_seconds=4128.33,
    skipped_steps=0,
)


def line_of(record: LogRecord) -> str:
    return console_line(record.as_dict(), step=55, total_steps=100, kind="train")


def test_a_line_has_every_number_with_its_unit() -> None:
    assert line_of(RECORD) == (
        "train 55/100 | epoch 0.29 | loss 7.0732 accuracy 5.1% grad norm 1.97 lr 5.28e-04"
        " | 278 tokens/s/gpu (279 padded) padding 0.4% MFU 41.2% 1.2 GiB"
        " | 3.67 s/step data 0.0% | 575 samples 112,310 tokens | ETA 1:08:48"
    )


def test_an_evaluation_is_a_line_too() -> None:
    values = {"loss": 2.0, "token_accuracy": 0.5, "num_tokens": 6000}
    assert console_line(values, step=5, total_steps=9, kind="eval") == (
        "eval 5/9 | loss 2.0000 accuracy 50.0% | 6,000 tokens"
    )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LogRecord)])
def test_no_number_is_left_out(field) -> None:
    """A field that is added to the record appears, worded or not; but two that MFU stands for."""
    if field in ("step", "total_steps", "tflops_per_gpu", "hfu"):
        return
    base = dataclasses.replace(RECORD, **dict.fromkeys(("mfu", "grad_norm"), None))
    lines = [line_of(dataclasses.replace(base, **{field: value})) for value in (1, 77)]
    assert lines[0] != lines[1]


def test_a_number_without_a_wording_is_shown_by_its_name() -> None:
    line = console_line({"novel": 0.123456789}, step=1, total_steps=2, kind="train")
    assert line == "train 1/2 | novel 0.12346"


def test_skipped_steps_and_numbers_that_are_not_there_are_not_mentioned() -> None:
    assert "skipped" not in line_of(RECORD)
    assert "skipped 3" in line_of(dataclasses.replace(RECORD, skipped_steps=3))
    assert "grad norm" not in line_of(dataclasses.replace(RECORD, grad_norm=None))


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.6, "1:00"), (3725, "1:02:05"), (360000, "100:00:00"), (0.4, "0:00")]
)
def test_the_time_left_reads_like_a_clock(seconds, text) -> None:
    assert line_of(dataclasses.replace(RECORD, eta_seconds=seconds)).endswith(f"| ETA {text}")


def test_the_last_line_has_no_time_left() -> None:
    assert "ETA" not in line_of(dataclasses.replace(RECORD, eta_seconds=0.0))
