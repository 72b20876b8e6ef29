import json
import sys
import types

import numpy as np
import pytest

from mtrain.config.dataset_name import DatasetName
from mtrain.data.formats import Conversation
from mtrain.data.source import conversations_of, open_source, sample_indices

ROW = {"query": "q", "response": "r"}


def parse(value):
    return DatasetName.parse(value, use_hf=False)


def test_a_folder_gives_all_its_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("sub/c.json", "3")):
        (tmp_path / name).write_text(json.dumps({**ROW, "query": text}))
    (tmp_path / "readme.md").write_text("no data")
    (tmp_path / ".hidden.json").write_text("no data")
    rows = list(conversations_of(open_source(parse(str(tmp_path))), columns=None))
    assert [row.messages[0]["content"] for row in rows] == ["1", "2", "3"]


def test_every_file_of_a_folder_may_have_its_own_layout(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "i", "output": "o"}))
    rows = list(conversations_of(open_source(parse(str(tmp_path))), columns=None))
    assert all(isinstance(row, Conversation) for row in rows)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.json, \.jsonl"):
        open_source(parse(str(tmp_path)))


def test_the_fingerprint_follows_contents_not_names(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (first, second):
        path.write_text(json.dumps(ROW))
    before = open_source(parse(str(first))).fingerprint()
    assert open_source(parse(str(second))).fingerprint() == before
    second.write_text(json.dumps({**ROW, "query": "p"}))
    assert open_source(parse(str(second))).fingerprint() != before


def test_self_cognition_is_our_own_and_needs_names():
    name = parse("swift/self-cognition#7")
    source = open_source(name, model_name=["N"], model_author=["A"])
    rows = list(conversations_of(source, columns=None))
    assert len(rows) == 120
    assert str(rows[3].place) == "swift/self-cognition, row 4"
    with pytest.raises(ValueError, match="needs --model_name and --model_author"):
        open_source(name, model_name=["N"])


def test_a_count_is_a_fixed_random_sample():
    taken = sample_indices(num_rows=1000, count=10, seed=1)
    assert len(set(taken.tolist())) == 10
    assert taken.tolist() == sorted(taken.tolist())
    assert np.array_equal(taken, sample_indices(num_rows=1000, count=10, seed=1))
    assert not np.array_equal(taken, sample_indices(num_rows=1000, count=10, seed=2))


def test_a_count_above_the_rows_repeats_whole_cycles():
    taken = sample_indices(num_rows=4, count=10, seed=1)
    times = np.bincount(taken, minlength=4)
    assert times.sum() == 10
    assert set(times.tolist()) == {2, 3}


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(
        RuntimeError, match=r"^--dataset a/b: cannot load it from Hugging Face \(no"
    ):
        open_source(parse("hf::a/b"))


def test_hub_rows_are_read_like_local_ones(monkeypatch, tmp_path):
    import datasets

    loaded = datasets.Dataset.from_list([ROW, {**ROW, "query": "p"}])
    asked = {}

    def load(location, **arguments):
        asked.update(arguments, location=location)
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source(parse("hf::a/b:sub"), hub_token="secret")
    rows = list(conversations_of(source, columns=None))
    assert [row.messages[0]["content"] for row in rows] == ["q", "p"]
    assert asked == {"location": "a/b", "name": "sub", "split": "train", "token": "secret"}
