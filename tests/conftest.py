"""`pytest --family-results FILE` writes which families passed what, for `tests/family_table.py`.

A test says with the marker `shows` what its passing shows about the family of one of its
parameters. Notes travel with the reports, so they also arrive from workers of pytest-xdist.
"""

import gc
import json
from pathlib import Path

import pytest

from tests.family_table import MARKER, shown_by

_NOTE = "shows"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--family-results",
        type=Path,
        metavar="FILE",
        help="write which families passed what to FILE, for python -m tests.family_table",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    target = config.getoption("--family-results")
    # Workers of pytest-xdist send their reports to the process that started them.
    if target is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FamilyResults(target))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        shown = shown_by(item)
        if shown is not None:
            item.user_properties.append((_NOTE, shown))


def pytest_collection_finish() -> None:
    """Thousands of tests and what they import are no garbage; looking through them takes time."""
    gc.collect()
    gc.freeze()


class FamilyResults:
    """Collects the outcome of marked tests and writes them at the end.

    Args:
        target: The file, replaced.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._passed: dict[str, dict] = {}
        self._failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        shown = dict(report.user_properties).get(_NOTE)
        if shown is None:
            return
        if report.failed:
            self._failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self._passed[report.nodeid] = shown

    def pytest_sessionfinish(self) -> None:
        results = {"passed": self._passed, "failed": self._failed}
        self._target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
