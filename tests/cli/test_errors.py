"""Who is told what when something fails. The end of a rank is tested in test_launch.py."""

import json
import traceback

import torch

from mtrain.bridge.slices import view_box
from mtrain.bridge.spans import Span
from mtrain.cli.errors import _claim_first_failure, error_line, exit_code, is_foreseen
from mtrain.config.checkpoint import parse_byte_size
from mtrain.model.backends import choose_backend
from mtrain.platform import device


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


def test_only_one_process_is_the_first_to_fail(tmp_path) -> None:
    folder = tmp_path / "new"
    assert [_claim_first_failure(folder) for _ in range(3)] == [True, False, False]
    assert _claim_first_failure(None)


def test_a_disk_that_cannot_be_written_does_not_hide_the_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert _claim_first_failure(tmp_path / "file" / "folder")
