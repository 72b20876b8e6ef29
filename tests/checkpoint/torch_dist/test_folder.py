"""Which iteration a folder holds, and what has to lie beside it."""

import json
from pathlib import Path

import pytest
import torch

from mtrain.bridge.plan import weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.checkpoint.convert import (
    Destination,
    ModelDescription,
    export_torch_dist_adapter,
    export_torch_dist_model,
)
from mtrain.checkpoint.torch_dist.folder import (
    is_torch_dist,
    iteration_folder,
    open_torch_dist_folder,
    open_torch_dist_model,
    read_torch_dist_adapter,
)
from mtrain.lora.adapter_weights import adapter_weights
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import adapter_table
from tests.lora.peft_folders import random_values, table_of, uniform_plan, write_adapter
from tests.megatron import SINGLE, read_config
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

TRACKER = "latest_checkpointed_iteration.txt"
TARGETS = ("q_proj", "v_proj", "gate_proj", "down_proj")


def make_iteration(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("7", "iter_0000007"),
        ("7\n", "iter_0000007"),
        ("12345678", "iter_12345678"),
        ("release", "release"),
    ],
)
def test_the_latest_iteration_is_the_one_that_the_tracker_names(tmp_path, text, name) -> None:
    make_iteration(tmp_path, "iter_0000001")
    folder = make_iteration(tmp_path, name)
    (tmp_path / TRACKER).write_text(text)
    assert iteration_folder(tmp_path) == folder
    assert iteration_folder(folder) == folder
    assert is_torch_dist(tmp_path)
    assert is_torch_dist(folder)


def test_other_folders_are_no_torch_dist_checkpoints(tmp_path) -> None:
    assert not is_torch_dist(tmp_path)
    assert not is_torch_dist(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no torch_dist checkpoint \(neither .* nor .metadata\)"):
        iteration_folder(tmp_path)
    # A run of mtrain, whose tracker has the same name.
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / TRACKER).write_text("5")
    assert not is_torch_dist(tmp_path)
    with pytest.raises(ValueError, match="names iteration 5, but there is no iter_0000005"):
        iteration_folder(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "-1", "../7", "7/../8", "/etc", "7 8", "1e3", "9" * 13, "٧", "release\0", "x" * 10**6],
    ids=lambda text: repr(text[:9]),
)
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path, text) -> None:
    """T22."""
    make_iteration(tmp_path, "iter_0000007")
    (tmp_path / TRACKER).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        iteration_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path / TRACKER}: {text[:40]!r} is no iteration"


def test_a_tracker_of_other_bytes_is_refused(tmp_path) -> None:
    (tmp_path / TRACKER).write_bytes(b"\xff\xfe7")
    with pytest.raises(ValueError) as caught:
        iteration_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / TRACKER}: ")
    assert str(caught.value).endswith("is no iteration")


def convert(state, source: Path, adapter: Path, root: Path) -> None:
    """Writes a model and its adapter as torch_dist."""
    hf_config, table = read_config(source), table_of(source)

    def to(name: str) -> Destination:
        return Destination(
            folder=root / name,
            world=state.world,
            exist_ok=False,
            arguments={},
            origin={},
            sources=[],
        )

    described = ModelDescription(folder=source, hf_config=hf_config)
    options = {"table": table, "described": described, "fingerprint": "00"}
    export_torch_dist_model(open_checkpoint(source), to("model"), **options)
    stored = read_adapter(adapter, table)
    of_adapter = adapter_table(table, stored.lora)
    export_torch_dist_adapter(
        adapter_weights(stored, of_adapter),
        to("adapter"),
        table=of_adapter,
        config=stored.config,
        hf_config=hf_config,
        fingerprint="00",
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A model and an adapter in both formats."""
    root = tmp_path_factory.mktemp("converted")
    source = make_checkpoint(root / "hf", "qwen3_moe_mixed")
    table = table_of(source)
    lora = uniform_plan(table, *TARGETS)
    write_adapter(root / "peft", lora, table, random_values(lora, table), base="org/name")
    run_ranks(SINGLE, convert, source, root / "peft", root)
    return root


def same_tensors(ours, theirs) -> bool:
    assert ours.tensors.keys() == theirs.tensors.keys()
    with ours.open() as mine, theirs.open() as others:
        return all(
            torch.equal(mine.slices(name)[:], others.slices(name)[:]) for name in theirs.tensors
        )


def test_a_folder_says_itself_whether_it_is_a_model_or_an_adapter(converted) -> None:
    table = table_of(converted / "hf")
    model = open_checkpoint(converted / "hf")
    assert same_tensors(open_torch_dist_folder(converted / "model"), model)
    assert same_tensors(open_torch_dist_model(converted / "model", table), model)
    peft = read_adapter(converted / "peft", table)
    adapter = adapter_weights(peft, adapter_table(table, peft.lora))
    assert same_tensors(open_torch_dist_folder(converted / "adapter"), adapter)


def test_an_adapter_comes_back_as_it_was(converted) -> None:
    table = table_of(converted / "hf")
    ours = read_torch_dist_adapter(converted / "adapter", table)
    theirs = read_adapter(converted / "peft", table)
    assert (ours.lora, ours.base, ours.dropout) == (theirs.lora, theirs.base, theirs.dropout)
    assert (ours.dtype, ours.config) == (theirs.dtype, theirs.config)
    values = random_values(ours.lora, table)
    with ours.open() as source:
        assert all(torch.equal(source.slices(name)[:], values[name]) for name in values)


def copied(converted: Path, name: str, root: Path) -> Path:
    """The folder once more, for a test to change."""
    for path in (converted / name).rglob("*"):
        if path.is_file():
            target = root / path.relative_to(converted / name)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return root


def test_a_folder_without_a_config_is_refused(converted, tmp_path) -> None:
    folder = copied(converted, "model", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json, without which its tensors have no"):
        open_torch_dist_folder(folder)


def test_an_adapter_that_mtrain_did_not_make_is_refused(converted, tmp_path) -> None:
    table = table_of(converted / "hf")
    with pytest.raises(ValueError, match="no torch_dist checkpoint"):
        read_torch_dist_adapter(tmp_path, table)
    folder = copied(converted, "adapter", tmp_path)
    (folder / "adapter_tensors.json").unlink()
    with pytest.raises(ValueError, match=r"that mtrain did not make \(adapter_tensors.json is mis"):
        read_torch_dist_adapter(folder, table)


def test_an_adapter_of_another_model_is_refused(converted, tmp_path) -> None:
    config = {**read_config(converted / "hf"), "num_hidden_layers": 3}
    with pytest.raises(ValueError, match=r"adapter"):
        read_torch_dist_adapter(converted / "adapter", weight_table(config))


A_NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "F32",
        {},
        [],
        ["F32"],
        ["F32", 4],
        [4, [4]],
        ["F32", [-1]],
        ["F32", [True]],
        ["F32", [0.5]],
        ["F32", [4], 1],
    ],
    ids=repr,
)
def test_a_tensor_that_is_described_wrongly_is_named(converted, tmp_path, entry) -> None:
    folder = copied(converted, "adapter", tmp_path)
    path = folder / "adapter_tensors.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {A_NAME: entry}))
    with pytest.raises(ValueError) as caught:
        read_torch_dist_adapter(folder, table_of(converted / "hf"))
    assert str(caught.value) == f"{path}: '{A_NAME}' is not described by a dtype and a shape"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"a": 1, "a": 1}', "\ud800", "[" * 10**5, "{}"],
    ids=lambda text: repr(text[:9]),
)
def test_a_broken_description_is_refused(converted, tmp_path, text) -> None:
    folder = copied(converted, "adapter", tmp_path)
    path = folder / "adapter_tensors.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as caught:
        read_torch_dist_adapter(folder, table_of(converted / "hf"))
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    "change",
    [{A_NAME: ["F32", [5, 64]]}, {A_NAME: ["U8", [4, 64]]}, {"base_model.other": ["F32", [4]]}],
    ids=["shape", "dtype", "name"],
)
def test_a_description_that_does_not_fit_is_refused(converted, tmp_path, change) -> None:
    folder = copied(converted, "adapter", tmp_path)
    path = folder / "adapter_tensors.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError):
        read_torch_dist_adapter(folder, table_of(converted / "hf"))


def test_a_description_of_fewer_tensors_than_there_are_is_refused(converted, tmp_path) -> None:
    folder = copied(converted, "adapter", tmp_path)
    path = folder / "adapter_tensors.json"
    tensors = json.loads(path.read_text())
    path.write_text(json.dumps({n: tensors[n] for n in tensors if "gate_proj" not in n}))
    with pytest.raises(ValueError, match=r"does not fit its config.json: .*not part of the model"):
        read_torch_dist_adapter(folder, table_of(converted / "hf"))
