"""Command line and YAML file -> frozen configuration, and `--help`.

The one thing to know: there is no list of flags here. Names, types, defaults and help come from
the dataclasses of `mtrain.config`, so a new field is a new flag. The grammar is small enough to be
written out: a token that starts with `--` is a flag, the tokens up to the next one are its values
(so negative numbers and texts with one dash need no quoting tricks). A `--config` file is spelled
out as flags in front of the command line, and of repeated flags the last one wins.
"""

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mtrain.config.fields import FlagSpec, flag_specs, spell
from mtrain.config.later import LATER
from mtrain.config.names import advice_for
from mtrain.config.run import ExportConfig, SftConfig

__all__ = ["format_help", "parse_config"]

C = TypeVar("C", SftConfig, ExportConfig)

_WIDTH = 100
_HELP_COLUMN = 40


def parse_config(command: type[C], argv: Sequence[str]) -> C:
    """Reads flags (and the file behind `--config`) into a configuration.

    Types are checked; choices, limits and combinations are the business of `mtrain.config.checks`.

    Args:
        command: `SftConfig` or `ExportConfig`.
        argv: Words after `megatron sft`.

    Raises:
        ValueError: Unknown flag, wrong number or type of values, unreadable file.
    """
    sections = _sections(command)
    specs = {spec.name: spec for section in sections.values() for spec in flag_specs(section)}
    words = _split_flags(argv)
    paths = [values for name, values in words if name == "config"]
    if paths:
        from_file = _read_config_file(paths[-1], specs)
        if any(name == "num_train_epochs" for name, _ in words):
            # Iterations win over epochs, but those of a file not over a flag.
            from_file = [word for word in from_file if word[0] != "train_iters"]
        words = from_file + words
    values = {}
    for name, texts in words:
        if name != "config":
            values[name] = _convert(_known(name, specs), texts)
    built = {
        attribute: section(**{n: values[n] for n in section.__dataclass_fields__ if n in values})
        for attribute, section in sections.items()
    }
    return command(**built)


def format_help(command: type[SftConfig] | type[ExportConfig], *, usage: str) -> str:
    """The text of `--help`: one group a section, every flag with its type and default."""
    only = {row.flag: row.accepted for row in LATER}
    lines = [f"usage: {usage}", ""]
    lines += _help_entry("--config FILE", "YAML file of flag names; the command line wins.")
    for section in _sections(command).values():
        lines += ["", f"{section.__doc__.splitlines()[0]}"]
        for spec in flag_specs(section):
            accepted = only.get(spec.name, ())
            limits = ", ".join(dict.fromkeys(map(spell, accepted)))
            text = f"{spec.help} {f'Only {limits} for now. ' if limits else ''}"
            text += f"[{spell(spec.default)}]"
            lines += _help_entry(f"--{spec.name} {_type_name(spec)}", text)
    return "\n".join(lines)


def _sections(command: type) -> dict[str, type]:
    hints = get_type_hints(command)
    return {field.name: hints[field.name] for field in dataclasses.fields(command)}


def _split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Cuts a command line into (flag name, values); `--a-b=c` is the flag a_b with one value."""
    words: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            words.append((name.replace("-", "_"), [value] if equals else []))
        elif words:
            words[-1][1].append(token)
        else:
            raise ValueError(f"unexpected word {token!r}: settings are given as --flag value")
    return words


def _known(name: str, specs: Mapping[str, FlagSpec]) -> FlagSpec:
    if name in specs:
        return specs[name]
    advice = advice_for(name)
    if advice is None:
        close = difflib.get_close_matches(name, [*specs, "config"], n=1)
        hint = f"did you mean --{close[0]}?" if close else "see --help"
        advice = f"unknown flag --{name}: {hint}"
    raise ValueError(advice)


def _read_config_file(
    values: list[str], specs: Mapping[str, FlagSpec]
) -> list[tuple[str, list[str]]]:
    """Spells a YAML (or JSON) file out as flags."""
    if len(values) != 1:
        raise ValueError(f"--config needs one file, got {len(values)}")
    import yaml

    path = Path(values[0])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path}: not a YAML file: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be a mapping of flag names to values")
    words = []
    for key, value in content.items():
        name = str(key).removeprefix("--").replace("-", "_")
        try:
            _known(name, specs)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from error
        words.append((name, _typed(value)))
    return words


def _typed(value: Any) -> list[str]:
    """A value of a YAML file as the words that would be typed."""
    if isinstance(value, list):
        return [text for item in value for text in _typed(item)]
    return [json.dumps(value) if isinstance(value, dict) else spell(value)]


def _convert(spec: FlagSpec, texts: list[str]) -> Any:
    hint, optional = _without_none(spec.type_hint)
    says_none = [text.lower() for text in texts] in (["none"], ["null"])
    is_none = says_none and "none" not in spec.choices
    if is_none and optional:
        return None
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return () if is_none else tuple(_convert_one(spec.name, item, text) for text in texts)
    if hint is bool and not texts:
        return True
    if len(texts) != 1:
        raise ValueError(f"--{spec.name} needs one value, got {texts or 'none'}")
    return _convert_one(spec.name, hint, texts[0])


def _convert_one(name: str, hint: Any, text: str) -> Any:
    if hint is str:
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--{name} {text}: must be true or false")
        return text.lower() == "true"
    if get_origin(hint) is Mapping:
        return _convert_json(name, text)
    kind = "a whole number" if hint is int else "a number"
    try:
        return hint(text)
    except ValueError as error:
        raise ValueError(f"--{name} {text}: must be {kind}") from error


def _convert_json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} {text}: not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f'--{name} {text}: must be a JSON object, like {{"key": 1}}')
    return value


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True), `int` -> (int, False)."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    (inner,) = (part for part in get_args(hint) if part is not type(None))
    return inner, True


def _type_name(spec: FlagSpec) -> str:
    hint, _ = _without_none(spec.type_hint)
    many = get_origin(hint) is tuple
    if many:
        hint = get_args(hint)[0]
    if spec.choices:
        name = "{" + ",".join(spec.choices) + "}"
    elif get_origin(hint) is Mapping:
        name = "JSON"
    else:
        name = "true|false" if hint is bool else hint.__name__.upper()
    return f"{name} ..." if many else name


def _help_entry(head: str, text: str) -> list[str]:
    indent = " " * _HELP_COLUMN
    body = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    head = f"  {head}"
    if len(head) < _HELP_COLUMN - 1:
        return [head + body[0][len(head) :], *body[1:]]
    return [head, *body]
