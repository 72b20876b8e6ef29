"""The table of docs/families.md: families, and what tests that passed show about each.

`python -m tests.family_table RESULTS...` adds what `pytest --family-results` wrote to
`tests/family_results.json` and writes the table between its two marks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mtrain.bridge.families import FAMILIES
from mtrain.bridge.family import Family
from tests.tiny import MOE, TINY

# Every start of pytest imports this module, so what imports torch is imported where it is used.
if TYPE_CHECKING:
    from mtrain.parallel import ParallelLayout

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "family_results.json"
DOCUMENT = ROOT / "docs" / "families.md"
MARKS = ("<!-- families: made by python -m tests.family_table -->", "<!-- families end -->")
# Feature -> head of its column.
FEATURES = {
    "load": "load",
    "save": "save",
    "full": "full",
    "lora": "LoRA",
    "tp": "TP",
    "pp": "PP",
    "vpp": "VPP",
    "ep": "EP",
    "etp": "ETP",
    "mtp": "MTP",
    "precision": "precision",
    "torch": "`torch`",
    "te": "`te`",
}
MARKER = (
    "shows(*features, model): passing shows these features of tests.family_table, for the family "
    "of the parameter `name` or `model` (or of the tiny model given); `layout` stands for the axes "
    "that the parameter `sizes` splits, `backend` for the parameter of that name"
)
_AXES = ("tp", "pp", "vpp", "ep", "etp")

Shown = dict[str, Any]


def shown_by(item: pytest.Item) -> Shown | None:
    """What a test shows when it passes: its family and features; None where it has no marker."""
    marker = item.get_closest_marker("shows")
    if marker is None:
        return None
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    model = marker.kwargs.get("model") or parameters.get("name") or parameters["model"]
    features: set[str] = set()
    for word in marker.args:
        if word == "layout":
            features |= _split_axes(parameters["sizes"])
        else:
            features.add(parameters["backend"] if word == "backend" else word)
    assert features <= FEATURES.keys(), f"{item.nodeid}: {features - FEATURES.keys()}"
    return {"family": family_of(model).name, "features": sorted(features)}


def _split_axes(layout: ParallelLayout) -> set[str]:
    sizes = {
        "tp": layout.tp_size,
        "pp": layout.pp_size,
        "vpp": layout.vpp_size or 1,
        "ep": layout.ep_size,
        "etp": layout.etp_size,
    }
    return {axis for axis in _AXES if sizes[axis] > 1}


def family_of(model: str) -> Family:
    """The family of a model of tests/tiny.py, or of one that is called by its `model_type`."""
    return FAMILIES[TINY[model]["model_type"] if model in TINY else model]


def collected() -> dict[str, Shown]:
    """All tests that show something, by their ids. Takes a few seconds."""
    files = sorted(
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.shows" in path.read_text("utf-8")
    )
    found = _Collected()
    arguments = ["--collect-only", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*arguments, *map(str, files)], plugins=[found])
    assert code == 0, "the tests cannot be collected"
    return found.shown


class _Collected:
    def __init__(self) -> None:
        self.shown: dict[str, Shown] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            shown = shown_by(item)
            if shown is not None:
                self.shown[item.nodeid] = shown


def read_results() -> dict[str, Shown]:
    """What passed, by the ids of the tests."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def merged(
    old: dict[str, Shown],
    files: Iterable[Path],
    tests: dict[str, Shown],
    *,
    leaves_out_failed: bool = False,
) -> dict[str, Shown]:
    """Old results with those of files added, without tests that are gone or show something else.

    What failed in one of the files counts as mended if it passed in another.

    Args:
        old: From `read_results`.
        files: Written by `pytest --family-results`.
        tests: From `collected`.
        leaves_out_failed: Takes what passed of a run with failures.

    Raises:
        ValueError: A test failed.
    """
    results = {file: json.loads(file.read_text("utf-8")) for file in files}
    new = {test: shown for one in results.values() for test, shown in one["passed"].items()}
    for file, one in results.items():
        failed = [test for test in one["failed"] if test not in new]
        if failed and not leaves_out_failed:
            raise ValueError(f"{file}: {', '.join(failed)} failed; mend them first")
    passed = old | new
    return {test: passed[test] for test in sorted(passed) if tests.get(test) == passed[test]}


def cells(results: dict[str, Shown]) -> set[tuple[str, str]]:
    """Pairs of family and feature."""
    return {
        (shown["family"], feature) for shown in results.values() for feature in shown["features"]
    }


def render(results: dict[str, Shown]) -> str:
    """The table with its marks: a row a family, in the order of `FAMILIES`."""
    have, nothing = cells(results), _nothing_to_test()
    lines = [
        _row(["family", "`model_type`", *FEATURES.values()]),
        _row(["---"] * (2 + len(FEATURES))),
    ]
    for family in {family.name: family for family in FAMILIES.values()}.values():
        types = ", ".join(f"`{model_type}`" for model_type in family.model_types)
        pairs = [(family.name, feature) for feature in FEATURES]
        marks = ["yes" if pair in have else "-" if pair in nothing else "?" for pair in pairs]
        lines.append(_row([family.name, types, *marks]))
    return "\n".join([MARKS[0], "", *lines, "", MARKS[1]])


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _nothing_to_test() -> set[tuple[str, str]]:
    """Cells of families without experts, without MTP, or without a class to compare with."""
    from transformers import CONFIG_MAPPING

    from tests.next_tokens import NAMES

    sparse = {family_of(name).name for name in MOE}
    with_next_tokens = {family_of(name).name for name in NAMES}
    cells = set()
    for family in FAMILIES.values():
        if family.name not in sparse:
            cells |= {(family.name, "ep"), (family.name, "etp")}
        if family.name not in with_next_tokens:
            cells.add((family.name, "mtp"))
        if not any(model_type in CONFIG_MAPPING for model_type in family.model_types):
            cells.add((family.name, "precision"))
    return cells


def with_table(text: str, table: str) -> str:
    """A document with the table in the place of the one it has.

    Raises:
        ValueError: It does not have both marks.
    """
    before, first, rest = text.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not first or not last:
        raise ValueError(f"{DOCUMENT}: the marks around the table are missing")
    return before + table + after


def main(arguments: Sequence[str]) -> None:
    """Merges results files into the checked-in ones and renders the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--leave_out_failed", action="store_true")
    options = parser.parse_args(arguments)
    results = merged(
        read_results(),
        options.results,
        collected(),
        leaves_out_failed=options.leave_out_failed,
    )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text("utf-8"), render(results)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
