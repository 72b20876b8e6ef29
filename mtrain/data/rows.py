"""Reads local dataset files row by row and keeps, for each row, where it stands.

The one thing to know: readers never raise for a bad line, they yield a BadRow in its place; whoever
consumes the rows decides whether that ends the run or is counted. Only what cannot be skipped,
a file that cannot be parsed past a point, is a ValueError.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow
import pyarrow.parquet

__all__ = ["SUFFIXES", "BadRow", "Place", "Row", "read_rows"]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

# A longer line is a bad row, and is not held in memory.
_MAX_LINE_BYTES = 64 * 2**20
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_BOM_REASON = "starts with a byte order mark; save the file as UTF-8 without one"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: `unit` is "line" for text files, "row" where there are no lines."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a dataset, its columns by name."""

    place: Place
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Read a json (array or lines), jsonl, csv or parquet file, as its suffix says.

    Raises:
        ValueError: The suffix is unknown, or the file cannot be read past some line.
    """
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        if suffix == ".json" and _starts_with_bracket(path):
            return _read_json_array(path)
        return _read_json_lines(path)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    raise ValueError(f"{path}: cannot read {suffix or 'no'} suffix; use {', '.join(SUFFIXES)}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _as_row(value: object, place: Place) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(place, value)
    return BadRow(place, f"expected an object with columns, found {type(value).__name__}")


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096)
    for mark in _BYTE_ORDER_MARKS:
        head = head.removeprefix(mark)
    return head.lstrip()[:1] == b"["


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number lines from 1; None stands for a line that is too long, which is read past."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= _MAX_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE_BYTES)
        yield number, None


def _parse_line(line: bytes | None, place: Place) -> Row | BadRow:
    if line is None:
        return BadRow(place, f"the line is longer than {_MAX_LINE_BYTES} bytes")
    if line.startswith(_BYTE_ORDER_MARKS):
        return BadRow(place, _BOM_REASON)
    try:
        text = line.decode("utf-8").strip()
        value, end = _DECODER.raw_decode(text)
        if end != len(text):
            return BadRow(place, f"invalid JSON: more text after column {end}")
    except UnicodeDecodeError as error:
        return BadRow(place, f"not UTF-8: byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(place, f"invalid JSON: {error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"invalid JSON: {error}")
    return _as_row(value, place)


def _read_json_lines(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, line in _lines(file):
            if line is None or line.strip():
                yield _parse_line(line, Place(str(path), number))


def _read_json_array(path: Path) -> Iterator[Row | BadRow]:
    """Decode element by element, so that each one's line is known. A syntax error ends the file."""
    data = path.read_bytes()
    if data.startswith(_BYTE_ORDER_MARKS):
        raise ValueError(f"{path}, line 1: {_BOM_REASON}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8: byte {error.start}") from None
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"invalid JSON: {error.msg}, column {error.colno}"
            raise ValueError(f"{path}, line {error.lineno}: {reason}") from None
        except (ValueError, RecursionError) as error:
            place = f"the array element that starts at line {line}"
            raise ValueError(f"{path}, {place}: invalid JSON: {error}") from None
        yield _as_row(value, Place(str(path), line))
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}, line {line}: invalid JSON: no ',' or ']' after the element")
    if text[position + 1 :].strip():
        raise ValueError(f"{path}: invalid JSON: more text after the end of the array")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        if file.read(3).startswith(_BYTE_ORDER_MARKS):
            raise ValueError(f"{path}, line 1: {_BOM_REASON}")
    previous_limit = csv.field_size_limit(_MAX_LINE_BYTES)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from _csv_rows(csv.DictReader(file, strict=True), str(path))
    finally:
        csv.field_size_limit(previous_limit)


def _csv_rows(reader: csv.DictReader, file: str) -> Iterator[Row | BadRow]:
    while True:
        place = Place(file, reader.line_num + 1)
        try:
            columns = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place}: invalid CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 near here: {error.reason}") from None
        if columns is None:
            return
        place = Place(file, reader.line_num)
        if None in columns:
            yield BadRow(place, "more fields than the header has columns")
        elif None in columns.values():
            yield BadRow(place, "fewer fields than the header has columns")
        else:
            yield Row(place, columns)


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(Place(str(path), number, "row"), columns)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None
