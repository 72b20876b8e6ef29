"""An adapter that says which model it belongs to is not used with another."""

import json

import pytest

from mtrain.lora.base_model import BASE_FILE, base_model, check_base_model, read_base_model


def test_its_own_model_passes_and_another_does_not(tmp_path):
    (tmp_path / BASE_FILE).write_text(json.dumps(base_model("aa")))
    check_base_model(tmp_path, "aa", named="org/model")
    with pytest.raises(ValueError, match=r"another model than --model.*'org/model'"):
        check_base_model(tmp_path, "bb", named="org/model")


def test_an_adapter_of_peft_does_not_say_and_passes(tmp_path):
    check_base_model(tmp_path, "aa", named=None)


@pytest.mark.parametrize("text", ["{", "[]", "{}", " " * 5000], ids=["cut", "list", "empty", "big"])
def test_a_file_that_is_not_sound_is_refused(text, tmp_path):
    (tmp_path / BASE_FILE).write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        check_base_model(tmp_path, "aa", named=None)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_base_model(tmp_path)


def test_what_was_written_is_read_and_a_folder_need_not_say(tmp_path):
    """Folders of converted models have the file too."""
    assert read_base_model(tmp_path) is None
    (tmp_path / BASE_FILE).write_text(json.dumps(base_model("aa" * 32)))
    assert read_base_model(tmp_path) == "aa" * 32


@pytest.mark.parametrize("value", [None, 3, ["aa"]])
def test_a_fingerprint_is_text(value, tmp_path):
    (tmp_path / BASE_FILE).write_text(json.dumps({"fingerprint": value}))
    with pytest.raises(ValueError, match=f"{BASE_FILE}: has no 'fingerprint'$"):
        read_base_model(tmp_path)
