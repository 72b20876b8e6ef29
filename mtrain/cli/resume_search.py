"""Finds the checkpoint that a run continues, before anything heavy starts, and verifies it.

The one thing to know: the answer goes to the ranks as `--resume_from_checkpoint PATH`, so that all
of them continue the same one. A damaged checkpoint is put aside under a hidden name, and the one
before it is taken.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from mtrain.cli.parser import parse_config
from mtrain.config.resume import AUTO, STATE_FOLDER, TRAINER_FILE, find_checkpoints, find_runs
from mtrain.config.run import SftConfig

__all__ = ["pin_resume"]

_FLAG = "--resume_from_checkpoint"


def pin_resume(
    words: list[str], read: Callable[[list[str]], SftConfig], *, show: bool = True
) -> list[str]:
    """The words of a command, in which the checkpoint to continue is named where one is asked for.

    Args:
        words: As typed.
        read: Reads and checks them; the flags are checked before any checkpoint is read.
        show: Whether this process speaks for its machine. Whoever puts a checkpoint aside says so.

    Raises:
        ValueError: The checkpoint that was asked for is damaged, or a flag is wrong.
    """
    settings = parse_config(SftConfig, words).checkpoint
    if settings.resume_from_checkpoint != AUTO:
        if settings.resume_from_checkpoint is not None or not settings.finetune:
            resumed = read(words).checkpoint.resume_from_checkpoint
            _check(Path(resumed or ""))
        return words
    fresh = [*words, _FLAG, "none", "--finetune", "true"]
    output_dir = read(fresh).checkpoint.output_dir
    assert output_dir is not None, "resolving fills it"
    folder = Path(output_dir).expanduser()
    for checkpoint in find_checkpoints(folder):
        if not (checkpoint / STATE_FOLDER / TRAINER_FILE).is_file():
            continue
        try:
            _check(checkpoint)
        except ValueError as error:
            if aside := _put_aside(checkpoint, error):
                how = f"put aside as {aside.name}, trying the one before it"
                print(f"warning: {error}; {how}", file=sys.stderr)
            continue
        return [*words, _FLAG, str(checkpoint)]
    if show:
        print(f"no checkpoint to continue in {output_dir}: a new run starts", file=sys.stderr)
    _clear(folder)
    return fresh


def _check(checkpoint: Path) -> None:
    """Reads a checkpoint whole.

    Raises:
        ValueError: Something in it is not as it was saved.
    """
    # Here, not above: a run from the start needs none of it.
    from mtrain.verify.files import check_files

    try:
        faults = check_files(checkpoint)
    except OSError as error:
        raise ValueError(f"{checkpoint} cannot be read: {error.strerror}") from error
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        found = f"{faults[0].kind}: {faults[0].text}{more}"
        raise ValueError(f"{checkpoint} is damaged ({found}), see megatron verify")


def _clear(output_dir: Path) -> None:
    """Removes saves that were cut short: a run that dies in its first one never goes on in it."""
    if runs := find_runs(output_dir):
        # As above.
        from mtrain.checkpoint.run_folder import remove_leftovers

        for run in runs:
            remove_leftovers(run)


def _put_aside(checkpoint: Path, error: ValueError) -> Path | None:
    """Hides a damaged checkpoint, so that a new one can have its name.

    Args:
        checkpoint: The checkpoint.
        error: What is wrong with it.

    Returns:
        Where it is now; None when another process was faster, which speaks for all then.

    Raises:
        ValueError: It cannot be renamed.
    """
    names = (f".{checkpoint.name}.damaged-{number}" for number in itertools.count())
    target = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    try:
        return checkpoint.rename(target)
    except FileNotFoundError:
        return None
    except OSError as refused:
        raise ValueError(f"{error}; it cannot be put aside: {refused.strerror}") from refused
