import json

import pyarrow
import pyarrow.parquet
import pytest

from mtrain.data.rows import BadRow, Row, read_rows

GOOD = b'{"query": "q", "response": "r"}\n'


def read(path):
    return list(read_rows(path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "q", "respo\n', "invalid JSON: Unterminated string"),
        (b'{"query": "q"} {"query": "q"}\n', "more text after column 14"),
        (b'["query"]\n', "expected an object with columns, found list"),
        (b'{"query": NaN}\n', "NaN is not a JSON value"),
        (b'{"query": -Infinity}\n', "-Infinity is not a JSON value"),
        (b'{"query": "\xff"}\n', "not UTF-8: byte 11"),
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
        (b'{"query": "' + b"x" * 300 + b'"}\n', "longer than 200 bytes"),
        (b"[" * 100_000, "longer than 200 bytes"),
    ],
)
def test_a_bad_line_of_json_lines_is_found_with_its_number(tmp_path, monkeypatch, line, reason):
    """T27."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + (b"" if line.endswith(b"\n") else b"\n") + GOOD)
    monkeypatch.setattr("mtrain.data.rows._MAX_LINE_BYTES", 200)
    first, bad, last = read(path)
    assert isinstance(first, Row)
    assert isinstance(bad, BadRow)
    assert str(bad).startswith(f"{path}, line 3: ")
    assert reason in bad.reason
    assert (last.place.number, last.columns) == (4, {"query": "q", "response": "r"})


def test_deep_nesting_is_a_bad_line(tmp_path):
    """T27."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[" * 100_000)
    (bad,) = read(path)
    assert "recursion" in bad.reason


def test_an_array_gives_the_line_of_every_element(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n, 4]')
    rows = read(path)
    assert [row.place.number for row in rows] == [2, 4, 5, 6]
    assert [row.columns for row in rows[:3]] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert rows[3].reason == "expected an object with columns, found int"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": ]', "line 2: invalid JSON: Expecting value, column 7"),
        ('[{"a": 1}\n{"a": 2}]', "line 1: invalid JSON: no ',' or"),
        ('[{"a": 1},\n{"a": NaN}]', "starts at line 2: invalid JSON: NaN"),
        ('[{"a": 1}] 1', "more text after the end"),
        ('[{"a": 1}', "no ',' or"),
        ('\ufeff[{"a": 1}]', "line 1: starts with a byte order mark"),
    ],
)
def test_an_array_that_cannot_be_parsed_is_an_error_with_its_line(tmp_path, text, message):
    """T27."""
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_json_lines_may_be_called_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(GOOD * 2)
    assert len(read(path)) == 2


def test_csv_rows_have_lines_and_wrong_widths_are_bad(tmp_path):
    """T27."""
    path = tmp_path / "rows.csv"
    path.write_text('query,response\n"two\nlines",yes\na,b,c\nonly\nlast,one\n')
    first, wide, narrow, last = read(path)
    assert first.columns == {"query": "two\nlines", "response": "yes"}
    assert str(wide) == f"{path}, line 4: more fields than the header has columns"
    assert str(narrow) == f"{path}, line 5: fewer fields than the header has columns"
    assert last.columns["response"] == "one"


def test_csv_cells_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("query,response\n" + "x" * 300_000 + ",yes\n")
    assert len(read(path)[0].columns["query"]) == 300_000


def test_parquet_rows_are_numbered(tmp_path):
    path = tmp_path / "rows.parquet"
    messages = [[{"role": "user", "content": "hi"}], None]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), path)
    rows = read(path)
    assert [row.columns["messages"] for row in rows] == messages
    assert str(rows[1].place) == f"{path}, row 2"


def test_a_broken_parquet_file_is_one_clear_error(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"rows\.parquet: not a readable parquet file"):
        read(path)


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"cannot read \.xlsx suffix; use \.json"):
        read(path)
