"""A `Saver` for tests: errors are raised, and the last report is returned."""

from collections.abc import Callable
from pathlib import Path

from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.checkpoint.folder import Contents, SaveError
from mtrain.checkpoint.run_folder import Retention
from mtrain.checkpoint.saver import Saver, SaveReport
from mtrain.parallel import World


def fail(error: SaveError) -> None:
    raise error


def save(
    run: Path,
    steps: list[int],
    contents: Callable[[OpenFile], Contents],
    *,
    world: World,
    limit: int | None = None,
    protected: Path | None = None,
    is_async: bool = False,
) -> list[SaveReport]:
    """Saves checkpoints one after the other, as a run does; what was reported of each."""
    reports: list[SaveReport] = []
    saver = Saver(
        run,
        world=world,
        retention=Retention(limit=limit, protected=protected),
        is_async=is_async,
        report=reports.append,
        fail=fail,
    )
    for step in steps:
        saver.save(step, contents(saver.open_file))
    saver.wait()
    return reports
