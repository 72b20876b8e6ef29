"""The checkpoint that a run continues: the newest that is complete, whatever lies beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mtrain.bridge.written import record_file
from mtrain.checkpoint.manifest import write_manifest
from mtrain.cli.parser import parse_config
from mtrain.cli.resume_search import pin_resume
from mtrain.config import SftConfig
from mtrain.config.resume import resolve_resumed


def make_checkpoint(run: Path, step: int, *, has_state: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "state").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"model": "owner/base", "tuner_type": "full"}))
    (folder / "model.safetensors").write_bytes(bytes(100))
    if has_state:
        (folder / "state" / "trainer.json").write_text("{}")
        (folder / "state" / "moment.safetensors").write_bytes(bytes(100))
    files = [record_file(folder, path) for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, files, source={})
    return folder


def read(words: list[str]) -> SftConfig:
    return resolve_resumed(parse_config(SftConfig, words))


def pin(out: Path, *words: str, show: bool = True) -> list[str]:
    given = ["--model", "owner/base", "--tuner_type", "full", "--output_dir", str(out), *words]
    pinned = pin_resume(given, read, show=show)
    assert pinned[: len(given)] == given
    return pinned[len(given) :]


def found(out: Path, **options: bool) -> str:
    flag, value, *rest = pin(out, "--resume_from_checkpoint", "auto", **options)
    assert flag == "--resume_from_checkpoint"
    assert rest == (["--finetune", "true"] if value == "none" else [])
    return value


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(bytes(50) + b"\x01" + bytes(49))


def truncate(folder: Path) -> None:
    (folder / "state" / "moment.safetensors").write_bytes(bytes(99))


def remove(folder: Path) -> None:
    (folder / "state" / "moment.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def make_manifest_unreadable(folder: Path) -> None:
    remove_manifest(folder)
    # Reading it fails as that of a bad sector does.
    (folder / "manifest.json").symlink_to("/proc/self/mem")


DAMAGES = [
    (flip, "other content: model.safetensors"),
    (truncate, "other size: state/moment.safetensors has 99 bytes, was saved with 100"),
    (remove, "missing: state/moment.safetensors"),
    (remove_manifest, "has no manifest.json"),
    (make_manifest_unreadable, "checkpoint-4 cannot be read: Input/output error"),
]


def test_the_newest_checkpoint_of_the_latest_run_is_continued(tmp_path, capsys):
    for run, steps in (("v9-20260101-000000", (7, 30)), ("v10-20260101-000000", (4, 20, 3))):
        for step in steps:
            make_checkpoint(tmp_path / run, step)
    # A run that ended before its first checkpoint, and one that is a folder of its own.
    (tmp_path / "v11-20260101-000000").mkdir()
    make_checkpoint(tmp_path, 99)
    assert found(tmp_path) == str(tmp_path / "v10-20260101-000000" / "checkpoint-20")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before_it(
    tmp_path, capsys, damage: Callable[[Path], None], reason
):
    """T01: it keeps its files, and its name is free for the run that saves that step again."""
    run = tmp_path / "v0-20260101-000000"
    for step in (2, 3, 4):
        make_checkpoint(run, step)
    for number in (0, 1):
        damage(run / "checkpoint-4")
        assert found(tmp_path) == str(run / "checkpoint-3")
        message = capsys.readouterr().err
        assert message.startswith(f"warning: {run}/checkpoint-4")
        assert reason in message
        aside = f".checkpoint-4.damaged-{number}"
        assert message.endswith(f"; put aside as {aside}, trying the one before it\n")
        assert (run / aside / "args.json").is_file()
        make_checkpoint(run, 4)


def test_whoever_puts_a_checkpoint_aside_says_so_and_nobody_else(tmp_path, capsys, monkeypatch):
    """Of several nodes, or ranks, that find it damaged at the same time, one can rename it."""
    run = tmp_path / "v0-20260101-000000"
    for step in (1, 2):
        make_checkpoint(run, step)
    flip(run / "checkpoint-2")
    with monkeypatch.context() as patch:

        def came_second(path: Path, target: Path) -> None:
            raise FileNotFoundError(2, "No such file or directory", str(path))

        patch.setattr(Path, "rename", came_second)
        assert found(tmp_path) == str(run / "checkpoint-1")
    assert capsys.readouterr().err == ""
    assert found(tmp_path, show=False) == str(run / "checkpoint-1")
    assert capsys.readouterr().err.startswith("warning: ")


def test_a_damaged_checkpoint_that_cannot_be_put_aside_ends_the_command(tmp_path, monkeypatch):
    """T04: a run could not save that step again."""
    run = tmp_path / "v0-20260101-000000"
    flip(make_checkpoint(run, 2))

    def refuse(path: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged .*: Read-only file system"):
        found(tmp_path)


def test_checkpoints_without_state_are_passed_over_and_stay(tmp_path):
    run = tmp_path / "v0-20260101-000000"
    make_checkpoint(run, 1)
    make_checkpoint(run, 2, has_state=False)
    assert found(tmp_path) == str(run / "checkpoint-1")
    assert (run / "checkpoint-2").is_dir()


def test_a_new_run_starts_when_there_is_nothing_to_continue(tmp_path, capsys):
    """T01: what the first save of a killed run left goes, because no run goes on in that folder."""
    runs = [tmp_path / "out" / f"v{number}-20260101-000000" for number in (0, 1)]
    assert found(tmp_path / "out") == "none"
    make_checkpoint(runs[0], 1, has_state=False)
    make_checkpoint(runs[1], 2).rename(runs[1] / ".checkpoint-2.staged-77")
    (tmp_path / "out" / ".checkpoint-2.staged-78").mkdir()
    flip(make_checkpoint(runs[1], 3))
    assert found(tmp_path / "out") == "none"
    lines = capsys.readouterr().err.splitlines()
    nothing = f"no checkpoint to continue in {tmp_path}/out: a new run starts"
    assert [line for line in lines if not line.startswith("warning")] == [nothing, nothing]
    left = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*"))
    assert left == [f"{runs[0].name}/checkpoint-1", f"{runs[1].name}/.checkpoint-3.damaged-0"]


def test_a_save_that_may_be_under_way_is_left_alone_while_there_is_something_to_continue(tmp_path):
    """It is removed by the run that goes on in its folder, and by no other."""
    make_checkpoint(tmp_path / "v1-20260101-000000", 1)
    other = tmp_path / "v0-20260101-000000" / ".checkpoint-2.staged-77"
    other.mkdir(parents=True)
    found(tmp_path)
    assert other.is_dir()


def test_a_checkpoint_that_is_named_is_verified_and_stays_where_it_is(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    assert pin(tmp_path / "out", "--resume_from_checkpoint", str(folder)) == []
    by_model = ["--model", str(folder), "--finetune", "false", "--tuner_type", "full"]
    assert pin_resume(by_model, read) == by_model
    remove(folder)
    reason = rf"{folder} is damaged \(missing: state/moment.safetensors\), see megatron verify"
    with pytest.raises(ValueError, match=reason):
        pin(tmp_path / "out", "--resume_from_checkpoint", str(folder))
    with pytest.raises(ValueError, match=reason):
        pin_resume(by_model, read)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "words",
    ["", "--finetune true", "--resume_from_checkpoint none"],
)
def test_a_run_from_the_start_looks_for_nothing(tmp_path, words):
    flip(make_checkpoint(tmp_path, 1))
    assert pin(tmp_path, *words.split()) == []
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_command_that_always_says_to_continue_may_start_the_run_too(tmp_path):
    """`--finetune false` is what Megatron-SWIFT's users type; without auto it names --model."""
    words = ["--resume_from_checkpoint", "auto", "--finetune", "false"]
    pinned = pin(tmp_path, *words)
    config = read(["--model", "owner/base", *words, *pinned])
    assert config.checkpoint.resume_from_checkpoint is None
    assert config.checkpoint.finetune
    folder = make_checkpoint(tmp_path, 1)
    config = read(["--model", "owner/base", "--tuner_type", "full", *words, *pin(tmp_path, *words)])
    assert config.checkpoint.resume_from_checkpoint == str(folder)


def test_a_wrong_flag_is_found_before_any_checkpoint_is_touched(tmp_path):
    flip(make_checkpoint(tmp_path, 1))
    with pytest.raises(ValueError, match="lerning_rate"):
        pin(tmp_path, "--resume_from_checkpoint", "auto", "--lerning_rate", "1")
    assert (tmp_path / "checkpoint-1").is_dir()
