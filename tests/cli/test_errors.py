"""Who is told what when something fails. The end of a rank is tested in test_launch.py."""

import json

from mtrain.cli.errors import _claim_first_failure, error_line, is_user_error
from mtrain.config.checkpoint import parse_byte_size


def caught(function, *args) -> Exception:
    try:
        function(*args)
    except (ValueError, KeyError) as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_value_error_of_ours_is_a_mistake_of_the_user() -> None:
    assert is_user_error(caught(parse_byte_size, "five"))


def test_a_value_error_of_a_library_is_not() -> None:
    assert not is_user_error(caught(json.loads, "{"))


def test_other_errors_are_not() -> None:
    assert not is_user_error(caught({}.__getitem__, "x"))


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
