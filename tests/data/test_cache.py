import threading
from pathlib import Path

import pytest

from mtrain.data.cache import content_key, default_cache_dir, locked
from tests.data.tiny_tokenizer import save_tokenizer


def test_the_key_follows_settings_and_tokenizer_but_not_weights_or_places(tmp_path):
    first, second = save_tokenizer(tmp_path / "a"), save_tokenizer(tmp_path / "b")
    (second / "model.safetensors").write_bytes(b"weights")
    (second / "model.safetensors.index.json").write_text("{}")
    key = content_key({"max_length": 8}, model_dir=first)
    assert content_key({"max_length": 8}, model_dir=second) == key
    assert content_key({"max_length": 9}, model_dir=first) != key
    (second / "chat_template.jinja").write_text("another")
    assert content_key({"max_length": 8}, model_dir=second) != key


def test_only_one_holds_the_lock(tmp_path):
    path = tmp_path / "deep" / "x.lock"
    order = []

    def second():
        with locked(path):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "home").write_text("a file")
    lock = locked(tmp_path / "home" / "prepared" / "x.lock")
    reason = r"cannot write .*home/prepared: Not a directory; set HOME"
    with pytest.raises(RuntimeError, match=reason), lock:
        pass


def test_the_default_place_is_in_the_home_folder():
    assert default_cache_dir() == Path.home() / ".cache" / "mtrain"
