"""Paths that exist, ids on a hub, and neither."""

import pytest

from mtrain.config.dataset_name import DatasetName


def parse(value, use_hf=False):
    return DatasetName.parse(value, use_hf=use_hf)


def test_paths_and_ids_are_told_apart(tmp_path):
    path = tmp_path / "odd:name#3.jsonl"
    path.write_text("")
    assert parse(str(path)) == DatasetName(str(path), None, None, None)
    assert parse(f"{path}#5") == DatasetName(str(path), None, None, 5)
    assert parse("a/b:c#5") == DatasetName("a/b", "ms", "c", 5)
    assert parse("a/b", use_hf=True) == DatasetName("a/b", "hf", None, None)
    assert parse("ms::a/b", use_hf=True).hub == "ms"
    assert parse("hf::a/b").hub == "hf"
    assert parse("hf::squad").path == "squad"
    assert parse("AI-ModelScope/LaTeX_OCR:human_handwrite#5000").subset == "human_handwrite"


@pytest.mark.parametrize(
    "value",
    ["/none/a.jsonl", "x/y.jsonl#5", "x/y.JSON", "./none", "squad", "a/b/c", "hf::./x"],
)
def test_a_missing_file_is_named(value):
    with pytest.raises(ValueError, match=f"^--val_dataset {value}: no such file or folder"):
        DatasetName.parse(value, use_hf=False, flag="val_dataset")


def test_a_count_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        parse("a/b#0")
