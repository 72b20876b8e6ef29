import logging
import shutil
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from mtrain.checkpoint.run_folder import (
    Retention,
    continues_in,
    create_run_folder,
    latest_checkpoint,
    remove_surplus,
)
from mtrain.config.resume import list_checkpoints
from mtrain.parallel import ParallelLayout, ParallelState
from tests.checkpoint.saving import save, tiny_contents
from tests.ranks import run_ranks

ONE = ParallelLayout()
TWO = ParallelLayout(world_size=2)
STARTED = datetime(2026, 11, 21, 9, 5, 7)
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def make_folder(state: ParallelState, output_dir: Path, add_version: bool) -> Path:
    return create_run_folder(
        output_dir, add_version=add_version, started=STARTED, world=state.world
    )


def refuse_folder(state: ParallelState, output_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:
        make_folder(state, output_dir, False)
    return str(caught.value)


def test_runs_are_numbered_and_all_ranks_use_the_same_folder(tmp_path):
    output_dir = tmp_path / "deep" / "out"
    for version in (0, 1):
        folders = run_ranks(TWO, make_folder, output_dir, True)
        assert folders == [output_dir / f"v{version}-20261121-090507"] * 2
        assert folders[0].is_dir()
    (output_dir / "v7-20250101-000000").mkdir()
    assert run_ranks(ONE, make_folder, output_dir, True)[0].name.startswith("v8-")


def test_a_run_without_a_version_takes_the_folder_itself(tmp_path):
    assert run_ranks(TWO, make_folder, tmp_path / "out", False) == [tmp_path / "out"] * 2


def test_a_folder_with_checkpoints_of_another_run_is_refused(tmp_path):
    """T04: before the first step."""
    (tmp_path / "checkpoint-100").mkdir()
    for message in run_ranks(TWO, refuse_folder, tmp_path):
        assert "holds checkpoint-100 of another run" in message


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """T04."""
    (tmp_path / "file").write_text("")
    for message in run_ranks(TWO, refuse_folder, tmp_path / "file" / "out"):
        assert message.endswith("cannot be made: Not a directory")


def refuse_what_the_system_refuses(state: ParallelState, output_dir: Path) -> str:
    def fail(path: Path, **_) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", fail)
        return refuse_folder(state, output_dir)


def test_a_folder_without_permission_is_refused_on_all_ranks(tmp_path):
    """T04; a test may run as root, who may write anywhere."""
    for message in run_ranks(TWO, refuse_what_the_system_refuses, tmp_path / "out"):
        assert message == f"--output_dir {tmp_path}/out: cannot be made: Permission denied"


def test_a_run_that_takes_a_folder_itself_removes_what_crashes_left_there(tmp_path):
    """T01: it is not continued, because nothing was complete."""
    (tmp_path / ".checkpoint-3.staged-7").mkdir()
    (tmp_path / "notes.txt").write_text("")
    run_ranks(ONE, make_folder, tmp_path, False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def go_on(state: ParallelState, output_dir: Path, resumed: Path) -> Path:
    return create_run_folder(
        output_dir, add_version=True, started=STARTED, world=state.world, resumed=resumed
    )


def test_a_run_goes_on_in_its_folder_and_removes_what_a_crash_left(tmp_path):
    run = tmp_path / "v0-20261121-090507"
    for name in ("checkpoint-2", "checkpoint-10", ".checkpoint-12.staged-7", ".x.damaged-0"):
        (run / name).mkdir(parents=True)
    (run / ".latest_checkpointed_iteration.txt.staged-7").write_text("1")
    assert run_ranks(TWO, go_on, tmp_path, run / "checkpoint-10") == [run] * 2
    names = sorted(path.name for path in run.iterdir())
    assert names == [".x.damaged-0", "checkpoint-10", "checkpoint-2"]


def test_an_older_checkpoint_is_continued_in_a_folder_of_its_own(tmp_path):
    """The newer ones stay what they are."""
    run = tmp_path / "v0-20261121-090507"
    for name in ("checkpoint-2", "checkpoint-10"):
        (run / name).mkdir(parents=True)
    assert not continues_in(tmp_path, run / "checkpoint-2")
    assert not continues_in(tmp_path / "elsewhere", run / "checkpoint-10")
    assert continues_in(run, run / "checkpoint-10")
    [folder] = run_ranks(ONE, go_on, tmp_path, run / "checkpoint-2")
    assert folder.name.startswith("v1-")


def test_a_checkpoint_is_continued_in_its_own_folder_under_any_name_of_it(tmp_path, monkeypatch):
    run = tmp_path / "v0-20261121-090507"
    (run / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "last").symlink_to(run / "checkpoint-2")
    monkeypatch.chdir(run)
    for name in (Path("checkpoint-2"), tmp_path / "last", run / "x" / ".." / "checkpoint-2"):
        (run / "x").mkdir(exist_ok=True)
        assert continues_in(tmp_path, name)
    assert run_ranks(TWO, go_on, tmp_path, tmp_path / "last") == [run] * 2
    # A copy under another name is no checkpoint of a run.
    shutil.copytree(run / "checkpoint-2", tmp_path / "copy")
    assert not continues_in(tmp_path, tmp_path / "copy")


def save_steps(state: ParallelState, run: Path, limit: int, protected: Path | None, is_async: bool):
    contents = partial(tiny_contents, world=state.world)
    options = {"world": state.world, "is_async": is_async}
    save(run, [1], contents, **options)
    save(run, [2, 3, 4], contents, limit=limit, protected=protected, **options)


@ASYNC
@pytest.mark.parametrize(
    ("limit", "protected", "kept"),
    [(1, None, {4}), (2, None, {3, 4}), (9, None, {1, 2, 3, 4}), (1, 1, {1, 4}), (2, 3, {3, 4})],
)
def test_the_newest_are_kept_and_the_one_that_training_started_from(
    tmp_path, limit, protected, kept, is_async
):
    """T06."""
    folder = None if protected is None else tmp_path / f"checkpoint-{protected}"
    run_ranks(TWO, save_steps, tmp_path, limit, folder, is_async)
    assert {path.name for path in list_checkpoints(tmp_path)} == {f"checkpoint-{n}" for n in kept}
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"


@pytest.mark.parametrize("limit", [1, 2])
def test_the_only_complete_checkpoint_is_never_deleted(tmp_path, limit):
    """T06: what is hidden does not count."""
    for name in ("checkpoint-5", ".checkpoint-6.staged-1", ".checkpoint-7.damaged-0"):
        (tmp_path / name).mkdir()
    remove_surplus(tmp_path, Retention(limit=limit))
    assert len(list(tmp_path.iterdir())) == 3


def test_the_checkpoint_that_the_tracker_names_is_never_deleted(tmp_path):
    """T06: even if a newer one is there that it does not name."""
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2\n")
    remove_surplus(tmp_path, Retention(limit=1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def save_undeletable(state: ParallelState, run: Path, is_async: bool) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("mtrain.checkpoint.run_folder").addHandler(handler)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    contents = partial(tiny_contents, world=state.world)
    options = {"world": state.world, "limit": 1, "is_async": is_async}
    save(run, [1], contents, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtrain.checkpoint.run_folder._delete", fail)
        save(run, [2], contents, **options)
    save(run, [3], contents, **options)
    return messages


@ASYNC
def test_a_failed_deletion_is_a_warning_and_made_up_for(tmp_path, is_async):
    """T06: training goes on, and the next save deletes what is left."""
    [[message]] = run_ranks(ONE, save_undeletable, tmp_path, is_async)
    assert "cannot delete" in message
    assert "checkpoint-1" in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_of_checkpoints_the_one_that_the_tracker_names_is_the_latest(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"
