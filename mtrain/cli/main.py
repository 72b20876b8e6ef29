"""The `megatron` command: finds the command, reads its flags, checks them, starts it.

The one thing to know: nothing heavy is imported before the flags are known to be right, so help
and mistakes answer at once. `mtrain.cli.sft` is where training itself is written down, and
`mtrain.cli.export` the other command that runs on ranks.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mtrain import __version__
from mtrain.cli.errors import (
    EXIT_INTERRUPTED,
    end_failed_rank,
    error_line,
    exit_code,
    is_foreseen,
    signal_line,
)
from mtrain.cli.launch import (
    Launch,
    Placement,
    join_ranks,
    launch_ranks,
    launcher_began,
    rank_exit_code,
    read_environment,
    wait_until_prepared,
)
from mtrain.cli.parser import format_help, parse_config
from mtrain.cli.start_clock import StartClock
from mtrain.config.checks import check_export, check_sft
from mtrain.config.model_checks import check_model_folder
from mtrain.config.path_checks import (
    check_adapters,
    check_datasets,
    check_export_dir,
    check_mcore_model,
    check_run_dir,
    check_trackers,
    local_config_folder,
)
from mtrain.config.resume import resolve_resumed
from mtrain.config.run import ExportConfig, SftConfig, resolve_export
from mtrain.config.saved_arguments import fill_base
from mtrain.data.without_torch import hide_torch
from mtrain.platform.signals import EndedBySignal, end_on_signals

if TYPE_CHECKING:
    from mtrain.cli.model_source import ModelSource

__all__ = ["main"]

C = TypeVar("C", SftConfig, ExportConfig)

_HELP_WORDS = {"-h", "--help", "help"}
_USAGE = """usage: megatron COMMAND [--flag value ...]

  sft      fine-tune a Hugging Face checkpoint and save one
  export   merge an adapter into its model, or rewrite it
  verify   check that a checkpoint is what was saved, or compare two
  demo     make a tiny random model to try the others on

`megatron COMMAND --help` lists the flags. `megatron --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        argv: Words after `megatron`; default: those of this process.

    Returns:
        Exit code; `mtrain.cli.errors` says what it means.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in _HELP_WORDS:
        print(_USAGE)
        return 0
    if words[0] in ("--version", "-V"):
        print(f"mtrain {__version__}")
        return 0
    command = words[0]
    try:
        with end_on_signals():
            return _find_command(command)(words[1:])
    except EndedBySignal as error:
        print(signal_line(command, error), file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(f"megatron {command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, RuntimeError) as error:
        if not is_foreseen(error):
            raise
        print(error_line(command, error), file=sys.stderr)
        return exit_code(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command(Generic[C]):
    """A command that runs on ranks.

    Attributes:
        name: What is typed.
        config: Its configuration.
        read: Words and number of ranks -> resolved and checked configuration.
        check_output: Checks the output folder; once for all ranks.
        pin: Replaces in the words what one process finds out for all; with the reading function.
        check_inputs: Checks what is read, before anything is started.
        prepare: Prepares what was checked, for all ranks of this machine; what that is called.
        load_run: Imports what happens on each rank.
    """

    name: str
    config: type[C]
    read: Callable[[list[str], int], C]
    check_output: Callable[[C], None]
    pin: Callable[..., list[str]]
    check_inputs: Callable[..., "ModelSource"]
    prepare: Callable[..., str | None]
    load_run: Callable[[], Callable[[C, Placement, StartClock], int]]

    def __call__(self, words: list[str]) -> int:
        """Runs the command, or starts the ranks that do."""
        if _HELP_WORDS & set(words):
            print(format_help(self.config, usage=f"megatron {self.name} [--flag value ...]"))
            return 0
        clock = StartClock(launcher_began())
        here = read_environment()
        if isinstance(here, Placement) and here.world_size > 1:
            return self._on_rank(words, here, clock)
        words = self.pin(words, lambda pinned: self.read(pinned, here.world_size))
        config = self.read(words, here.world_size)
        self.check_output(config)
        source = self.check_inputs(config, world_size=here.world_size, show_progress=True)
        prepare = functools.partial(self.prepare, config, source, show_progress=True)
        if isinstance(here, Launch):
            hide_torch()
            return launch_ranks(here, ["-m", "mtrain.cli.main", self.name, *words], prepare)
        clock.end_phase("checks")
        here = dataclasses.replace(here, data_key=prepare())
        clock.end_phase("data")
        run = self.load_run()
        clock.end_phase("imports")
        return run(config, here, clock)

    def _on_rank(self, words: list[str], here: Placement, clock: StartClock) -> int:
        """One of several ranks; uncaught errors are reported once a node and end the process."""
        report = functools.partial(
            end_failed_rank, command=self.name, rank=here.rank, failure_folder=here.failure_folder
        )
        sys.excepthook = lambda _kind, error, _trace: report(error)
        try:
            if here.is_prepared:
                config = self.read(words, here.world_size)
                run = self.load_run()
                clock.end_phase("imports")
                here = wait_until_prepared(here)
                clock.end_phase("data")
            else:
                config, here = self._prepare_on_rank(words, here, clock)
                run = self.load_run()
                clock.end_phase("imports")
            return rank_exit_code(here, run(config, here, clock))
        except (EndedBySignal, KeyboardInterrupt, ValueError, RuntimeError) as error:
            # Not for `main`: a rank that failed must not wait for the others when it ends.
            report(error)

    def _prepare_on_rank(
        self, words: list[str], here: Placement, clock: StartClock
    ) -> tuple[C, Placement]:
        """What a launcher of ours does before, where somebody else started the ranks."""
        show = here.local_rank == 0
        words = self.pin(words, lambda pinned: self.read(pinned, here.world_size), show=show)
        config = self.read(words, here.world_size)
        if here.rank == 0:
            self.check_output(config)
        join_ranks(here)
        source = self.check_inputs(config, world_size=here.world_size, show_progress=show)
        clock.end_phase("checks")
        here = dataclasses.replace(here, data_key=self.prepare(config, source, show_progress=show))
        clock.end_phase("data")
        return config, here


def _find_command(name: str) -> Callable[[list[str]], int]:
    commands = {"sft": _SFT, "export": _EXPORT, "verify": _verify, "demo": _demo}
    if name not in commands:
        raise ValueError(f"unknown command; there are {', '.join(commands)} (see megatron --help)")
    return commands[name]


def _read_sft(words: list[str], world_size: int) -> SftConfig:
    config = fill_base(resolve_resumed(parse_config(SftConfig, words)))
    check_sft(config, world_size=world_size)
    _check_model(config)
    check_adapters(config.tuner)
    check_datasets(config.data)
    check_trackers(config.logging)
    return config


def _read_export(words: list[str], world_size: int) -> ExportConfig:
    config = fill_base(resolve_export(parse_config(ExportConfig, words)))
    check_export(config, world_size=world_size)
    _check_model(config)
    check_adapters(config.tuner)
    return config


def _check_model(config: SftConfig | ExportConfig) -> None:
    check_mcore_model(config.model)
    folder = local_config_folder(config.model)
    if folder is not None:
        check_model_folder(folder, model=config.model, parallel=config.parallel)


# Each imports what it needs when it is called: none of it is needed to find a mistake.
def _check_inputs(config: SftConfig | ExportConfig, **options: Any) -> "ModelSource":
    from mtrain.cli.preparation import check_inputs

    return check_inputs(config, **options)


def _prepare_data(config: SftConfig, source: "ModelSource", *, show_progress: bool) -> str:
    from mtrain.cli.preparation import prepare_data

    return prepare_data(config, source, show_progress=show_progress)


def _prepare_nothing(*_: object, **__: object) -> None:
    return None


def _pin_sft(
    words: list[str], read: Callable[[list[str]], SftConfig], *, show: bool = True
) -> list[str]:
    from mtrain.cli.resume_search import pin_resume

    return pin_resume(words, read, show=show)


def _pin_nothing(words: list[str], *_: object, **__: object) -> list[str]:
    return words


def _load_sft() -> Callable[[SftConfig, Placement, StartClock], int]:
    from mtrain.cli.sft import run

    return run


def _load_export() -> Callable[[ExportConfig, Placement, StartClock], int]:
    from mtrain.cli.export import run

    return lambda config, here, _clock: run(config, here)


_SFT = _Command(
    name="sft",
    config=SftConfig,
    read=_read_sft,
    check_output=check_run_dir,
    pin=_pin_sft,
    check_inputs=_check_inputs,
    prepare=_prepare_data,
    load_run=_load_sft,
)
_EXPORT = _Command(
    name="export",
    config=ExportConfig,
    read=_read_export,
    check_output=check_export_dir,
    pin=_pin_nothing,
    check_inputs=_check_inputs,
    prepare=_prepare_nothing,
    load_run=_load_export,
)


def _verify(words: list[str]) -> int:
    from mtrain.cli import verify

    return verify.run(words)


def _demo(words: list[str]) -> int:
    from mtrain.cli import demo

    return demo.run(words)


if __name__ == "__main__":
    sys.exit(main())
