"""A run that ends, or a machine that loses its power, at any moment of a save."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.bridge.written import WrittenFile
from mtrain.checkpoint.folder import LATEST_FILE, Contents
from mtrain.checkpoint.run_folder import create_run_folder, latest_checkpoint
from mtrain.cli.resume_search import pin_resume
from mtrain.config import CheckpointConfig, SftConfig
from mtrain.config.resume import checkpoint_step, list_checkpoints
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.verify.files import check_files
from tests.checkpoint.disk import Change, Killed, PowerCut, WatchedDisk, read_tree, write_tree
from tests.checkpoint.saving import save, tiny_contents
from tests.ranks import run_ranks

ONE = ParallelLayout()
TWO = ParallelLayout(world_size=2)
STARTED = datetime(2026, 11, 21, 9, 5, 7)


def begin(state: ParallelState, out: Path, found: Path | None) -> Path:
    return create_run_folder(
        out, add_version=True, started=STARTED, world=state.world, resumed=found
    )


def save_tiny(
    state: ParallelState, run: Path, steps: list[int], *, is_async: bool = False, **options
) -> None:
    contents = partial(tiny_contents, world=state.world)
    save(run, steps, contents, world=state.world, is_async=is_async, **options)


def search(out: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint auto` continues."""
    config = SftConfig(checkpoint=CheckpointConfig(output_dir=str(out)))
    words = ["--resume_from_checkpoint", "auto"]
    pinned = pin_resume(words, lambda _: config, show=False)
    found = pinned[len(words) + 1]
    return None if found == "none" else Path(found)


def hidden(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob(".*"))


def ended_save(state: ParallelState, disk: WatchedDisk, step: int, *, is_async: bool) -> None:
    """A save by a run that ends meanwhile, unless the disk lets it."""
    out = disk.root
    last = next(out.glob(f"*/checkpoint-{step - 1}"), None)
    with disk, contextlib.suppress(Killed):
        run = begin(state, out, last)
        save_tiny(state, run, [step], limit=2, is_async=is_async)


def go_on(state: ParallelState, out: Path, *, least: int) -> int:
    """The next run; the step that it found."""
    found = search(out)
    step = 0 if found is None else checkpoint_step(found)
    assert step >= least
    run = begin(state, out, found)
    complete = list_checkpoints(run)
    assert [fault for checkpoint in complete for fault in check_files(checkpoint)] == []
    assert (found is None) == (complete == [])
    assert latest_checkpoint(run) in (*complete[-2:], None)
    with WatchedDisk(out):  # which flushes nothing
        save_tiny(state, run, [step + 1], limit=2, protected=found)
    kept = [f"checkpoint-{kept}" for kept in range(max(1, step), step + 2)]
    assert sorted(path.name for path in run.iterdir()) == [*kept, LATEST_FILE]
    assert hidden(out) == []
    return step


def ends_everywhere(folder: Path) -> Iterator[WatchedDisk]:
    """Disks that end a run before one change after the other, or in the middle of a write."""
    for number in count(1):
        for is_cut in (False, True):
            disk = WatchedDisk(folder / f"{number}-{is_cut}", end_at=number, is_cut=is_cut)
            yield disk
            if disk.ended_at is None:
                return
            if disk.ended_at.kind != "write":
                break


def end_everywhere(
    state: ParallelState, folder: Path, steps: list[int], is_async: bool
) -> list[tuple[str, int]]:
    """Ends a run everywhere in its save: what was not made, and what the next run found."""
    before = folder / "before"
    before.mkdir()
    if steps:
        save_tiny(state, begin(state, before, None), steps)
    last = max(steps, default=0)
    ends = []
    for disk in ends_everywhere(folder):
        shutil.copytree(before, disk.root)
        ended_save(state, disk, last + 1, is_async=is_async)
        found = go_on(state, disk.root, least=last)
        shutil.rmtree(disk.root)
        ends.append((disk.ended_at.kind if disk.ended_at else "nothing", found))
    return ends


@pytest.mark.parametrize(
    ("steps", "is_async"),
    [([1, 2], False), ([1, 2], True), ([], False)],
    ids=["sync", "async", "first"],
)
def test_a_run_that_is_killed_at_any_change_of_the_disk_goes_on(tmp_path, steps, is_async):
    """T01, T07: nobody has to clean up, and what a killed run leaves goes with the next one."""
    [ends] = run_ranks(ONE, end_everywhere, tmp_path, steps, is_async)
    assert ends[-1] == ("nothing", max(steps, default=0) + 1)
    kinds = {kind for kind, _ in ends}
    assert kinds >= {"mkdir", "create", "write", "flush", "rename", "unlink"}
    assert ("rmdir" in kinds) == (steps != [])
    found = [step for _, step in ends]
    assert found == sorted(found)
    assert len(set(found)) == 2
    assert len(ends) > 40


def recorded_run(state: ParallelState, out: Path, is_async: bool) -> list[Change]:
    """All changes of a run of two saves, of which the older one is deleted."""
    with WatchedDisk(out.parent) as disk:
        report = lambda saved: disk.note("published", saved.folder)  # noqa: E731
        run = begin(state, out, None)
        save_tiny(state, run, [1, 2], limit=1, is_async=is_async, report=report)
    return disk.changes


def cut_power(state: ParallelState, folder: Path, is_async: bool) -> int:
    """Looks for a checkpoint in all that may be left; says how many different things that were."""
    root = folder / "recorded"
    root.mkdir()
    changes = recorded_run(state, root / "out", is_async)
    # root, out and the run hold others.
    power_cut = PowerCut(root, num_outer=3)
    seen: dict[str, int | None] = {}
    published = 0
    for change in changes:
        power_cut.apply(change)
        if change.kind == "published":
            published = checkpoint_step(change.path)
        for tree in power_cut.trees():
            key = repr(tree)
            if key not in seen:
                seen[key] = step_left(folder / str(len(seen)), tree)
            assert seen[key] >= published, f"step {seen[key]} after {change}, {sorted(tree)}"
    # Nothing changed the disk without being seen.
    assert read_tree(root) in power_cut.trees()
    return len(seen)


def step_left(folder: Path, tree: dict[str, bytes | None]) -> int:
    """The step that is found, where everything with the name of a checkpoint is complete."""
    write_tree(tree, folder)
    for checkpoint in folder.glob("out/*/checkpoint-*"):
        assert check_files(checkpoint) == []
    found = search(folder / "out")
    shutil.rmtree(folder)
    return 0 if found is None else checkpoint_step(found)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_power_cut_leaves_what_was_published(tmp_path, is_async):
    """T08, T07: nothing has the name of a checkpoint before all its bytes are on disk."""
    [count] = run_ranks(ONE, cut_power, tmp_path, is_async)
    assert count > 100


def kill_rank(state: ParallelState, run: Path, is_async: bool) -> None:
    """Rank 1 is killed while it writes; rank 0 leaves a note of what it heard."""
    save_tiny(state, run, [1])

    def contents(open_file: OpenFile) -> Contents:
        tiny = tiny_contents(open_file, world=state.world)
        return Contents(
            write=lambda folder: [*tiny.write(folder), partial(die, state)],
            num_bytes=tiny.num_bytes,
            source=tiny.source,
            folders=tiny.folders,
            finish=tiny.finish,
        )

    try:
        save(run, [2], contents, world=state.world, is_async=is_async)
    except RuntimeError as error:
        (run / "heard.txt").write_text(str(error))
        raise


def die(state: ParallelState) -> list[WrittenFile]:
    if state.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return []


def go_on_after(state: ParallelState, out: Path, found: Path) -> list[str]:
    save_tiny(state, begin(state, out, found), [2])
    return sorted(path.name for path in found.parent.glob(".*"))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_ranks_whose_peer_is_killed_while_it_saves_end_and_publish_nothing(tmp_path, is_async):
    """T02."""
    run = tmp_path / "v0-20261121-090507"
    run.mkdir()
    with pytest.raises(AssertionError):
        run_ranks(TWO, kill_rank, run, is_async)
    assert "onnection" in (run / "heard.txt").read_text()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-1"]
    assert latest_checkpoint(run) == search(tmp_path) == run / "checkpoint-1"
    assert run_ranks(TWO, go_on_after, tmp_path, run / "checkpoint-1") == [[], []]
    assert latest_checkpoint(run) == run / "checkpoint-2"
