"""The `megatron` command: finds the command, reads its flags, checks them, starts it.

The one thing to know: nothing heavy is imported before the flags are known to be right, so help
and mistakes answer at once. `mtrain.cli.sft` is where training itself is written down.
"""

import functools
import sys
from collections.abc import Callable, Sequence

from mtrain import __version__
from mtrain.cli.errors import (
    EXIT_INTERRUPTED,
    end_failed_rank,
    error_line,
    exit_code,
    is_foreseen,
)
from mtrain.cli.launch import Launch, Placement, join_ranks, launch_ranks, read_environment
from mtrain.cli.parser import format_help, parse_config
from mtrain.config.checks import check_export, check_sft
from mtrain.config.model_checks import check_model_folder
from mtrain.config.path_checks import (
    check_datasets,
    check_output_dir,
    check_trackers,
    local_model_folder,
)
from mtrain.config.run import ExportConfig, SftConfig, resolve_export, resolve_sft

__all__ = ["main"]

_HELP_WORDS = {"-h", "--help", "help"}
_USAGE = """usage: megatron COMMAND [--flag value ...]

  sft      fine-tune a Hugging Face checkpoint and save one
  export   convert between Hugging Face and Megatron-Core checkpoints, merge adapters
  demo     make a tiny random model to try the others on

`megatron COMMAND --help` lists the flags. `megatron --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        argv: Words after `megatron`; default: those of this process.

    Returns:
        Exit code: 0, 2 for a mistake in the command line or files, 1 for what failed later, 130
        after Ctrl-C.
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
        return _find_command(command)(words[1:])
    except KeyboardInterrupt:
        print(f"megatron {command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, RuntimeError) as error:
        if not is_foreseen(error):
            raise
        print(error_line(command, error), file=sys.stderr)
        return exit_code(error)


def _find_command(name: str) -> Callable[[list[str]], int]:
    commands = {"sft": _sft, "export": _export, "demo": _demo}
    if name not in commands:
        raise ValueError(f"unknown command; there are {', '.join(commands)} (see megatron --help)")
    return commands[name]


def _sft(words: list[str]) -> int:
    if _HELP_WORDS & set(words):
        print(format_help(SftConfig, usage="megatron sft [--flag value ...]"))
        return 0
    here = read_environment()
    if isinstance(here, Placement) and here.world_size > 1:
        return _sft_rank(words, here)
    config = _read_sft_config(words, here)
    check_output_dir(config.checkpoint, source=config.model.model)
    from mtrain.cli.preparation import prepare

    prepare(config, world_size=here.world_size, show_progress=True)
    if isinstance(here, Launch):
        return launch_ranks(here, ["-m", "mtrain.cli.main", "sft", *words])
    from mtrain.cli.sft import run

    return run(config, here)


def _sft_rank(words: list[str], here: Placement) -> int:
    """One of several ranks; uncaught errors are reported once a node and end the process."""
    report = functools.partial(
        end_failed_rank, command="sft", rank=here.rank, failure_folder=here.failure_folder
    )
    sys.excepthook = lambda _kind, error, _trace: report(error)
    try:
        config = _read_sft_config(words, here)
        if here.rank == 0 and not here.is_prepared:
            check_output_dir(config.checkpoint, source=config.model.model)
        from mtrain.cli.preparation import prepare
        from mtrain.cli.sft import run

        join_ranks(here)
        if not here.is_prepared:
            prepare(config, world_size=here.world_size, show_progress=here.local_rank == 0)
        return run(config, here)
    except (KeyboardInterrupt, ValueError, RuntimeError) as error:
        # Not for `main`: a rank that failed must not wait for the others when it ends.
        report(error)


def _read_sft_config(words: list[str], here: Launch | Placement) -> SftConfig:
    config = resolve_sft(parse_config(SftConfig, words))
    check_sft(config, world_size=here.world_size)
    assert config.model.model is not None, "check_sft refuses it"
    folder = local_model_folder(config.model.model)
    check_datasets(config.data)
    check_trackers(config.logging)
    if folder is not None:
        check_model_folder(folder, model=config.model, parallel=config.parallel)
    return config


def _export(words: list[str]) -> int:
    if _HELP_WORDS & set(words):
        print(format_help(ExportConfig, usage="megatron export [--flag value ...]"))
        return 0
    check_export(resolve_export(parse_config(ExportConfig, words)))
    raise ValueError("export comes with a later release; sft already saves Hugging Face folders")


def _demo(words: list[str]) -> int:
    from mtrain.cli import demo

    return demo.run(words)


if __name__ == "__main__":
    sys.exit(main())
