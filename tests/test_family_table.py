"""The table of docs/families.md is what tests showed, and what tests of today still say."""

import json
from pathlib import Path

import pytest

from mtrain.bridge.families import FAMILIES
from mtrain.parallel import ParallelLayout
from tests.conftest import FamilyResults
from tests.family_table import (
    DOCUMENT,
    FEATURES,
    MARKS,
    cells,
    collected,
    merged,
    read_results,
    render,
    shown_by,
    with_table,
)

COMMAND = "run the tests with --family-results and python -m tests.family_table (docs/families.md)"
# What only a machine with a GPU can show.
ELSEWHERE = {"te"}


@pytest.fixture(scope="module")
def tests_of_today():
    return collected()


def test_the_table_in_the_docs_is_what_the_results_say():
    text = DOCUMENT.read_text("utf-8")
    assert with_table(text, render(read_results())) == text, f"{COMMAND}, or only the latter"


def test_results_name_tests_that_exist_and_show_the_same(tests_of_today):
    wrong = [test for test, shown in read_results().items() if tests_of_today.get(test) != shown]
    assert not wrong, f"{COMMAND}: {wrong}"


def test_results_name_families_and_features_that_exist():
    names = {family.name for family in FAMILIES.values()}
    assert all(name in names and feature in FEATURES for name, feature in cells(read_results()))


def test_all_that_tests_show_is_in_the_table(tests_of_today):
    missing = cells(tests_of_today) - cells(read_results())
    assert not {pair for pair in missing if pair[1] not in ELSEWHERE}, COMMAND


SHOWN = {"family": "GPT-2", "features": ["load", "torch"]}


def test_the_table_has_a_row_for_each_family_and_a_cell_for_each_feature():
    rows = [line.strip("| ").split(" | ") for line in render({"a": SHOWN}).splitlines()[4:-2]]
    assert {row[0] for row in rows} == {family.name for family in FAMILIES.values()}
    assert all(len(row) == 2 + len(FEATURES) for row in rows)
    (gpt2,) = (row for row in rows if row[0] == "GPT-2")
    marked = dict(zip(FEATURES, gpt2[2:], strict=True))
    assert {feature for feature, mark in marked.items() if mark == "yes"} == {"load", "torch"}
    assert {feature for feature, mark in marked.items() if mark == "-"} == {"ep", "etp", "mtp"}
    (mimo,) = (row for row in rows if row[0] == "MiMo")
    assert dict(zip(FEATURES, mimo[2:], strict=True))["precision"] == "-"


def test_only_what_is_between_the_marks_is_replaced():
    first, last = MARKS
    assert with_table(f"a\n{first}\nold\n{last}\nb", "new") == "a\nnew\nb"
    with pytest.raises(ValueError, match="the marks around the table are missing"):
        with_table(f"{first} and no end", "new")


def write(path: Path, passed=(), failed=()) -> Path:
    path.write_text(json.dumps({"passed": dict(passed), "failed": list(failed)}))
    return path


def test_results_of_several_runs_are_added_up(tmp_path):
    files = [write(tmp_path / name, {name: SHOWN}) for name in ("cpu", "gpu")]
    tests = dict.fromkeys(("old", "cpu", "gpu"), SHOWN)
    assert merged({"old": SHOWN}, files, tests) == tests


def test_results_of_tests_that_are_gone_or_show_something_else_are_dropped(tmp_path):
    file = write(tmp_path / "cpu", {"new": SHOWN})
    tests = {"new": SHOWN, "changed": {**SHOWN, "features": ["save"]}}
    assert merged({"gone": SHOWN, "changed": SHOWN}, [file], tests) == {"new": SHOWN}


def test_a_run_with_a_failure_is_not_taken(tmp_path):
    file = write(tmp_path / "cpu", {"one": SHOWN}, ["another"])
    with pytest.raises(ValueError, match="another failed; mend them first"):
        merged({}, [file], {"one": SHOWN})
    again = write(tmp_path / "again", {"another": SHOWN})
    tests = {"one": SHOWN, "another": SHOWN}
    assert merged({}, [file, again], tests) == tests
    assert merged({}, [file], tests, leaves_out_failed=True) == {"one": SHOWN}


def test_only_what_passed_is_noted(tmp_path):
    results = FamilyResults(tmp_path / "results.json")
    for test, when, outcome, properties in (
        ("passed", "setup", "passed", [("shows", SHOWN)]),
        ("passed", "call", "passed", [("shows", SHOWN)]),
        ("skipped", "setup", "skipped", [("shows", SHOWN)]),
        ("failed", "call", "failed", [("shows", SHOWN)]),
        ("broken fixture", "setup", "failed", [("shows", SHOWN)]),
        ("unmarked", "call", "passed", []),
        ("unmarked failed", "call", "failed", []),
    ):
        results.pytest_runtest_logreport(
            pytest.TestReport(
                test, ("", 0, ""), {}, outcome, None, when, user_properties=properties
            )
        )
    results.pytest_sessionfinish()
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "passed": {"passed": SHOWN},
        "failed": ["failed", "broken fixture"],
    }


@pytest.mark.parametrize(
    ("words", "sizes", "features"),
    [
        (("load", "backend"), {}, ["load", "te"]),
        (("layout",), {"world_size": 2, "pp_size": 2, "vpp_size": 2}, ["pp", "vpp"]),
        (("layout",), {"world_size": 2, "tp_size": 2}, ["tp"]),
        (("layout",), {"world_size": 4, "ep_size": 2, "etp_size": 2}, ["ep", "etp"]),
        (("full", "layout"), {"world_size": 2}, ["full"]),
    ],
)
def test_a_marker_stands_for_features(words, sizes, features, request):
    """Of this very test, marked on the spot."""
    item = request.node
    item.add_marker(pytest.mark.shows(*words))
    parameters = {"model": "glm4", "sizes": ParallelLayout(**sizes), "backend": "te"}
    item.callspec.params.update(parameters)
    assert shown_by(item) == {"family": "GLM-4", "features": features}


def test_a_test_without_the_marker_shows_nothing(request):
    assert shown_by(request.node) is None


def test_a_marker_may_name_the_model_itself(request):
    request.node.add_marker(pytest.mark.shows("full", model="mimo"))
    assert shown_by(request.node) == {"family": "MiMo", "features": ["full"]}


def test_a_feature_without_a_column_is_a_mistake(request):
    request.node.add_marker(pytest.mark.shows("loaded", model="mimo"))
    with pytest.raises(AssertionError, match="loaded"):
        shown_by(request.node)
