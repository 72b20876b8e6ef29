"""`megatron export` on a rank: PEFT's own merge is the judge."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtrain.cli import export
from mtrain.cli.launch import Placement
from mtrain.cli.preparation import check_inputs
from mtrain.config import (
    CheckpointConfig,
    ExportConfig,
    ExportOptions,
    ModelConfig,
    ParallelConfig,
    TunerConfig,
    resolve_export,
)
from mtrain.parallel import ParallelLayout, destroy_world
from tests.lora.peft_folders import load_with_peft, logits_of, save_with_peft, weights_of
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model with experts, and an adapter of PEFT for it; PEFT fuses experts."""
    base = make_checkpoint(tmp_path_factory.mktemp("base"), "qwen3_moe_mixed")
    (base / "tokenizer.json").write_text("{}")
    adapter = tmp_path_factory.mktemp("adapter")
    save_with_peft(
        base,
        adapter,
        r=2,
        lora_alpha=3,
        lora_dropout=0.0,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return base, adapter


def settings(folders, output: Path, *, torch_dtype=None, exist_ok=False, **tuner) -> ExportConfig:
    base, adapter = folders
    return resolve_export(
        ExportConfig(
            model=ModelConfig(model=str(base), torch_dtype=torch_dtype),
            tuner=TunerConfig(adapters=(str(adapter),), **tuner),
            checkpoint=CheckpointConfig(output_dir=str(output)),
            export=ExportOptions(to_hf=True, exist_ok=exist_ok),
        )
    )


def run_alone(config: ExportConfig) -> Path:
    check_inputs(config, world_size=1, show_progress=False)
    try:
        assert export.run(config, Placement()) == 0
    finally:
        destroy_world()
    return Path(config.checkpoint.output_dir)


@pytest.fixture(scope="module")
def merged(folders, tmp_path_factory) -> Path:
    return run_alone(settings(folders, tmp_path_factory.mktemp("merged") / "a" / "b"))


def test_merging_gives_the_weights_that_peft_gives(folders, merged) -> None:
    ours = load_file(merged / "model.safetensors")
    expected = weights_of(load_with_peft(*folders).merge_and_unload())
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_what_is_beside_the_weights_is_that_of_the_model(folders, merged) -> None:
    base, _ = folders
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((merged / name).read_text()) == json.loads((base / name).read_text())
    assert not list(merged.glob("adapter*"))


def test_merged_weights_are_rounded_once(folders, merged, tmp_path) -> None:
    """Not the model first, and then the sum again."""
    half = run_alone(settings(folders, tmp_path / "half", torch_dtype="bfloat16"))
    exact = load_file(merged / "model.safetensors")
    rounded = load_file(half / "model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_is_rewritten_without_a_change(folders, tmp_path) -> None:
    """Here fused experts become one linear each, and these fused ones again."""
    base, adapter = folders
    expected = logits_of(load_with_peft(base, adapter))
    single = run_alone(settings(folders, tmp_path / "single", merge_lora=False))
    names = load_file(single / "adapter_model.safetensors").keys()
    assert any(".experts.3.gate_proj.lora_A" in name for name in names)
    options = {"merge_lora": False, "lora_export_layout": "fused"}
    fused = run_alone(settings((base, single), tmp_path / "fused", **options))
    names = load_file(fused / "adapter_model.safetensors").keys()
    assert not any(".experts.3." in name for name in names)
    for folder in (single, fused):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        torch.testing.assert_close(
            logits_of(load_with_peft(base, folder)), expected, rtol=1e-5, atol=1e-5
        )


def test_an_adapter_keeps_its_precision_unless_told(folders, tmp_path) -> None:
    base, _ = folders
    half = {"merge_lora": False, "lora_dtype": "bfloat16"}
    first = run_alone(settings(folders, tmp_path / "first", **half))
    second = run_alone(settings((base, first), tmp_path / "second", merge_lora=False))
    files = [folder / "adapter_model.safetensors" for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {tensor.dtype for tensor in load_file(files[0]).values()} == {torch.bfloat16}


def test_an_adapter_in_double_precision_becomes_a_float32_one(folders, tmp_path) -> None:
    base, adapter = folders
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t.double() for n, t in tensors.items()}, wide / "adapter_model.safetensors")
    output = run_alone(settings((base, wide), tmp_path / "out", merge_lora=False))
    saved = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_result_takes_the_place_of_older_weights_when_told(folders, merged, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("adapter_config.json", "model.safetensors.index.json", "model-1.safetensors"):
        (tmp_path / name).write_text("old")
    run_alone(settings(folders, tmp_path, exist_ok=True))
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt",
        *(path.name for path in merged.iterdir()),
    }
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (merged / weights).read_bytes()


def export_on_rank(state, config: ExportConfig) -> int:
    """The command on a rank that is there already."""
    export.join = lambda *_, **__: state.world
    export.destroy_world = lambda: None
    return export.run(config, Placement(rank=state.rank, world_size=state.layout.world_size))


@pytest.mark.parametrize(
    "sizes",
    [
        layout(tp_size=2, ep_size=2),
        layout(pp_size=2, vpp_size=2),
        ParallelLayout(world_size=2, tp_size=2, etp_size=2),
    ],
    ids=["tp2_ep2", "pp2_vpp2", "etp2"],
)
def test_every_layout_writes_the_same(folders, merged, tmp_path, sizes) -> None:
    """Bit for bit, file by file: the ranks only share the work."""
    output = tmp_path / "out"
    config = settings(folders, output)
    parallel = ParallelConfig(
        tensor_model_parallel_size=sizes.tp_size,
        pipeline_model_parallel_size=sizes.pp_size,
        virtual_pipeline_model_parallel_size=sizes.vpp_size,
        expert_model_parallel_size=sizes.ep_size,
        expert_tensor_parallel_size=sizes.etp_size,
        sequence_parallel=sizes.tp_size > 1,
    )
    codes = run_ranks(sizes, export_on_rank, dataclasses.replace(config, parallel=parallel))
    assert codes == [0] * sizes.world_size
    expected = load_file(merged / "model.safetensors")
    ours = {n: t for file in output.glob("*.safetensors") for n, t in load_file(file).items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    for path in merged.glob("*.json"):
        if path.name not in ("args.json", "manifest.json"):
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name


_HEAVY = ("megatron", "transformer_engine", "transformers")
_EXPORT_AND_LIST = f"""
import sys
from mtrain.cli.main import main
assert main(["export", *sys.argv[1:]]) == 0
print(sorted(set({_HEAVY}) & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def mcore(folders, tmp_path_factory) -> Path:
    """The model in Megatron-Core's format."""
    config = ExportConfig(
        model=ModelConfig(model=str(folders[0])),
        checkpoint=CheckpointConfig(output_dir=str(tmp_path_factory.mktemp("mcore") / "model")),
        export=ExportOptions(to_mcore=True),
    )
    run_ranks(layout(), export_on_rank, resolve_export(config))
    return Path(config.checkpoint.output_dir)


@pytest.mark.parametrize("kind", ["model", "merged", "adapter"])
def test_hugging_face_files_are_written_without_megatron(folders, mcore, tmp_path, kind) -> None:
    """Its import is most of the time that a small conversion takes."""
    base, adapter = map(str, folders)
    words = {
        "model": ["--mcore_model", str(mcore)],
        "merged": ["--mcore_model", str(mcore), "--adapters", adapter, "--merge_lora", "true"],
        "adapter": ["--model", base, "--adapters", adapter, "--merge_lora", "false"],
    }
    command = [sys.executable, "-c", _EXPORT_AND_LIST, *words[kind], "--to_hf", "true"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
