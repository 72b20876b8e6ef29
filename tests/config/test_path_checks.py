"""Inputs must exist, the output must be writable, and nothing is created by looking."""

from pathlib import Path

import pytest

from mtrain.config import CheckpointConfig, DataConfig, LoggingConfig
from mtrain.config.path_checks import (
    check_datasets,
    check_output_dir,
    check_trackers,
    local_model_folder,
)


def test_a_model_is_a_folder_or_an_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_model_folder(str(tmp_path)) == tmp_path
    assert local_model_folder("owner/name") == Path("owner/name")
    assert local_model_folder("Qwen/Qwen3-30B-A3B-Instruct-2507") is None


@pytest.mark.parametrize("model", ["./qwen", "/no/such/qwen", "qwen", "a/b/c", "../a", "a/"])
def test_a_missing_folder_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match="no such folder, and not an id"):
        local_model_folder(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        local_model_folder(str(tmp_path / "file"))


def test_datasets_are_paths_that_exist_or_ids(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b:c#3"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    check_datasets(
        DataConfig(
            dataset=("a.json", "./a.json#10", "folder", "b:c#3", "b:c#3#2"),
            val_dataset=("swift/self-cognition#1000", "a/b:c#5000", "hf::squad", "ms::a/b"),
        )
    )
    with pytest.raises(ValueError, match=r"^--dataset b\.json: no such file or folder"):
        check_datasets(DataConfig(dataset=("a.json", "b.json")))
    with pytest.raises(ValueError, match=r"^--val_dataset \./none: no such file or folder"):
        check_datasets(DataConfig(dataset=("a.json",), val_dataset=("./none",)))


def output(path: Path, *, add_version: bool = True) -> CheckpointConfig:
    return CheckpointConfig(output_dir=str(path), add_version=add_version)


def test_a_new_output_folder_is_not_created(tmp_path: Path) -> None:
    check_output_dir(output(tmp_path / "a" / "b"))
    check_output_dir(output(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    """T04."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ValueError, match="file is not a folder"):
            check_output_dir(output(path))


def test_an_output_folder_without_permission_is_refused(tmp_path: Path, monkeypatch) -> None:
    """T04; asked of the system, because a test may run as root, who may write anywhere."""
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path) or False)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_output_dir(output(tmp_path / "a"))
    assert asked == [tmp_path]


def test_checkpoints_of_another_run_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    """T04."""
    (tmp_path / "checkpoint-10").mkdir()
    check_output_dir(output(tmp_path))
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        check_output_dir(output(tmp_path, add_version=False))


@pytest.mark.parametrize("add_version", [True, False])
def test_the_folder_of_the_model_is_not_written_to(tmp_path: Path, add_version: bool) -> None:
    """T05."""
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(ValueError, match="is the folder of --model; give another folder"):
        check_output_dir(
            output(tmp_path / "link", add_version=add_version), source=f"{model}/../model/"
        )
    check_output_dir(output(model / "runs", add_version=add_version), source=str(model))


def test_a_missing_tracker_is_named(monkeypatch) -> None:
    check_trackers(LoggingConfig(report_to=("tensorboard", "none")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(LoggingConfig(report_to=("none",)))
    with pytest.raises(ValueError, match=r"--report_to wandb needs a package .* pip install wandb"):
        check_trackers(LoggingConfig(report_to=("wandb",)))
