"""Who is told what when something fails. The end of a rank is tested in test_launch.py."""

import json
import signal
import traceback
from pathlib import Path

import torch

from mtrain.bridge.slices import view_box
from mtrain.bridge.spans import Span
from mtrain.cli import errors
from mtrain.cli.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    error_line,
    exit_code,
    is_foreseen,
    signal_line,
)
from mtrain.config.checkpoint import parse_byte_size
from mtrain.model.backends import choose_backend
from mtrain.platform import device
from mtrain.platform.signals import EndedBySignal
from mtrain.training.watchdog import EXIT_HANG


def caught(function, *args) -> Exception:
    try:
        function(*args)
    except (ValueError, RuntimeError, KeyError) as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_value_error_of_ours_is_a_mistake_of_the_user() -> None:
    error = caught(parse_byte_size, "five")
    assert is_foreseen(error)
    assert exit_code(error) == 2


def test_a_runtime_error_of_ours_speaks_for_itself(monkeypatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    error = caught(choose_backend, "te")
    assert is_foreseen(error)
    assert exit_code(error) == 1


def test_an_error_of_a_library_needs_its_traceback() -> None:
    assert not is_foreseen(caught(json.loads, "{"))


def test_an_error_of_a_c_function_that_we_call_needs_its_traceback() -> None:
    error = caught(view_box, torch.ones(2), (Span(0, 3, count=2, step=3),))
    assert traceback.extract_tb(error.__traceback__)[-1].filename.endswith("slices.py")
    assert not is_foreseen(error)


def test_other_errors_are_not_foreseen() -> None:
    assert not is_foreseen(caught({}.__getitem__, "x"))


def test_the_line_of_an_error_is_one_line() -> None:
    line = error_line("sft", ValueError("a\n  b"))
    assert line == "megatron sft: error: a b"


def test_the_line_of_a_signal_says_whether_something_may_be_lost() -> None:
    first, second = EndedBySignal(signal.SIGUSR1), EndedBySignal(signal.SIGTERM, at_once=True)
    line = "megatron sft: ended by SIGUSR1 outside training; nothing was lost"
    assert signal_line("sft", first) == line
    assert signal_line("export", first) == "megatron export: ended by SIGUSR1"
    assert signal_line("sft", second) == "megatron sft: ended at once by a second SIGTERM"
    assert [exit_code(error) for error in (first, second)] == [138, 143]


def test_the_documented_exit_codes_are_those_of_the_code() -> None:
    text = " ".join(errors.__doc__.split())
    assert f"{EXIT_FAILURE} something failed, {EXIT_USER_ERROR} a mistake" in text
    assert f"{EXIT_HANG} nothing happened" in text
    page = (Path(__file__).parents[2] / "docs" / "stopping.md").read_text("utf-8")
    for code in (EXIT_FAILURE, EXIT_USER_ERROR, EXIT_HANG, EXIT_INTERRUPTED, "138, 143"):
        assert f"\n| {code} |" in page
