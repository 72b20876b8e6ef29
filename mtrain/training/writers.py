"""Where log lines go: the console with its progress bar, `logging.jsonl`, and trackers.

The one thing to know: only rank 0 opens a `RunLog`. Packages of trackers are imported when asked
for; `mtrain.config.path_checks` says before anything starts that one is missing.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from tqdm import tqdm

from mtrain.config.logging import LoggingConfig
from mtrain.training.console import console_line

__all__ = ["JsonLines", "RunLog", "Writer", "open_run_log"]


class Writer(Protocol):
    """One destination of log lines."""

    def write(self, values: Mapping[str, float | int], *, step: int, kind: str) -> None:
        """Takes the numbers of one line; `kind` is "train" or "eval"."""

    def close(self) -> None:
        """Flushes and closes."""


class RunLog:
    """Progress bar and writers of a run; a context manager.

    Args:
        writers: Destinations besides the console.
        total_steps: Length of the progress bar.
        first_step: Steps that were done before.
        stream: Text stream of the console.
    """

    def __init__(
        self,
        writers: list[Writer],
        *,
        total_steps: int,
        first_step: int = 0,
        stream: TextIO = sys.stderr,
    ) -> None:
        self._writers = writers
        self._stream = stream
        self._total_steps = total_steps
        self._once: Mapping[str, float] = {}
        # disable=None: no bar where nobody watches it, such as a log file.
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", file=stream, disable=None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        for writer in self._writers:
            writer.close()

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def tell_once(self, line: str, values: Mapping[str, float]) -> None:
        """Says something that is no number of a step: on the console, and in the files once.

        Args:
            line: For the console.
            values: Numbers by name, for the next line of `logging.jsonl`.
        """
        tqdm.write(line, file=self._stream)
        self._once = values

    def write(self, values: Mapping[str, float | int], *, step: int, kind: str) -> None:
        """Writes one line everywhere.

        Args:
            values: Numbers by name; `step` and `total_steps` are added where they are missing.
            step: Steps done.
            kind: "train" or "eval".
        """
        shown = {name: value for name, value in values.items() if name not in _POSITION}
        line = console_line(shown, step=step, total_steps=self._total_steps, kind=kind)
        tqdm.write(line, file=self._stream)
        for writer in self._writers:
            once = self._once if isinstance(writer, JsonLines) else {}
            writer.write({**shown, **once}, step=step, kind=kind)
        self._once = {}


_POSITION = ("step", "total_steps")


def open_run_log(
    settings: LoggingConfig,
    *,
    folder: Path,
    total_steps: int,
    first_step: int = 0,
    arguments: Mapping[str, Any],
) -> RunLog:
    """Opens every destination that the settings ask for.

    Where a resumed run goes on in a folder, lines of later steps are dropped: they will be written
    again.

    Args:
        settings: The logging section.
        folder: Folder of the run; `logging.jsonl` and `runs/` go there.
        total_steps: Steps of the run.
        first_step: Steps that were done before.
        arguments: The resolved configuration, for trackers that show it.
    """
    path = folder / "logging.jsonl"
    _drop_later_lines(path, first_step)
    writers: list[Writer] = [JsonLines(path, total_steps=total_steps)]
    for name in settings.report_to:
        if name == "tensorboard":
            writers.append(_Tensorboard(settings, folder, first_step=first_step))
        elif name == "wandb":
            writers.append(_Wandb(settings, folder, arguments))
        elif name == "swanlab":
            writers.append(_Swanlab(settings, folder, arguments))
    return RunLog(writers, total_steps=total_steps, first_step=first_step)


def _drop_later_lines(path: Path, step: int) -> None:
    """Keeps the lines up to a step; the last one may have been cut short by a crash."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class JsonLines:
    """One JSON object a line, on disk as soon as it is written.

    Args:
        path: The file; lines are appended.
        total_steps: Steps of the run, part of every line.
    """

    def __init__(self, path: Path, *, total_steps: int) -> None:
        self._total_steps = total_steps
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, float | int], *, step: int, kind: str) -> None:
        """Appends a line; numbers of an evaluation get the prefix `eval_`, NaN becomes null."""
        prefix = "" if kind == "train" else f"{kind}_"
        line: dict[str, float | int | None] = {"step": step, "total_steps": self._total_steps}
        for name, value in values.items():
            line[prefix + name] = value if math.isfinite(value) else None
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Tensorboard:
    def __init__(self, settings: LoggingConfig, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            settings.tensorboard_dir or str(folder / "runs"),
            max_queue=settings.tensorboard_queue_size,
            purge_step=first_step + 1 if first_step else None,
        )

    def write(self, values: Mapping[str, float | int], *, step: int, kind: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, settings: LoggingConfig, folder: Path, arguments: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name or folder.name,
            dir=str(folder),
            config=dict(arguments),
        )

    def write(self, values: Mapping[str, float | int], *, step: int, kind: str) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Swanlab:
    def __init__(self, settings: LoggingConfig, folder: Path, arguments: Mapping[str, Any]) -> None:
        import swanlab

        self._run = swanlab.init(
            project=settings.swanlab_project,
            experiment_name=settings.swanlab_exp_name or folder.name,
            logdir=str(folder / "swanlab"),
            config=dict(arguments),
        )

    def write(self, values: Mapping[str, float | int], *, step: int, kind: str) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
