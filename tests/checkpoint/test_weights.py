import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtrain.bridge.plan import weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.checkpoint.folder import Contents, SaveError
from mtrain.checkpoint.weights import WeightsFormat, weights_contents
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.verify.compare import compare_checkpoints
from mtrain.verify.files import check_files
from tests.checkpoint.saving import save as save_steps
from tests.megatron import load_model, read_config
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

BESIDE = {
    "generation_config.json": '{"do_sample": true}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "x"}',
    "merges.txt": "a b\n",
    "tokenizer.model": "\x00binary",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("weights") / "source", "qwen3")
    for name, text in BESIDE.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    # Files of the hub's cache are links.
    moved = folder.parent / "blob"
    (folder / "tokenizer.json").rename(moved)
    (folder / "tokenizer.json").symlink_to(moved)
    return folder


def save(
    state: ParallelState, source: Path, run: Path, dtype: torch.dtype, is_async: bool = False
) -> Path:
    form = WeightsFormat(
        source=source,
        hf_config=read_config(source),
        table=weight_table(read_config(source)),
        dtype=dtype,
        max_shard_size=100_000,
    )
    lookup = lookup_in(tensors_by_name(load_model(state, source, dtype=dtype)))

    def contents(open_file: OpenFile) -> Contents:
        return weights_contents(
            lookup,
            form=form,
            arguments={"lr": 1e-5, "model": "模型"},
            state=state,
            open_file=open_file,
        )

    [report] = save_steps(run, [5], contents, world=state.world, is_async=is_async)
    return report.folder


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(world_size=2, tp_size=2)])
def test_a_saved_folder_is_a_hugging_face_checkpoint(source, tmp_path, layout, is_async):
    folder = run_ranks(layout, save, source, tmp_path, torch.float32, is_async)[0]
    assert check_files(folder) == []
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = load_file(source / "model.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert json.loads((folder / "args.json").read_text()) == {"lr": 1e-5, "model": "模型"}


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp2", "pp2"])
def test_the_manifest_of_several_ranks_is_that_of_what_is_on_disk(source, tmp_path, sizes):
    """T21: and the tensors are those of the source, in other files."""
    layout = ParallelLayout(world_size=2, **sizes)
    folder = run_ranks(layout, save, source, tmp_path, torch.float32)[0]
    assert check_files(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["source"] == {"model": str(source)}
    assert set(manifest["tensors"]) == set(load_file(source / "model.safetensors"))
    found = compare_checkpoints(open_checkpoint(source), open_checkpoint(folder))
    assert {result.verdict for result in found} == {"equal"}


def test_everything_beside_the_weights_is_copied_but_no_code(source, tmp_path):
    [folder] = run_ranks(ParallelLayout(), save, source, tmp_path, torch.float32)
    for name, text in BESIDE.items():
        assert (folder / name).read_text() == text
        assert not (folder / name).is_symlink()
    assert not (folder / "modeling_evil.py").exists()


def test_the_config_tells_the_dtype_of_the_saved_weights(source, tmp_path):
    [folder] = run_ranks(ParallelLayout(), save, source, tmp_path, torch.bfloat16)
    before, after = read_config(source), read_config(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"dtype"}
    assert after["dtype"] == "bfloat16"
    for path in folder.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}


def save_to_full_disk(state: ParallelState, source: Path, run: Path) -> str:
    if state.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(SaveError) as caught:
            save(state, source, run, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return str(caught.value)


@pytest.mark.parametrize("layout", [{"tp_size": 2}, {"pp_size": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_a_full_disk_on_one_rank_stops_all_with_the_reason(source, tmp_path, layout):
    """T03: nobody waits for the rank that failed, and nothing half-written stays."""
    layout = ParallelLayout(world_size=2, **layout)
    for message in run_ranks(layout, save_to_full_disk, source, tmp_path):
        assert message.startswith(f"cannot save {tmp_path}/checkpoint-5: rank 1: [Errno 27]")
    assert list(tmp_path.iterdir()) == []
