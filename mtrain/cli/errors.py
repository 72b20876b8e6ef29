"""What a user sees when something fails: one line for what we foresaw, a traceback otherwise.

The one thing to know: a ValueError (a mistake of the user) or RuntimeError (the environment cannot)
that a `raise` of mtrain's own raised says all there is to say. One out of a library is a fault that
needs its traceback.

Exit codes: 0 all was done, 1 something failed, 2 a mistake of the user, 124 nothing happened for
--hang_timeout, 130 Ctrl-C, 138 and 143 ended by SIGUSR1 and SIGTERM (training is saved first), 128
plus its number for any other signal.
"""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import mtrain
from mtrain.platform.node_notes import NodeNotes
from mtrain.platform.signals import EndedBySignal, signal_exit_code

__all__ = [
    "EXIT_FAILURE",
    "EXIT_INTERRUPTED",
    "EXIT_USER_ERROR",
    "OneLineParser",
    "end_failed_rank",
    "error_line",
    "exit_code",
    "is_foreseen",
    "signal_line",
]

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_PACKAGE = Path(mtrain.__file__).parent


class OneLineParser(argparse.ArgumentParser):
    """Argparse whose mistakes are one line, as those of the commands with many flags."""

    def error(self, message: str) -> NoReturn:
        """Leaves the printing to `megatron`.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)


def is_foreseen(error: BaseException) -> bool:
    """Whether the error is a ValueError or RuntimeError that mtrain raised itself."""
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, ValueError | RuntimeError) or not frames:
        return False
    # Functions written in C (most of torch) leave no frame: what they raise seems to come from the
    # line of ours that calls them, but that line is no `raise`.
    origin = frames[-1]
    return origin.line.startswith("raise ") and Path(origin.filename).is_relative_to(_PACKAGE)


def exit_code(error: BaseException) -> int:
    """2 for a mistake of the user, 1 for everything else that fails; see above."""
    if isinstance(error, EndedBySignal):
        return signal_exit_code(error.signum)
    return EXIT_USER_ERROR if isinstance(error, ValueError) else EXIT_FAILURE


def error_line(command: str, error: BaseException) -> str:
    """The one line that is printed for a foreseen error."""
    return f"megatron {command}: error: {' '.join(str(error).split())}"


def signal_line(command: str, error: EndedBySignal) -> str:
    """The one line that is printed when a signal ends the command."""
    name = signal.Signals(error.signum).name
    if error.at_once:
        return f"megatron {command}: ended at once by a second {name}"
    # Between the first and the last step a signal raises nothing.
    note = " outside training; nothing was lost" if command == "sft" else ""
    return f"megatron {command}: ended by {name}{note}"


def end_failed_rank(
    error: BaseException,
    *,
    command: str,
    rank: int,
    failure_folder: Path | None,
) -> NoReturn:
    """Reports an uncaught error of one rank and ends its process at once.

    The first rank of a node to fail prints its traceback, the others one line: their errors are
    mostly the echo of the first. The process does not run exit handlers, because those may wait
    for ranks that wait for this one.

    Args:
        error: The uncaught error.
        command: The command that the rank runs, for the message.
        rank: Global rank.
        failure_folder: A folder that the ranks of this node share, or None.
    """
    code = EXIT_FAILURE
    is_first = NodeNotes(failure_folder).claim_failure()
    if isinstance(error, KeyboardInterrupt):
        code, text = EXIT_INTERRUPTED, ""
    elif isinstance(error, EndedBySignal):
        code, text = exit_code(error), f"{signal_line(command, error)}\n" if is_first else ""
    elif is_foreseen(error):
        code, text = exit_code(error), f"{error_line(command, error)}\n" if is_first else ""
    elif is_first:
        lines = traceback.format_exception(error)
        text = f"megatron {command}: rank {rank} failed:\n{''.join(lines)}"
    else:
        summary = " ".join(traceback.format_exception_only(error)[-1].split())
        text = f"megatron {command}: rank {rank} stopped as well: {summary[:120]}\n"
    sys.stdout.flush()
    # In one write, so that the reports of two ranks do not mix, and to the descriptor, because
    # torch's own hook puts a buffer in the place of sys.stderr while it calls this one.
    sys.stderr.flush()
    os.write(2, text.encode(errors="backslashreplace"))
    os._exit(code)
