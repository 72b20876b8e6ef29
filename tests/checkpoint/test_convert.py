"""Whole folders of converted checkpoints, on one rank and on two."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from mtrain.bridge.converted import converted
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.checkpoint.convert import (
    Destination,
    ModelDescription,
    export_torch_dist_adapter,
    export_torch_dist_model,
    export_weights,
)
from mtrain.checkpoint.folder import SaveError
from mtrain.checkpoint.torch_dist.folder import open_torch_dist_folder
from mtrain.checkpoint.torch_dist.metadata import read_metadata
from mtrain.lora.adapter_weights import adapter_weights
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import adapter_table
from mtrain.parallel import ParallelLayout
from mtrain.verify.compare import compare_checkpoints
from mtrain.verify.files import check_files
from tests.lora.peft_folders import random_values, table_of, uniform_plan, write_adapter
from tests.megatron import SINGLE, read_config
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

LAYOUTS = {"one": SINGLE, "two": ParallelLayout(world_size=2, tp_size=2)}
BESIDE = {"config.json", "generation_config.json", "tokenizer.json", "args.json", "manifest.json"}
TORCH_DIST = {"latest_checkpointed_iteration.txt", "base_model.json", "iter_0000001/.metadata"}
ADAPTER = {"adapter_config.json", "adapter_tensors.json"}


def destination(state, folder: Path, *, exist_ok: bool = False, sources=()) -> Destination:
    return Destination(
        folder=folder,
        world=state.world,
        exist_ok=exist_ok,
        arguments={"model": "模型"},
        origin={"model": "org/name"},
        sources=list(sources),
    )


def export_model(to: Destination, source: Path, kind: str) -> None:
    """In bfloat16, as Hugging Face files or as torch_dist."""
    table, hf_config = table_of(source), read_config(source)
    stored = open_checkpoint(source)
    weights = converted(stored, dict.fromkeys(stored.tensors, "BF16"))
    described = ModelDescription(folder=source, hf_config=hf_config | {"dtype": "bfloat16"})
    if kind == "hf":
        export_weights(weights, to, described=described, max_shard_size=100_000)
    else:
        options = {"table": table, "described": described, "fingerprint": "0123"}
        export_torch_dist_model(weights, to, **options)


def export_adapter(to: Destination, source: Path, adapter: Path) -> None:
    stored = read_adapter(adapter, table_of(source))
    table = adapter_table(table_of(source), stored.lora)
    export_torch_dist_adapter(
        adapter_weights(stored, table),
        to,
        table=table,
        config=stored.config,
        hf_config=read_config(source),
        fingerprint="0123",
    )


def export_all(state, source: Path, adapter: Path, root: Path) -> None:
    """All that there is, in one start of the ranks."""
    for kind in ("hf", "model"):
        export_model(destination(state, root / kind), source, kind)
    export_adapter(destination(state, root / "adapter"), source, adapter)
    # Each into a folder with the one before.
    again = destination(state, root / "again", exist_ok=True)
    export_adapter(again, source, adapter)
    if state.is_first_rank:
        leave_older_files(root / "again")
    export_model(again, source, "model")
    kept_for_later(state, root, "again", "again_model")
    export_model(again, source, "hf")
    kept_for_later(state, root, "again", "again_hf")


def leave_older_files(folder: Path) -> None:
    """Of an export on more ranks, of its precision test, and of somebody."""
    (folder / "precision.json").write_text("{}")
    (folder / "iter_0000001" / "__7_0.distcp").write_text("old")
    (folder / "iter_0000002").mkdir()
    (folder / "iter_0000002" / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")


def kept_for_later(state, root: Path, name: str, copy: str) -> None:
    if state.is_first_rank:
        for path in (root / name).rglob("*"):
            target = root / copy / path.relative_to(root / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                target.write_bytes(path.read_bytes())
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("source") / "hf", "qwen3_moe_mixed")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def adapter(source, tmp_path_factory) -> Path:
    table = table_of(source)
    lora = uniform_plan(table, "q_proj", "up_proj", "gate")
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    return write_adapter(folder, lora, table, random_values(lora, table), base="org/name")


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, source, adapter, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    run_ranks(LAYOUTS[request.param], export_all, source, adapter, root)
    return root


def files_of(folder: Path) -> set[str]:
    """Names of the files, without data files."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.endswith((".distcp", ".safetensors"))}


def check_manifest(folder: Path, source: str) -> None:
    """T21: the manifest fits the files, and all but foreign ones are in it."""
    assert check_files(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == {name for name in names if "notes" not in name} - {
        "manifest.json"
    }
    assert manifest["source"] == {"model": source}
    assert json.loads((folder / "args.json").read_text()) == {"model": "模型"}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def same_as_source(weights, source: Path) -> bool:
    """Whether weights are those of the source, rounded."""
    stored = open_checkpoint(source)
    rounded = converted(stored, dict.fromkeys(stored.tensors, "BF16"))
    return {c.verdict for c in compare_checkpoints(rounded, weights)} == {"equal"}


def test_a_model_in_hugging_face_format_is_complete(exported, source) -> None:
    folder = exported / "hf"
    assert files_of(folder) == {*BESIDE, "model.safetensors.index.json"}
    check_manifest(folder, "org/name")
    assert same_as_source(open_checkpoint(folder), source)
    assert read_config(folder) == read_config(source) | {"dtype": "bfloat16"}


def test_a_model_in_torch_dist_format_is_complete(exported, source) -> None:
    folder = exported / "model"
    megatrons = {"iter_0000001/common.pt", "iter_0000001/metadata.json"}
    assert files_of(folder) == {*BESIDE, *TORCH_DIST, *megatrons}
    check_manifest(folder, "org/name")
    assert same_as_source(open_torch_dist_folder(folder), source)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    assert read_config(folder) == read_config(source) | {"dtype": "bfloat16"}
    assert "0123" in (folder / "base_model.json").read_text()


def test_an_adapter_in_torch_dist_format_is_complete(exported, source, adapter) -> None:
    folder = exported / "adapter"
    megatrons = {"iter_0000001/common.pt", "iter_0000001/metadata.json"}
    expected = {"config.json", "args.json", "manifest.json", *TORCH_DIST, *megatrons, *ADAPTER}
    assert files_of(folder) == expected
    check_manifest(folder, "org/name")
    stored = read_adapter(adapter, table_of(source))
    weights = adapter_weights(stored, adapter_table(table_of(source), stored.lora))
    found = compare_checkpoints(weights, open_torch_dist_folder(folder))
    assert {c.verdict for c in found} == {"equal"}


def test_the_metadata_says_the_same_as_when_torch_reads_it(exported) -> None:
    folder = exported / "model" / "iter_0000001"
    expected = pickle.loads((folder / ".metadata").read_bytes())
    places = {(index.fqn, index.offset): at for index, at in expected.storage_data.items()}
    found = read_metadata(folder)
    entries = expected.state_dict_metadata.items()
    assert found.keys() == {key for key, entry in entries if hasattr(entry, "chunks")}
    for key, tensor in found.items():
        entry = expected.state_dict_metadata[key]
        assert (tensor.dtype, tensor.shape) == ("BF16", entry.size)
        theirs = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
        assert [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks] == theirs
        for chunk in tensor.chunks:
            at = places[key, torch.Size(chunk.offsets)]
            assert chunk.path == folder / at.relative_path
            assert (chunk.start, chunk.num_bytes) == (at.offset, at.length)


@pytest.mark.parametrize("name", ["again_model", "again_hf"])
def test_an_older_result_is_replaced_and_other_files_stay(exported, source, name) -> None:
    """T21: nothing of it is taken for a part of the new one."""
    folder = exported / name
    check_manifest(folder, "org/name")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "iter_0000002" / "notes.txt").read_text() == "mine"
    notes = {"notes.txt", "iter_0000002/notes.txt"}
    alone = exported / name.removeprefix("again_")
    assert files_of(folder) == files_of(alone) | notes
    is_hf = name == "again_hf"
    weights = open_checkpoint(folder) if is_hf else open_torch_dist_folder(folder)
    assert same_as_source(weights, source)


def export_over(state, source: Path, folder: Path, sources: list[Path]) -> list[str]:
    """What is said to exports into a folder that is being read."""
    messages = []
    for kind in ("hf", "model"):
        to = destination(state, folder, exist_ok=True, sources=sources)
        with pytest.raises(SaveError) as caught:
            export_model(to, source, kind)
        messages.append(str(caught.value))
    return messages


def test_a_checkpoint_that_no_export_wrote_is_not_replaced(source, tmp_path) -> None:
    folder = tmp_path / "out"
    (folder / "iter_0000500").mkdir(parents=True)
    (folder / "iter_0000500" / "__0_0.distcp").write_text("of a training run")
    before = contents(folder)
    for messages in run_ranks(SINGLE, export_over, source, folder, []):
        for message in messages:
            assert "iter_0000500 in it was written by no export and will not be overw" in message
    assert contents(folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["hf", "model", "iteration"])
def test_a_folder_that_is_read_is_not_written_into(source, tmp_path, what) -> None:
    """T05: nor one that holds the iteration that is read."""
    folder = source
    sources = [source]
    if what != "hf":
        folder = tmp_path / "out"
        (folder / "iter_0000500").mkdir(parents=True)
        (folder / "iter_0000500" / "__0_0.distcp").write_text("old")
        sources = [folder if what == "model" else folder / "iter_0000500"]
    before = contents(folder)
    for messages in run_ranks(SINGLE, export_over, source, folder, sources):
        for message in messages:
            assert message.startswith(f"cannot save {folder}: rank 0: the model was loaded from it")
    assert contents(folder) == before
