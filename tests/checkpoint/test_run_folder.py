from datetime import datetime
from pathlib import Path

import pytest

from mtrain.checkpoint.run_folder import continues_in, create_run_folder, latest_checkpoint
from mtrain.parallel import ParallelLayout, ParallelState
from tests.ranks import run_ranks

ONE = ParallelLayout()
TWO = ParallelLayout(world_size=2)
STARTED = datetime(2026, 11, 21, 9, 5, 7)


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


def test_of_checkpoints_the_one_that_the_tracker_names_is_the_latest(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"
