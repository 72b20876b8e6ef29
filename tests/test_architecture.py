"""The rules of docs/architecture.md that a program can check; reads source text, imports nothing.

Every failure lists file:line, so that it can be clicked.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mtrain"

# Part of mtrain -> parts it may import, besides itself.
MAY_IMPORT = {
    "config": set(),
    "platform": {"config"},
    "parallel": {"config", "platform"},
    "bridge": {"platform", "parallel"},
    "model": {"config", "platform", "parallel", "bridge"},
    "data": {"config"},
    "training": {"config", "platform", "parallel", "model"},
    "lora": {"config", "platform", "parallel", "bridge"},
    "checkpoint": {"config", "platform", "parallel", "bridge", "lora"},
    "verify": {"config", "platform", "parallel", "bridge", "model", "lora", "checkpoint"},
    "cli": {
        "config",
        "platform",
        "parallel",
        "bridge",
        "model",
        "data",
        "lora",
        "training",
        "checkpoint",
        "verify",
    },
    "": set(),
}
# Of model, training sees the loss and nothing else: it is handed callables.
TRAINING_SEES_OF_MODEL = "mtrain.model.loss"
NEVER = {
    "": ("torch", "megatron", "transformers", "numpy"),
    "config": ("torch", "megatron", "transformers", "numpy", "yaml"),
    "data": ("megatron", "torch.distributed"),
}
READS_ENVIRONMENT = {"mtrain/cli/launch.py", "mtrain/parallel.py"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
# Covered by the tests that are parametrised over all families.
NEEDS_NO_TEST_FILE = PACKAGE / "bridge" / "families"
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# Megatron-Core's format has a pickle; that file reads it with a list of what may be in it.
READS_PICKLES = {"mtrain/checkpoint/torch_dist/plain_pickle.py"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@cache
def sources() -> tuple[tuple[Path, ast.Module], ...]:
    return tuple((path, ast.parse(path.read_text("utf-8"))) for path in python_files(PACKAGE))


def python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def part_of(path: Path) -> str:
    """`mtrain/data/rows.py` -> "data", `mtrain/parallel.py` -> "parallel", `__init__.py` -> ""."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").removeprefix("__init__")


def imports_of(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, also inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path, node.lineno)}: relative import"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def imported_parts() -> Iterator[tuple[Path, int, str, str, str]]:
    """(file, line, part of the file, part imported, module) of imports between parts."""
    for path, tree in sources():
        for module, line in imports_of(path, tree):
            words = module.split(".")
            # mtrain itself holds the version alone, which everyone may read.
            if words[0] != "mtrain" or len(words) == 1 or words[1] not in MAY_IMPORT:
                continue
            if words[1] != part_of(path):
                yield path, line, part_of(path), words[1], module


def test_every_part_has_a_row_in_the_table() -> None:
    assert {part_of(path) for path, _ in sources()} <= MAY_IMPORT.keys()


def test_parts_import_only_what_the_table_allows() -> None:
    wrong = {
        f"{place(path, line)}: {source or 'mtrain'} must not import {module}"
        for path, line, source, target, module in imported_parts()
        if target not in MAY_IMPORT[source]
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_training_sees_only_the_loss_of_the_model() -> None:
    wrong = {
        f"{place(path, line)}: {module}"
        for path, line, source, target, module in imported_parts()
        if source == "training"
        and target == "model"
        and not f"{module}.".startswith(f"{TRAINING_SEES_OF_MODEL}.")
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_parts_do_not_import_libraries_that_are_forbidden_to_them() -> None:
    wrong = {
        f"{place(path, line)}: {part_of(path) or 'mtrain'} must not import {module}"
        for path, tree in sources()
        for module, line in imports_of(path, tree)
        for library in NEVER.get(part_of(path), ())
        if module == library or module.startswith(f"{library}.")
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_parts_do_not_import_each_other() -> None:
    graph: dict[str, set[str]] = {part: set() for part in MAY_IMPORT}
    for _, _, source, target, _ in imported_parts():
        graph[source].add(target)
    while free := [part for part, targets in graph.items() if not targets]:
        for part in free:
            del graph[part]
        for targets in graph.values():
            targets.difference_update(free)
    assert not graph, f"cycle among {sorted(graph)}"


def test_modules_of_a_part_do_not_import_each_other() -> None:
    names = {module_name(path): path for path, _ in sources()}
    graph = {
        module_name(path): {
            module
            for module, _ in imports_of(path, top_level(tree))
            if module in names and module != module_name(path)
        }
        for path, tree in sources()
    }
    while free := [name for name, targets in graph.items() if not targets]:
        for name in free:
            del graph[name]
        for targets in graph.values():
            targets.difference_update(free)
    assert not graph, f"cycle among {sorted(graph)}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top_level(tree: ast.Module) -> ast.Module:
    """The module without function bodies: what runs when it is imported."""
    body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.Module(body=body, type_ignores=[])


def test_only_two_files_read_the_environment() -> None:
    wrong = [
        f"{place(path, node.lineno)}: {ast.unparse(node)}"
        for path, tree in sources()
        if path.relative_to(ROOT).as_posix() not in READS_ENVIRONMENT
        for node in ast.walk(tree)
        if reads_environment(node)
    ]
    assert not wrong, "\n".join(wrong)


def reads_environment(node: ast.AST) -> bool:
    names = {"environ", "getenv", "putenv"}
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in names for alias in node.names)
    return (
        isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    )


def test_only_the_command_line_prints() -> None:
    wrong = [
        place(path, node.lineno)
        for path, tree in sources()
        if part_of(path) != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles_or_runs_code_of_a_checkpoint() -> None:
    """T25: no pickle but in one file, no torch.load but of tensors, no trust_remote_code=True."""
    wrong = [
        f"{place(path, node.lineno)}: {ast.unparse(node)}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if runs_foreign_code(node)
        and not (
            path.relative_to(ROOT).as_posix() in READS_PICKLES
            and ast.unparse(node) == "import pickle"
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_the_file_that_may_read_pickles_only_subclasses_the_unpickler() -> None:
    """T25: it never calls what unpickles without a list."""
    for name in READS_PICKLES:
        used = {
            node.attr
            for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8")))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
        }
        assert used == {"Unpickler", "UnpicklingError"}


def runs_foreign_code(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in PICKLES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        return str(node.module).split(".")[0] in PICKLES or "torch.load" in names
    if not isinstance(node, ast.Call):
        return False
    opens = {"trust_remote_code", "allow_pickle"}
    if any(k.arg in opens and ast.unparse(k.value) != "False" for k in node.keywords):
        return True
    if ast.unparse(node.func) == "torch.load":
        # Then torch unpickles tensors and plain data, and refuses the rest.
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        return given.get("weights_only") != "True"
    return ast.unparse(node.func) in {"eval", "exec", "torch.hub.load"}


def test_no_error_is_caught_without_naming_it() -> None:
    wrong = [
        place(path, node.lineno)
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    assert not wrong, "\n".join(wrong)


def test_files_stay_short() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for folder in (PACKAGE, ROOT / "tests", ROOT / "examples", ROOT / "benchmarks")
        for path in python_files(folder)
        if (lines := len(path.read_text("utf-8").splitlines())) > MAX_FILE_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_stay_short() -> None:
    wrong = [
        f"{place(path, node.lineno)}: {node.name} has {lines} lines"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_every_source_file_has_its_test_file() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: no {test.relative_to(ROOT)}"
        for path, tree in sources()
        if path.stem != "__init__" and not path.is_relative_to(NEEDS_NO_TEST_FILE)
        # Declarations alone (the sections of the config) have one test file together.
        if any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))
        for test in [
            ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name.lstrip('_')}")
        ]
        if not test.is_file()
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_called_after_nothing() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in (*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*"))
        if path.stem.removeprefix("test_") in FORBIDDEN_NAMES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", True),
        ("from torch import load", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, None, None, True)", True),
        ("torch.load(path, weights_only=True)", False),
        ("AutoConfig.from_pretrained(p, trust_remote_code=True)", True),
        ("AutoConfig.from_pretrained(p, trust_remote_code=False)", False),
        ("json.load(file)", False),
    ],
)
def test_the_search_for_foreign_code_finds_it(text: str, *, found: bool) -> None:
    assert any(runs_foreign_code(node) for node in ast.walk(ast.parse(text))) is found
