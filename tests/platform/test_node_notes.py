"""Notes between the processes of a run; a failure that is claimed by one of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from mtrain.platform.node_notes import NodeNotes


@pytest.fixture
def folder(tmp_path: Path) -> NodeNotes:
    return NodeNotes(tmp_path)


def test_only_one_process_is_the_first_to_fail(tmp_path: Path) -> None:
    folder = NodeNotes(tmp_path / "new")
    assert not folder.has_failed()
    assert [folder.claim_failure() for _ in range(3)] == [True, False, False]
    assert folder.has_failed()


def test_a_disk_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert NodeNotes(tmp_path / "file" / "folder").claim_failure()


@pytest.mark.parametrize("path", [None, Path("nowhere") / "at-all"])
def test_without_a_folder_there_are_no_notes(path: Path | None) -> None:
    folder = NodeNotes(path)
    folder.ask_to_stop(15)
    folder.note_stopped(15)
    folder.note_training()
    assert (folder.asked_to_stop(), folder.stopped_by()) == (0, 0)
    assert not folder.is_training()
    assert not folder.has_failed()
    folder.forget_training()
    folder.note_preparing()
    folder.note_prepared("key")
    assert not folder.is_preparing()
    assert folder.prepared() is None
    assert path is None or not path.exists()


def test_a_request_and_its_fulfilment_are_told_apart(folder: NodeNotes) -> None:
    folder.ask_to_stop(10)
    assert (folder.asked_to_stop(), folder.stopped_by()) == (10, 0)
    folder.note_stopped(15)
    assert (folder.asked_to_stop(), folder.stopped_by()) == (10, 15)


def test_a_rank_trains_until_it_says_otherwise(folder: NodeNotes) -> None:
    folder.note_training()
    assert folder.is_training()
    assert not folder.has_failed()
    folder.forget_training()
    assert not folder.is_training()


def test_a_rank_that_died_while_training_has_failed(folder: NodeNotes) -> None:
    script = (
        "import os, sys; from pathlib import Path;"
        "from mtrain.platform.node_notes import NodeNotes;"
        "NodeNotes(Path(sys.argv[1])).note_training(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder.path)], check=True)
    assert folder.is_training()
    assert folder.has_failed()


def test_what_is_prepared_has_a_name(folder: NodeNotes, tmp_path: Path) -> None:
    assert not folder.is_preparing()
    folder.note_preparing()
    assert folder.is_preparing()
    assert folder.prepared() is None
    folder.note_prepared("0f3a")
    assert folder.prepared() == "0f3a"


def test_that_there_are_no_data_is_an_answer_too(folder: NodeNotes) -> None:
    folder.note_prepared("")
    assert folder.prepared() == ""


def test_one_that_prepared_and_is_gone_does_not_prepare(folder: NodeNotes, tmp_path: Path) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    (tmp_path / f"preparing-{int(gone.stdout)}").touch()
    assert not folder.is_preparing()
