"""The benchmark scripts run: on a shape that is tiny, and with numbers that make sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).parents[1]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


def test_conversion_is_measured_in_bounded_memory_and_leaves_no_files(tmp_path: Path) -> None:
    work, numbers = tmp_path / "work", tmp_path / "numbers.json"
    flags = {
        "shape": "qwen3-0.6b",
        "layers": 2,
        "sizes": json.dumps(TINY),
        "folder": work,
        "steps": "dtype",
        "memory_limit": "4GB",
        "json": numbers,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, ROOT / "benchmarks" / "convert.py", *words]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(numbers.read_text("utf-8"))
    assert result["rates"].keys() == {"memory copy", "read", "write", "file copy"}
    (step,) = result["steps"]
    assert step["step"] == "dtype"
    assert step["failure"] == ""
    assert step["seconds"] > 0
    assert 0 < step["anonymous_bytes"] <= step["rss_bytes"] < 4e9
    assert "| dtype |" in table
    assert list(work.iterdir()) == []


def test_planning_is_measured_on_lengths_alone() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "packing.py", "--samples", "20000"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| Zipf")]
    assert [row[2].strip() for row in rows] == ["2,048", "8,192"]
    assert all(float(row[5].strip(" %")) > 99 for row in rows)


def test_kernels_are_told_apart_and_pauses_between_them_found(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from kernel_times import busy_time, kernel_class, pauses

    # The second is of a norm or of SwiGLU.
    names = ("forward_kernel", "_forward_kernel", "_update_kernel", "nvjet_sm90_tst")
    classes = ["attention", "element by element", "optimizer", "products"]
    assert [kernel_class(name) for name in names] == classes
    kernels = [(5.0, 6.0, "c"), (0.0, 3.0, "a"), (1.0, 2.0, "b"), (10.0, 11.0, "d")]
    assert pauses(kernels, 1) == [(4.0, "c", "d")]
    assert pauses(kernels, 9) == [(4.0, "c", "d"), (2.0, "a", "c")]
    assert busy_time((begin, end) for begin, end, _ in kernels) == 5.0


def test_a_step_on_the_cpu_is_compared_with_transformers_and_peft() -> None:
    flags = ["--sizes", "64x1", "--tuners", "lora", "--rows", "2", "--length", "32"]
    flags += ["--batches", "pack"]
    command = [sys.executable, ROOT / "benchmarks" / "cpu_step.py", *flags, "--steps", "6"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| hidden 64")]
    assert [(row[3].strip(), row[4].strip()) for row in rows] == [
        ("pack", "pack"),
        ("pack", "padded"),
    ]
    assert all(float(row[7]) > 0 for row in rows)


def test_tokenising_is_compared_with_the_library_alone(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"instruction": f"say {n}", "output": f"{n}"} for n in range(9)]))
    script = ROOT / "benchmarks" / "tokenizing.py"
    flags = ["--data", data, "--tokenizer", save_tokenizer(tmp_path / "model"), "--rows", "20"]
    command = [sys.executable, script, *flags, "--num_proc", "1"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names == ["what", "---", "prepare", "tokenizers alone"]


def curve_flags(folder: Path) -> list[str]:
    data = folder / "rows.json"
    data.write_text(json.dumps([{"instruction": f"say {n}", "output": f"{n}"} for n in range(99)]))
    flags = {
        "data": data,
        "tokenizer": save_tokenizer(folder / "tokenizer"),
        "sizes": json.dumps(TINY | {"vocab_size": 272, "num_hidden_layers": 2}),
        "length": 128,
        "global_batch_size": 2,
        "steps": 5,
        "work": folder,
        "log_dir": folder / "curves",
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_loss_curves_agree_without_fusions_and_with_a_plain_step(tmp_path: Path) -> None:
    variants = ("--variants", "te", "torch", "torch-unfused", "plain")
    command = [sys.executable, ROOT / "benchmarks" / "loss_curves.py", *curve_flags(tmp_path)]
    done = subprocess.run([*command, *variants], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| variant", "| torch", "| torch-unfused", "| plain"]
    assert "Transformer Engine cannot be used here: te\n" in done.stdout
    kept = json.loads((tmp_path / "curves" / "loss_curves.json").read_text("utf-8"))
    assert "apply_rope_fusion" in kept["unfused"]
    torch, *others = kept["curves"].values()
    assert torch["loss"][-1] < torch["loss"][0] - 0.01
    for other in others:
        assert other["loss"] == pytest.approx(torch["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(torch["grad_norm"], rel=1e-4)


def test_loss_curves_say_which_variant_failed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import loss_curves

    def call(function, *arguments):
        if function is loss_curves.train_ours:
            raise RuntimeError("no memory left")
        return function(*arguments)

    monkeypatch.setattr(loss_curves, "in_own_process", call)
    words = [*curve_flags(tmp_path), "--variants", "torch", "plain"]
    monkeypatch.setattr(sys, "argv", ["loss_curves.py", *words])
    assert loss_curves.main() == 1
    shown = capsys.readouterr()
    assert "| torch | failed |\n| plain | failed |" in shown.out
    assert "no memory left" in shown.err
