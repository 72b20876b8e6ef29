"""Finds the checkpoint that a run continues, before anything heavy starts, and verifies it.

The one thing to know: the answer goes to the ranks as `--resume_from_checkpoint PATH`, so that all
of them continue the same one. A damaged checkpoint is put aside under a hidden name, and the one
before it is taken.
"""

import contextlib
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
    """The words of a command that name the checkpoint to continue, where one is asked for.

    Args:
        words: As typed.
        read: Reads and checks them; the flags are checked before any checkpoint is read.
        show: Whether this process speaks for its machine.

    Raises:
        ValueError: The checkpoint that was asked for is damaged, or a flag is wrong.
    """
    settings = parse_config(SftConfig, words).checkpoint
    if settings.resume_from_checkpoint != AUTO:
        if settings.resume_from_checkpoint not in (None, "none") or not settings.finetune:
            resumed = read(words).checkpoint.resume_from_checkpoint
            _check(Path(resumed or ""))
        return words
    fresh = [*words, _FLAG, "none"]
    output_dir = read(fresh).checkpoint.output_dir
    assert output_dir is not None, "resolving fills it"
    folder = Path(output_dir).expanduser()
    for checkpoint in find_checkpoints(folder):
        if not (checkpoint / STATE_FOLDER / TRAINER_FILE).is_file():
            continue
        try:
            _check(checkpoint)
        except ValueError as error:
            _put_aside(checkpoint)
            if show:
                print(f"warning: {error}; trying the one before it", file=sys.stderr)
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

    faults = check_files(checkpoint)
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


def _put_aside(checkpoint: Path) -> None:
    """Hides a damaged checkpoint, so that a new one can have its name."""
    for number in range(1000):
        target = checkpoint.with_name(f".{checkpoint.name}.damaged-{number}")
        if not target.exists():
            # Another process may have done it.
            with contextlib.suppress(FileNotFoundError):
                checkpoint.rename(target)
            return
