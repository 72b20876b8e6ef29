"""`megatron verify`: exit codes and what is printed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.storage.fp8_blocks import Fp8Slices
from mtrain.bridge.storage.quantization import Fp8Blocks
from mtrain.checkpoint.manifest import write_manifest
from mtrain.cli.main import main
from tests.bridge.storage.checkpoints import qwen3_moe, rewritten, tensors_of
from tests.bridge.storage.quantized import quantized_copy

ROOT = Path(__file__).parents[2]


def make_folder(folder: Path, *, name: str = "model", num_tensors: int = 1, value: float = 1.0):
    """A checkpoint with a manifest."""
    folder.mkdir(parents=True)
    entries = [(f"tensor.{index}", "F32", (4,)) for index in range(num_tensors)]
    with SafetensorsWriter(folder / f"{name}.safetensors", entries) as writer:
        for _ in entries:
            writer.append(torch.full((4,), value).view(torch.uint8))
    write_manifest(folder, [writer.written], source={})
    return folder


def damage(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_intact_checkpoint_is_0(tmp_path, capsys):
    folder = make_folder(tmp_path / "a")
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: every file is as it was saved\n"


def test_one_flipped_bit_is_1_and_the_tensor_is_named(tmp_path, capsys):
    """T21."""
    folder = make_folder(tmp_path / "a", num_tensors=2)
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "other content: 1",
        "  model.safetensors, in 1 of 2 tensors",
        "damaged tensor: 1",
        "  tensor.1 in model.safetensors",
        f"{folder}: DAMAGED",
    ]


def test_the_same_tensors_are_0_in_whatever_files(tmp_path, capsys):
    first, second = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", name="adapter_model")
    assert main(["verify", str(first), str(second)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "EQUAL; tensors: 1 equal"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tensor: tensor.bfloat16(), "  tensor.0: F32 in A, BF16 in B"),
        (lambda tensor: tensor + 1, "  tensor.0: 4 of 4 elements differ, at most by 1"),
        (lambda tensor: tensor[:2].clone(), "  tensor.0: [4] in A, [2] in B"),
    ],
    ids=["other dtype", "different", "other shape"],
)
def test_anything_but_equal_is_1(tmp_path, capsys, request, change, line):
    first, second = make_folder(tmp_path / "a"), make_folder(tmp_path / "b")
    path = second / "model.safetensors"
    save_file({"tensor.0": change(load_file(path)["tensor.0"])}, path)
    assert main(["verify", str(first), str(second)]) == 1
    kind = request.node.callspec.id
    assert capsys.readouterr().out.splitlines() == [
        f"{kind}: 1",
        line,
        f"A is {first}",
        f"B is {second}",
        f"NOT EQUAL; tensors: 0 equal, 1 {kind}",
    ]


def test_the_first_20_of_each_kind_are_listed(tmp_path, capsys):
    first = make_folder(tmp_path / "a", num_tensors=25)
    second = make_folder(tmp_path / "b", num_tensors=23, value=2.0)
    assert main(["verify", str(first), str(second)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "different: 23"
    assert lines[21:24] == ["  ... and 3 more", "only in A: 2", "  tensor.23: F32 [4]"]
    assert lines[-1] == "NOT EQUAL; tensors: 0 equal, 23 different, 2 only in A"


def test_one_model_in_two_forms_is_equal(tmp_path, capsys):
    """Experts stacked or not, and 8-bit floats beside the values that they stand for."""
    plain = qwen3_moe(tmp_path / "plain", is_original=True, dtype="bfloat16")
    quantized = quantized_copy(plain, tmp_path / "quantized", Fp8Blocks(rows=16, columns=16))
    values = {
        name: Fp8Slices(
            tensor, stored[f"{name}_scale_inv"], tensor.shape, Fp8Blocks(rows=16, columns=16)
        )[:]
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for stored in [tensors_of(quantized)]
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    decoded = rewritten(plain, tmp_path / "decoded", values)
    assert main(["verify", str(decoded), str(quantized)]) == 0
    assert main(["verify", str(plain), str(quantized)]) == 1
    assert main(["verify", str(quantized), str(quantized)]) == 0
    capsys.readouterr()


def test_models_of_unknown_families_are_compared_by_what_is_in_their_files(tmp_path, capsys):
    first, second = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", num_tensors=2)
    for folder in (first, second):
        (folder / "config.json").write_text('{"model_type": "unknown"}')
    assert main(["verify", str(first), str(second)]) == 1
    assert "only in B: 1" in capsys.readouterr().out


def test_of_a_run_the_latest_checkpoint_is_taken_and_named(tmp_path, capsys):
    run = tmp_path / "run"
    damage(make_folder(run / "checkpoint-2"))
    make_folder(run / "checkpoint-10")
    (run / "latest_checkpointed_iteration.txt").write_text("10\n")
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}: the latest checkpoint is checkpoint-10\n")
    assert main(["verify", str(run / "checkpoint-2"), str(run)]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: folder"),
        (["a", "a", "a"], "unrecognized arguments: a"),
        (["--fast", "a"], "unrecognized arguments: --fast"),
        (["missing"], "missing: no such folder"),
        (["a", "missing"], "missing: no such folder"),
        (["empty"], "empty: has no manifest.json"),
        (["a", "empty"], "empty: no safetensors checkpoint"),
        (["a", "both"], "both: holds a model and an adapter"),
    ],
)
def test_what_cannot_be_verified_is_one_line_and_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("a"))
    Path("empty").mkdir()
    make_folder(Path("both"))
    Path("both/adapter_model.safetensors").write_bytes(Path("a/model.safetensors").read_bytes())
    assert main(["verify", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron verify: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--help"])
    assert caught.value.code == 0
    assert "manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize("num_folders", [1, 2])
def test_what_is_not_needed_is_not_imported(tmp_path, num_folders):
    make_folder(tmp_path / "a")
    words = ["verify", *[str(tmp_path / "a")] * num_folders]
    heavy = {"megatron", "transformers", "peft"} | ({"torch"} if num_folders == 1 else set())
    code = (
        "import sys; from mtrain.cli.main import main; "
        f"code = main({words!r}); found = {heavy!r} & set(sys.modules); "
        "sys.exit(f'imported {found}' if found else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
