import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.written import WrittenFile, record_file
from mtrain.checkpoint.folder import (
    LATEST_FILE,
    Contents,
    SaveError,
    make_folder,
    publish_folder,
    write_atomically,
)
from mtrain.checkpoint.run_folder import latest_checkpoint
from mtrain.config.resume import list_checkpoints
from mtrain.parallel import ParallelLayout, ParallelState
from tests.checkpoint.disk import WatchedDisk, read_tree
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
    contents = contents_of(state, **changes)
    save(
        run,
        steps,
        lambda _: contents,
        world=state.world,
        limit=limit,
        protected=changes.get("protected"),
        is_async=changes.get("is_async", False),
    )
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


def overwrite_source(state: ParallelState, source: Path, final: Path) -> str:
    with pytest.raises(SaveError) as caught:
        publish_folder(
            final, contents_of(state, protected=source), world=state.world, exist_ok=True
        )
    return str(caught.value)


def test_the_folder_that_the_base_is_read_from_is_not_written_however_it_is_spelled(tmp_path):
    """T05: not even with --exist_ok, and what is mapped into memory keeps its bytes."""
    source = tmp_path / "base"
    source.mkdir()
    with SafetensorsWriter(source / "model.safetensors", [("a", "U8", (4,))]) as writer:
        writer.append(torch.arange(4, dtype=torch.uint8))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "iter_0000001").symlink_to(source)
    (source / ".metadata").write_bytes(b"")
    before = read_tree(source)
    with safe_open(source / "model.safetensors", "pt") as mapped:
        for final in (tmp_path / "link", tmp_path / "x" / ".." / "base", tmp_path / "inside"):
            (tmp_path / "x").mkdir(exist_ok=True)
            for message in run_ranks(TWO, overwrite_source, source, final):
                assert "the model was loaded from it and will not be overwritten" in message
        assert mapped.get_tensor("a").tolist() == [0, 1, 2, 3]
    assert read_tree(source) == before


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


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


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


def test_a_small_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "latest"
    for text in ("1\n", "22\n"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_small_file_that_cannot_be_replaced_stays_and_leaves_nothing_behind(
    tmp_path, monkeypatch
):
    """T03."""
    path = tmp_path / "latest"
    write_atomically(path, "1\n")

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("mtrain.checkpoint.folder.flush", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "22\n")
    assert path.read_text() == "1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def last_changes(state: ParallelState, folder: Path) -> list[tuple[str, Path]]:
    with WatchedDisk(folder) as disk:
        publish_folder(folder / "out" / "model", contents_of(state), world=state.world)
    return [(change.kind, change.target or change.path) for change in disk.changes[-2:]]


def test_the_name_of_an_export_is_flushed_too(tmp_path):
    """T08: no tracker follows, with which it would be."""
    out = tmp_path / "out"
    assert run_ranks(ONE, last_changes, tmp_path) == [[("rename", out / "model"), ("flush", out)]]


def test_the_names_of_new_folders_are_flushed(tmp_path, monkeypatch):
    """T08: of all that are new, and of those that hold them."""
    flushed = []
    monkeypatch.setattr("mtrain.checkpoint.folder.flush", flushed.append)
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
