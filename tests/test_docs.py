"""The documents say what the code does: paths exist, commands parse, tables are complete."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtrain.bridge.families import FAMILIES
from mtrain.config import SftConfig, config_to_dict
from mtrain.config.fields import spell
from mtrain.config.later import LATER, WITHOUT_EFFECT
from tests.cli.commands import Command, commands_in
from tests.test_architecture import MAY_IMPORT, NEVER
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.is_file())
FLAGS_PAGE = ROOT / "docs" / "flags.md"
# Top-level names by which a text in backticks is known to be a path of the repository.
FOLDERS = ("mtrain", "tests", "docs", "examples", "benchmarks", ".ci")
SETTINGS = config_to_dict(SftConfig())
SWIFT_DEFAULTS = json.loads((ROOT / "tests" / "config" / "swift_defaults.json").read_text())


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def paths_in(document: Path) -> Iterator[tuple[str, Path]]:
    """(text, path) of links to files and of backticks that name a file of the repository."""
    text = without_code_blocks(document.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in link and not link.startswith("mailto:"):
            yield link, document.parent / link
    for quoted in re.findall(r"`([^`\s]+)`", text):
        folder, slash, rest = quoted.partition("/")
        # Names with placeholders or wildcards stand for several files.
        if slash and folder in FOLDERS and not re.search(r"[<>*{}]|\.\.\.", rest):
            yield quoted, ROOT / quoted.split("::")[0]


def commands_of(document: Path) -> list[Command]:
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    # `<number>` and `<folder>` stand for something the reader fills in.
    return [c for block in blocks for c in commands_in(re.sub(r"<[\w /-]+>", "1", block))]


def table_under(heading: str, document: Path) -> list[list[str]]:
    """Cells of the table in a section, without its head."""
    section = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)",
        document.read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert section is not None, f"{document.name}: no section {heading!r}"
    rows = [line for line in section[1].splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def differs(ours: object, theirs: object) -> bool:
    """Whether two defaults mean something else; a list of one is its item, an empty one is none."""

    def items(value: object) -> list[object]:
        if value is None:
            return []
        return value if isinstance(value, list) else [value]

    return items(ours) != items(theirs)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_that_are_mentioned_exist(document: Path) -> None:
    missing = [text for text, path in paths_in(document) if not path.exists()]
    assert not missing, f"{document.name}: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_read_by_the_parser(document: Path) -> None:
    for command in commands_of(document):
        command.parse()


def test_the_import_table_is_the_one_that_is_enforced() -> None:
    rows = table_under("Who may import whom", ROOT / "docs" / "architecture.md")
    allowed = {part: set(targets.split(", ")) for part, targets, _ in rows}
    assert allowed == {p: targets or {"nothing"} for p, targets in MAY_IMPORT.items() if p}
    forbidden = {part: set(never.split(", ")) for part, _, never in rows if never}
    assert forbidden == {part: set(libraries) for part, libraries in NEVER.items() if part}


def test_the_readme_names_every_family() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    names = list(dict.fromkeys(family.name for family in FAMILIES.values()))
    assert f"Text models of these families: {'; '.join(names)}." in text


def code_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)


def test_the_family_of_the_recipe_is_one() -> None:
    """Bird is what Qwen3 is, so its tables must be the same."""
    family_file, _, plan = code_blocks(ROOT / "docs" / "add_a_model.md")
    names: dict[str, Any] = {}
    exec(family_file, names)
    config = tiny_config("qwen3")
    bird, qwen3 = names["BIRD"], FAMILIES["qwen3"]
    assert bird.model_types == ("bird",)
    assert bird.weight_table(config) == qwen3.weight_table(config)
    assert bird.megatron_config(config) == qwen3.megatron_config(config)
    with pytest.raises(ValueError, match="'mlp_bias' is True"):
        bird.weight_table(config | {"mlp_bias": True})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(plan, {"hf_config": config})
    assert printed.getvalue().startswith("decoder.layers.0.")


def test_the_clean_clone_check_runs_the_command_of_the_readme() -> None:
    """`.ci/run` takes the line that it finds by its end, and it must be the one under the title."""
    text = (ROOT / "README.md").read_text("utf-8")
    section = re.search(r"^## Run the tests\n\n```shell\n(.*)\n```$", text, re.MULTILINE)
    assert section is not None
    found = [line for line in text.splitlines() if " -m pytest " in line]
    assert found == [section[1]]
    assert "grep -m 1 -- ' -m pytest ' README.md" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_commands_are_found_in_a_document() -> None:
    (command,) = commands_of(FLAGS_PAGE)
    assert command.words[:2] == ("--config", "run.yaml")
    assert command.parse().data.dataset == ("a.jsonl", "b.jsonl#500")


def test_defaults_that_differ_are_listed_with_both_values() -> None:
    rows = table_under("Defaults that differ", FLAGS_PAGE)
    listed = {flag: (theirs, ours) for flag, theirs, ours, _ in rows}
    expected = {
        f"`--{name}`": (spell(SWIFT_DEFAULTS[name]), spell(value))
        for name, value in SETTINGS.items()
        if name in SWIFT_DEFAULTS and differs(value, SWIFT_DEFAULTS[name])
    }
    assert listed == expected


def test_flags_of_our_own_are_listed() -> None:
    listed = {row[0] for row in table_under("Flags of mtrain's own", FLAGS_PAGE)}
    own = SETTINGS.keys() - SWIFT_DEFAULTS.keys() | {"config"}
    assert listed == {f"`--{name}`" for name in own}


def test_flags_without_effect_are_listed() -> None:
    rows = table_under("Accepted, but there is nothing to decide", FLAGS_PAGE)
    assert rows == [[f"`--{name}`", why] for name, why in WITHOUT_EFFECT.items()]


def test_flags_that_are_not_built_are_listed() -> None:
    rows = table_under("Not built yet", FLAGS_PAGE)
    expected = [
        [f"`--{row.flag}`", ", ".join(dict.fromkeys(map(spell, row.accepted))), row.reason]
        for row in LATER
    ]
    assert rows == expected
