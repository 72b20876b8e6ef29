"""The `megatron` command: what it answers, and what it starts with which arguments."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import mtrain.cli
from mtrain import __version__
from mtrain.cli import main as main_module
from mtrain.cli.launch import Launch, Placement
from mtrain.cli.main import main
from mtrain.config import ExportConfig, SftConfig

ROOT = Path(__file__).parents[2]
HF_CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 10,
}
LAUNCHER_NAMES = ("NPROC_PER_NODE", "NNODES", "LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_words(tmp_path: Path) -> list[str]:
    """Words of a run whose files exist."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "data.jsonl").write_text("{}\n")
    return [
        *("sft", "--model", str(model), "--dataset", f"{tmp_path / 'data.jsonl'}#5"),
        *("--train_iters", "2", "--output_dir", str(tmp_path / "a" / "b")),
    ]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Replaces training and launching; lists what was called."""
    calls: list[tuple[str, object]] = []

    def check_inputs(
        config: SftConfig | ExportConfig, *, world_size: int, show_progress: bool
    ) -> str:
        calls.append(("check", (world_size, show_progress)))
        return "the model"

    def prepare_data(config: SftConfig, source: str, *, show_progress: bool) -> str:
        assert source == "the model"
        calls.append(("prepare", show_progress))
        return "key"

    def run(config: SftConfig | ExportConfig, here: Placement, clock: object = None) -> int:
        assert here.data_key == ("key" if isinstance(config, SftConfig) else None)
        calls.append(("run", config))
        return 0

    def launch_ranks(launch: Launch, words: list[str], prepare: Callable[[], str | None]) -> int:
        calls.append(("launch", (launch, words)))
        prepare()
        return 7

    def wait_until_prepared(here: Placement) -> Placement:
        calls.append(("wait", None))
        return dataclasses.replace(here, data_key="key")

    for name, module in (
        ("preparation", SimpleNamespace(check_inputs=check_inputs, prepare_data=prepare_data)),
        ("sft", SimpleNamespace(run=run)),
        ("export", SimpleNamespace(run=run)),
    ):
        monkeypatch.setitem(sys.modules, f"mtrain.cli.{name}", module)
        monkeypatch.setattr(mtrain.cli, name, module, raising=False)
    monkeypatch.setattr(main_module, "launch_ranks", launch_ranks)
    monkeypatch.setattr(main_module, "wait_until_prepared", wait_until_prepared)
    return calls


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        assert "sft" in capsys.readouterr().out
    for command in ("sft", "export"):
        assert main([command, "--help"]) == 0
        assert "--tensor_model_parallel_size" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "megatron stf: error: unknown command" in error_of(["stf"], capsys)


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(["sft", "--lrr", "1"], capsys)
    assert line == "megatron sft: error: unknown flag --lrr: did you mean --lr?\n"


def test_one_rank_trains_in_this_process(run_words, started) -> None:
    assert main(run_words) == 0
    assert [name for name, _ in started] == ["check", "prepare", "run"]
    config = started[2][1]
    assert isinstance(config, SftConfig)
    assert config.optimizer.lr == 1e-5
    assert not Path(config.checkpoint.output_dir).exists()


def test_nproc_per_node_starts_ranks_after_the_checks(run_words, started, monkeypatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert main([*run_words, "--pipeline_model_parallel_size", "2"]) == 7
    check, (name, (launch, words)), prepared = started
    assert (check, prepared) == (("check", (2, True)), ("prepare", True))
    assert (name, launch) == ("launch", Launch(nproc_per_node=2))
    assert words[:3] == ["-m", "mtrain.cli.main", "sft"]
    assert words[3:-2] == run_words[1:]


@pytest.fixture
def export_words(run_words, tmp_path: Path) -> list[str]:
    """Words of an export whose folders exist."""
    (tmp_path / "adapter").mkdir()
    return [
        *("export", *run_words[1:3], "--adapters", str(tmp_path / "adapter")),
        *("--to_hf", "true", "--output_dir", str(tmp_path / "a" / "b")),
    ]


def test_one_rank_exports_in_this_process(export_words, started) -> None:
    assert main(export_words) == 0
    assert [name for name, _ in started] == ["check", "run"]
    config = started[1][1]
    assert isinstance(config, ExportConfig)
    assert config.tuner.merge_lora is True


def test_nproc_per_node_starts_ranks_of_an_export(export_words, started, monkeypatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert main([*export_words, "--tensor_model_parallel_size", "2"]) == 7
    check, (name, (launch, words)) = started
    assert check == ("check", (2, True))
    assert (name, launch) == ("launch", Launch(nproc_per_node=2))
    assert words[:3] == ["-m", "mtrain.cli.main", "export"]
    assert words[3:-2] == export_words[1:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to_hf false", "exactly one of --to_hf true and --to_mcore true"),
        ("--to_mcore true", "exactly one of --to_hf true and --to_mcore true"),
        ("--mcore_adapter ./missing", "and --mcore_adapter ./missing: give one of them"),
        ("--adapters --mcore_adapter ./missing", "--mcore_adapter ./missing: no such folder"),
        ("--mcore_model ./missing", "--mcore_model ./missing: no such folder"),
        ("--adapters ./missing", "--adapters ./missing: no such folder"),
        ("--model ./missing", "--model ./missing: no such folder"),
        ("--output_dir .", "is not empty: give another folder, or --exist_ok true"),
        ("--tensor_model_parallel_size 2", "set NPROC_PER_NODE (x NNODES) to a multip"),
    ],
)
def test_no_export_starts_when_a_check_fails(
    export_words, started, capsys, monkeypatch, tmp_path, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_of([*export_words, *words.split()], capsys)
    assert line.startswith("megatron export: error: ")
    assert message in line
    assert started == []


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (
            Placement(rank=1, local_rank=1, world_size=2),
            [("check", (2, False)), ("prepare", False), "run"],
        ),
        (
            Placement(rank=2, local_rank=0, world_size=4),
            [("check", (4, True)), ("prepare", True), "run"],
        ),
        (Placement(rank=0, local_rank=0, world_size=2, is_prepared=True), ["wait", "run"]),
    ],
)
def test_ranks_prepare_unless_their_launcher_did(
    run_words, started, monkeypatch, placement: Placement, expected: list
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(placement.local_rank))
    monkeypatch.setattr(main_module, "read_environment", lambda: placement)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert main(run_words) == 0
    plain = ("run", "wait")
    assert [call[0] if call[0] in plain else call for call in started] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tuner_type lora --adapters ./missing", "--adapters ./missing: no such folder"),
        ("--adapters .", "--adapters . needs --tuner_type lora"),
        ("--lr_decay_style cosin", "--lr_decay_style cosin: must be one of constant"),
        ("--tensor_model_parallel_size 2", "set NPROC_PER_NODE (x NNODES) to a multip"),
        ("--dataset missing.jsonl", "--dataset missing.jsonl: no such file"),
        ("--model ./missing", "--model ./missing: no such folder"),
        ("--model .", "config.json is missing"),
    ],
)
def test_nothing_starts_when_a_check_fails(
    run_words, started, capsys, monkeypatch, tmp_path, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of([*run_words, *words.split()], capsys)
    assert started == []


def test_output_below_a_file_is_refused_and_nothing_is_created(
    run_words, started, capsys, tmp_path
) -> None:
    (tmp_path / "a").write_text("")
    before = sorted(tmp_path.iterdir())
    assert "is not a folder" in error_of(run_words, capsys)
    assert (started, sorted(tmp_path.iterdir())) == ([], before)


def test_a_fault_of_a_library_keeps_its_traceback(run_words, started, monkeypatch) -> None:
    monkeypatch.setattr(mtrain.cli.sft, "run", lambda *_: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(run_words)


def test_ctrl_c_is_one_line(run_words, started, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mtrain.cli.sft"], "run", interrupt)
    assert main(run_words) == 130
    assert capsys.readouterr().err == "megatron sft: interrupted\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mtrain.cli.main", "sft", "--model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "megatron sft: error: --model needs one value, got none\n"


def test_a_mistake_on_every_rank_is_printed_once(tmp_path) -> None:
    """T32: ranks started by a torchrun of the user's own."""
    environ = {"PATH": "/usr/bin:/bin", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    results = [
        subprocess.run(
            [sys.executable, "-m", "mtrain.cli.main", "sft", "--lr", "x"],
            env=environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / str(rank) / "error.json"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        for rank in range(2)
    ]
    assert [done.returncode for done in results] == [2, 2]
    assert [done.stderr for done in results] == [
        "megatron sft: error: --lr x: must be a number\n",
        "",
    ]
