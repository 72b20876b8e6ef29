"""Megatron-Core loads what is written here, into its own model on any layout."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mtrain.bridge.plan import hf_tensors, weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.written import record_file
from mtrain.checkpoint.torch_dist.reader import open_torch_dist
from mtrain.checkpoint.torch_dist.streaming import units
from mtrain.checkpoint.torch_dist.streaming.writer import save_torch_dist
from mtrain.parallel import ParallelLayout
from mtrain.verify.compare import compare_checkpoints
from tests.checkpoint.torch_dist.stock import expected_tensors, load_with_megatron, stock_model
from tests.megatron import SINGLE, read_config
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint

FAMILIES = ("llama3_tied", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / request.param, request.param)


def write(state, source: Path, folder: Path, chunk_bytes: int | None = None):
    if chunk_bytes is not None:
        units._CHUNK_BYTES = chunk_bytes
    folder.mkdir(exist_ok=True)
    return save_torch_dist(
        open_checkpoint(source),
        folder,
        table=weight_table(read_config(source)),
        rank=state.rank,
        world_size=state.layout.world_size,
        iteration=1,
    )


def load_and_compare(state, source: Path, folder: Path) -> list[str]:
    model = stock_model(state, source, named_as_te=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_with_megatron(model, folder)
    expected = expected_tensors(state, source)
    actual = dict(model.named_parameters())
    assert actual.keys() == expected.keys()
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


LAYOUTS = {
    "one": SINGLE,
    "tp2": layout(tp_size=2),
    "pp2": layout(pp_size=2),
    "tp2_pp2": layout(tp_size=2, pp_size=2),
}


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory) -> Path:
    """By three ranks, in small chunks; the layout of those that load is another."""
    folder = tmp_path_factory.mktemp("torch_dist") / "iter"
    run_ranks(ParallelLayout(world_size=3), write, checkpoint, folder, 20_000)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_megatron_core_loads_it_in_any_layout(checkpoint, written, name) -> None:
    if "moe" in checkpoint.name and "tp2" in name:
        pytest.skip("Megatron-Core's own experts need sequence parallelism, its own norm has none")
    wrong = run_ranks(LAYOUTS[name], load_and_compare, checkpoint, written)
    assert wrong == [[]] * LAYOUTS[name].world_size


def test_megatron_core_loads_experts_in_parallel(checkpoint, written) -> None:
    if "moe" not in checkpoint.name:
        pytest.skip("no experts")
    wrong = run_ranks(layout(ep_size=2), load_and_compare, checkpoint, written)
    assert wrong == [[], []]


def test_reading_it_gives_the_tensors_back(checkpoint, written) -> None:
    table = weight_table(read_config(checkpoint))
    ours = open_torch_dist(written, table)
    assert ours.tensors.keys() == hf_tensors(table).keys()
    verdicts = {c.verdict for c in compare_checkpoints(open_checkpoint(checkpoint), ours)}
    assert verdicts == {"equal"}


def test_records_are_those_of_the_files(checkpoint, tmp_path) -> None:
    (records,) = run_ranks(SINGLE, write, checkpoint, tmp_path / "iter")
    assert records
    for record in records:
        again = record_file(tmp_path / "iter", tmp_path / "iter" / record.name)
        assert dataclasses.replace(record, tensors={}) == again
        assert record.tensors


def write_nowhere(state, source: Path, folder: Path) -> str:
    try:
        write(state, source, folder)
    except OSError as error:
        return str(error)
    return "written"


def test_a_rank_that_cannot_write_ends_all(tmp_path) -> None:
    """T03: with the reason, and not after a time-out."""
    source = make_checkpoint(tmp_path / "hf", "qwen2")
    folder = tmp_path / "iter"
    folder.mkdir()
    (folder / "__1_0.distcp").write_text("in the way")
    answers = run_ranks(ParallelLayout(world_size=2), write_nowhere, source, folder)
    assert answers[0] == answers[1]
    assert "__1_0.distcp" in answers[0]
