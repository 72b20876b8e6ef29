"""Finds `megatron ...` commands in shell text, for the tests that parse recipes and documents."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mtrain.cli.parser import parse_config
from mtrain.config import ExportConfig, SftConfig

CONFIG_CLASSES = {"sft": SftConfig, "export": ExportConfig}


@dataclass(frozen=True, slots=True)
class Command:
    """`megatron <name> <words>`."""

    name: str
    words: tuple[str, ...]

    def parse(self) -> SftConfig | ExportConfig:
        """Parses the words; a `--config` file of an example need not exist."""
        words = list(self.words)
        if "--config" in words and not Path(words[words.index("--config") + 1]).is_file():
            del words[words.index("--config") : words.index("--config") + 2]
        return parse_config(CONFIG_CLASSES[self.name], words)

    def __str__(self) -> str:
        return f"{self.name} {' '.join(self.words)}"[:60]


def commands_in(shell_text: str) -> list[Command]:
    """The sft and export commands of a script; variables are replaced by a number.

    A `--help` and what follows an unquoted `;`, `&`, `|`, `>` is not part of a command.
    """
    joined = re.sub(r"\\\n", " ", shell_text)
    commands = []
    for line in joined.splitlines():
        match = re.search(r"\bmegatron(?:\.cli\.main)? +(sft|export)\b(.*)", line)
        match = match or re.search(r"\bmtrain\.cli\.main +(sft|export)\b(.*)", line)
        if match is None or line.lstrip().startswith("#"):
            continue
        text = re.sub(r'"\$@"|\$@', "", match[2])
        text = re.sub(r"\$\{[^}]*\}|\$\w+", "1", text)
        # Not shlex's own comments, which start inside of data.jsonl#500 too.
        words = _until_operator(shlex.split(re.sub(r"\s#\s.*", "", text)))
        if "--help" not in words:
            commands.append(Command(match[1], words))
    return commands


def _until_operator(words: list[str]) -> tuple[str, ...]:
    for index, word in enumerate(words):
        if re.fullmatch(r"[;&|]+|\d?>.*", word):
            return tuple(words[:index])
        if word.endswith(";"):
            return (*words[:index], word[:-1])
    return tuple(words)
