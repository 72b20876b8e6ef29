import json
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mtrain.bridge.written import WrittenFile, record_file
from mtrain.checkpoint.folder import (
    LATEST_FILE,
    Contents,
    SaveError,
    publish_folder,
    write_atomically,
)
from mtrain.checkpoint.run_folder import latest_checkpoint, list_checkpoints
from mtrain.parallel import ParallelLayout, ParallelState
from tests.checkpoint.saving import save
from tests.ranks import run_ranks

ONE = ParallelLayout()
TWO = ParallelLayout(world_size=2)


def writer(state: ParallelState, size: int = 8) -> Callable[[Path], list[WrittenFile]]:
    def write(folder: Path) -> list[WrittenFile]:
        path = folder / f"rank-{state.rank}.bin"
        path.write_bytes(bytes(size))
        return [record_file(folder, path)]

    return write


def contents_of(state: ParallelState, **changes) -> Contents:
    write = changes.get("write") or writer(state)
    return Contents(
        write=lambda folder: [lambda: write(folder)],
        num_bytes=changes.get("num_bytes", 16),
        source={"model": f"seen by rank {state.rank}"},
        sources=[changes["protected"]] if "protected" in changes else [],
    )


def publish(
    state: ParallelState, run: Path, steps: list[int], limit: int | None = None, **changes
) -> list[str]:
    protected = changes.get("protected")
    contents = contents_of(state, **changes)
    save(run, steps, lambda _: contents, world=state.world, limit=limit, protected=protected)
    return sorted(path.name for path in run.iterdir())


def test_a_checkpoint_holds_the_files_of_all_ranks_and_is_the_latest(tmp_path):
    for names in run_ranks(TWO, publish, tmp_path, [2, 10]):
        assert names == ["checkpoint-10", "checkpoint-2", LATEST_FILE]
    for name in ("checkpoint-2", "checkpoint-10"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "manifest.json",
            "rank-0.bin",
            "rank-1.bin",
        ]
    assert (tmp_path / LATEST_FILE).read_text() == "10\n"
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_tracker_that_names_nothing_is_not_believed(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / ".checkpoint-9.staged-1").mkdir()
    (tmp_path / LATEST_FILE).write_text("7\n")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


def die_at(nth: int) -> tuple[pytest.MonkeyPatch, Callable[[], int]]:
    """Ends the process after the nth call that changes the disk."""
    patch = pytest.MonkeyPatch()
    calls = 0

    def dying(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            result = function(*args, **kwargs)
            calls += 1
            if calls == nth:
                raise Killed
            return result

        return call

    for owner, name in [
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (shutil, "rmtree"),
    ]:
        patch.setattr(owner, name, dying(getattr(owner, name)))
    return patch, lambda: calls


def killed_saves(state: ParallelState, output_dir: Path) -> int:
    nth = 0
    while True:
        nth += 1
        run = output_dir / str(nth)
        run.mkdir()
        publish(state, run, [1, 2], limit=2)
        patch, count_calls = die_at(nth)
        try:
            publish(state, run, [3], limit=2)
        except Killed:
            died = True
        else:
            died = False
        finally:
            patch.undo()
        complete = list_checkpoints(run)
        assert latest_checkpoint(run) in complete[-2:]
        assert {path.name for path in complete} >= {"checkpoint-2"}
        for checkpoint in complete:
            names = sorted(path.name for path in checkpoint.iterdir())
            assert names == ["manifest.json", "rank-0.bin"]
            json.loads((checkpoint / "manifest.json").read_text())
        publish(state, run, [4], limit=2)
        assert latest_checkpoint(run).name == "checkpoint-4"
        if not died:
            return count_calls()


def test_a_kill_at_any_moment_leaves_complete_checkpoints_and_saving_goes_on(tmp_path):
    """T01: after every call that changes the disk."""
    [count] = run_ranks(ONE, killed_saves, tmp_path)
    assert count >= 12


def failing_save(state: ParallelState, run: Path, how: str) -> str:
    publish(state, run, [1])
    changes = {}
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        changes["write"] = writer(state, size=1 << 20 if state.rank == 1 else 8)
    elif how == "space":
        changes["num_bytes"] = 1 << 60
    elif how == "source":
        changes["protected"] = run / "checkpoint-2"
        if state.is_first_rank:
            (run / "checkpoint-2").mkdir()
    try:
        with pytest.raises(SaveError) as caught:
            publish(state, run, [2], **changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ("full", r"rank 1: \[Errno 27\] File too large"),
        ("space", rf"rank 0: it needs about {1 << 60} bytes, and \d+ are free"),
        ("source", "rank 0: the model was loaded from it and will not be overwritten"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all_with_the_reason(tmp_path, how, pattern):
    """T03: a full disk; T05: the folder that the base was read from."""
    messages = run_ranks(TWO, failing_save, tmp_path, how)
    for message in messages:
        assert re.fullmatch(rf"cannot save {tmp_path}/checkpoint-2: {pattern}.*", message)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    run_ranks(TWO, publish, tmp_path, [3])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def save_again(state: ParallelState, run: Path) -> str:
    with pytest.raises(SaveError) as caught:
        publish(state, run, [1])
    return str(caught.value)


def test_a_folder_with_files_is_not_overwritten_but_an_empty_one_is_taken(tmp_path):
    """T04."""
    (tmp_path / "checkpoint-1").mkdir()
    run_ranks(TWO, publish, tmp_path, [1])
    assert len(list((tmp_path / "checkpoint-1").iterdir())) == 3
    for message in run_ranks(TWO, save_again, tmp_path):
        assert "it exists already and will not be overwritten" in message


def test_the_manifest_lists_the_files_of_all_ranks_and_what_they_were_made_from(tmp_path):
    """T21."""
    run_ranks(TWO, publish, tmp_path, [1])
    manifest = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())
    assert list(manifest["files"]) == ["rank-0.bin", "rank-1.bin"]
    assert manifest["source"] == {"model": "seen by rank 0"}


def publish_into(state: ParallelState, folder: Path, die_after: int | None) -> None:
    patch = pytest.MonkeyPatch()
    names: list[str] = []

    def replaced(path: Path, target: Path) -> None:
        if len(names) == die_after:
            raise Killed
        names.append(target.name)
        os.replace(path, target)

    patch.setattr(Path, "replace", replaced)
    try:
        publish_folder(folder, contents_of(state), world=state.world, exist_ok=True)
    except Killed:
        assert die_after is not None
    else:
        assert names == ["rank-0.bin", "manifest.json"]
    finally:
        patch.undo()


def test_a_folder_that_is_written_anew_has_no_manifest_until_it_is_complete(tmp_path):
    for die_after in (0, 1, None):
        folder = tmp_path / str(die_after)
        folder.mkdir()
        for name in ("manifest.json", "model.safetensors", "notes.txt"):
            (folder / name).write_text("old")
        run_ranks(ONE, publish_into, folder, die_after)
        assert (folder / "manifest.json").exists() == (die_after is None)
        assert not (folder / "model.safetensors").exists()
        assert (folder / "notes.txt").read_text() == "old"


@pytest.mark.parametrize(("limit", "kept"), [(1, {4}), (2, {3, 4}), (9, {1, 2, 3, 4})])
def test_the_newest_checkpoints_are_kept(tmp_path, limit, kept):
    """T06."""
    run_ranks(TWO, publish, tmp_path, [1, 2, 3, 4], limit)
    assert {path.name for path in list_checkpoints(tmp_path)} == {f"checkpoint-{n}" for n in kept}
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"


def save_beside_source(state: ParallelState, run: Path) -> None:
    publish(state, run, [1])
    publish(state, run, [2, 3], 1, protected=run / "checkpoint-1")


def test_the_checkpoint_that_training_started_from_is_kept(tmp_path):
    """T06."""
    run_ranks(ONE, save_beside_source, tmp_path)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-1", "checkpoint-3"]


def save_undeletable(state: ParallelState, run: Path) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("mtrain.checkpoint.run_folder").addHandler(handler)
    patch = pytest.MonkeyPatch()

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    publish(state, run, [1])
    patch.setattr("mtrain.checkpoint.run_folder.shutil.rmtree", lambda path, **kwargs: fail(path))
    patch.setattr("mtrain.checkpoint.folder._stage", lambda final, *_: staged_by_hand(final))
    publish(state, run, [2], 1)
    patch.undo()
    return messages


def staged_by_hand(final: Path) -> Path:
    staged = final.parent / f".{final.name}.staged-test"
    staged.mkdir()
    return staged


def test_a_failed_deletion_is_a_warning(tmp_path):
    """T06: training goes on."""
    [[message]] = run_ranks(ONE, save_undeletable, tmp_path)
    assert "cannot delete" in message
    assert "checkpoint-1" in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_small_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "latest"
    for text in ("1\n", "22\n"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
