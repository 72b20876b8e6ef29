"""Inputs must exist, the output must be writable, and nothing is created by looking."""

import dataclasses
from pathlib import Path

import pytest

from mtrain.config import (
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    ExportOptions,
    LoggingConfig,
    ModelConfig,
    SftConfig,
    TunerConfig,
)
from mtrain.config.path_checks import (
    check_adapters,
    check_datasets,
    check_export_dir,
    check_mcore_model,
    check_run_dir,
    check_trackers,
    local_config_folder,
    local_model_folder,
)


def test_a_model_is_a_folder_or_an_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_model_folder(str(tmp_path)) == tmp_path
    assert local_model_folder("owner/name") == Path("owner/name")
    assert local_model_folder("Qwen/Qwen3-30B-A3B-Instruct-2507") is None


@pytest.mark.parametrize("model", ["./qwen", "/no/such/qwen", "qwen", "a/b/c", "../a", "a/"])
def test_a_missing_folder_is_refused(model: str, tmp_path: Path, monkeypatch) -> None:
    # Whatever lies beside the checkout.
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
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


def test_an_adapter_is_a_folder(tmp_path: Path) -> None:
    """T26: what is in it is looked at later."""
    (tmp_path / "file").write_text("")
    check_adapters(TunerConfig(adapters=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"^--adapters .*/none: no such folder$"):
        check_adapters(TunerConfig(adapters=(str(tmp_path / "none"),)))
    with pytest.raises(ValueError, match=r"^--adapters .*/file: is a file; give its folder$"):
        check_adapters(TunerConfig(adapters=(str(tmp_path / "file"),)))


def test_folders_of_megatron_core_must_exist(tmp_path: Path) -> None:
    """What is in them is looked at later."""
    (tmp_path / "file").write_text("")
    check_mcore_model(ModelConfig())
    check_mcore_model(ModelConfig(mcore_model=str(tmp_path)))
    check_adapters(TunerConfig(mcore_adapter=str(tmp_path)))
    for text, reason in (("none", "no such folder"), ("file", "is a file; give its folder")):
        path = str(tmp_path / text)
        with pytest.raises(ValueError, match=f"^--mcore_model {path}: {reason}$"):
            check_mcore_model(ModelConfig(model="owner/name", mcore_model=path))
        with pytest.raises(ValueError, match=f"^--mcore_adapter {path}: {reason}$"):
            check_adapters(TunerConfig(mcore_adapter=path))


def test_config_and_tokenizer_are_beside_the_model_that_is_named_first(tmp_path: Path) -> None:
    """The --model beside an --mcore_model wins; a torch_dist folder may lack them."""
    model, mcore = str(tmp_path), str(tmp_path / "mcore")
    assert local_config_folder(ModelConfig(model=model)) == tmp_path
    assert local_config_folder(ModelConfig(model=model, mcore_model=mcore)) == tmp_path
    assert local_config_folder(ModelConfig(mcore_model=mcore)) == tmp_path / "mcore"
    assert local_config_folder(ModelConfig(model="owner/name", mcore_model=mcore)) is None


def check_run(path: Path, *, add_version: bool = True, source: str | None = None) -> None:
    checkpoint = CheckpointConfig(output_dir=str(path), add_version=add_version)
    check_run_dir(SftConfig(model=ModelConfig(model=source), checkpoint=checkpoint))


def check_export(path: Path, *, exist_ok: bool = False, adapter: str = "none") -> None:
    config = ExportConfig(
        tuner=TunerConfig(adapters=(adapter,)),
        checkpoint=CheckpointConfig(output_dir=str(path)),
        export=ExportOptions(exist_ok=exist_ok),
    )
    check_export_dir(config)


@pytest.mark.parametrize("check", [check_run, check_export])
def test_a_new_output_folder_is_not_created(tmp_path: Path, check) -> None:
    check(tmp_path / "a" / "b")
    check(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [check_run, check_export])
def test_an_output_folder_below_a_file_is_refused(tmp_path: Path, check) -> None:
    """T04."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ValueError, match="file is not a folder"):
            check(path)


def test_an_output_folder_without_permission_is_refused(tmp_path: Path, monkeypatch) -> None:
    """T04; asked of the system, because a test may run as root, who may write anywhere."""
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path) or False)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_run(tmp_path / "a")
    assert asked == [tmp_path]


def test_checkpoints_of_another_run_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    """T04."""
    (tmp_path / "checkpoint-10").mkdir()
    check_run(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        check_run(tmp_path, add_version=False)


def test_an_export_wants_an_empty_folder_unless_told(tmp_path: Path) -> None:
    """T04."""
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty: give another folder, or --exist_ok true"):
        check_export(tmp_path)
    check_export(tmp_path, exist_ok=True)


@pytest.mark.parametrize("add_version", [True, False])
def test_the_folder_of_the_model_is_not_written_to(tmp_path: Path, add_version: bool) -> None:
    """T05."""
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(ValueError, match="is the folder of --model; give another folder"):
        check_run(tmp_path / "link", add_version=add_version, source=f"{model}/../model/")
    check_run(model / "runs", add_version=add_version, source=str(model))


def test_the_folder_of_the_adapter_is_not_written_to(tmp_path: Path) -> None:
    """T05, also when a folder with files in it is fine."""
    with pytest.raises(ValueError, match="is the folder of --adapters; give another folder"):
        check_export(tmp_path, exist_ok=True, adapter=f"{tmp_path}/")
    check_export(tmp_path / "merged", adapter=str(tmp_path))


@pytest.mark.parametrize("flag", ["mcore_model", "mcore_adapter"])
def test_folders_of_megatron_core_are_not_written_to(tmp_path: Path, flag: str) -> None:
    """T05, by any name, and also when a folder with files in it is fine."""
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    given = {flag: str(tmp_path / "source")}
    config = ExportConfig(
        model=ModelConfig(**given if flag == "mcore_model" else {}),
        tuner=TunerConfig(**given if flag == "mcore_adapter" else {}),
        checkpoint=CheckpointConfig(output_dir=str(tmp_path / "link")),
        export=ExportOptions(exist_ok=True),
    )
    with pytest.raises(ValueError, match=f"is the folder of --{flag}; give another folder$"):
        check_export_dir(config)
    other = CheckpointConfig(output_dir=str(tmp_path / "other"))
    check_export_dir(dataclasses.replace(config, checkpoint=other))


def test_a_missing_tracker_is_named(monkeypatch) -> None:
    check_trackers(LoggingConfig(report_to=("tensorboard", "none")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(LoggingConfig(report_to=("none",)))
    with pytest.raises(ValueError, match=r"--report_to wandb needs a package .* pip install wandb"):
        check_trackers(LoggingConfig(report_to=("wandb",)))
