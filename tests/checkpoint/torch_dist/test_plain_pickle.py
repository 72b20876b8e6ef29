"""Plain data is read; what could do anything is refused before it does."""

import os
import pickle

import pytest

from mtrain.checkpoint.torch_dist.plain_pickle import Record, read_pickle


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args) -> None:
        self._call = (function, args)

    def __reduce__(self):
        return self._call


def test_plain_data_comes_back() -> None:
    data = {"a": [1, 2.5, None], "b": (b"x", "y", True)}
    assert read_pickle(pickle.dumps(data), {}) == data


def test_a_listed_name_is_a_record_of_its_arguments() -> None:
    found = read_pickle(pickle.dumps(Call(os.path.join, "a", 1)), {("posixpath", "join"): Record})
    assert isinstance(found, Record)
    assert found.args == ("a", 1)


def test_other_names_are_refused_before_they_are_called(tmp_path) -> None:
    """T25."""
    hostile = [1, Call(os.mkdir, str(tmp_path / "made"))]
    with pytest.raises(ValueError, match=r"^it asks for 'posix.mkdir', which could run code$"):
        read_pickle(pickle.dumps(hostile), {("posix", "rmdir"): Record})
    assert not list(tmp_path.iterdir())


def test_a_pickle_changes_no_class_of_ours() -> None:
    """T25: what it sets on a class is gone with the reading."""
    # Takes the class, without calling it, and gives it a state.
    code = b"cposixpath\njoin\nN}X\x06\x00\x00\x00othersK\x01s\x86b."
    allowed = {("posixpath", "join"): Record}
    changed = read_pickle(code, allowed)
    assert changed.others == 1
    assert not hasattr(Record, "others")
    assert not hasattr(read_pickle(b"cposixpath\njoin\n.", allowed), "others")


@pytest.mark.parametrize(
    "data", [b"", b"no pickle", pickle.dumps([1])[:-1], b"\x80\x04r\xff\xff\xff\xff."]
)
def test_what_is_broken_is_one_line(data) -> None:
    """T20: nor does it take up memory."""
    with pytest.raises(ValueError) as caught:
        read_pickle(data, {})
    assert "\n" not in str(caught.value)


def test_objects_that_are_stored_elsewhere_are_asked_for() -> None:
    data = b"(X\x01\x00\x00\x00aK\x05tQ."
    assert read_pickle(data, {}, find_stored=lambda pid: [pid]) == [("a", 5)]
    with pytest.raises(ValueError, match="stored elsewhere"):
        read_pickle(data, {})
