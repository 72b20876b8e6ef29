"""Checks of the ranks: the device they found, and whether all nodes were given the same."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest

from mtrain.cli.adapter_source import AdapterSource
from mtrain.cli.model_source import open_source
from mtrain.cli.rank_checks import (
    check_attention,
    check_collectives,
    check_cuda_graphs,
    check_same_inputs,
)
from mtrain.config import (
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SftConfig,
    TunerConfig,
)
from mtrain.data.report import PreparationReport, SplitReport
from mtrain.data.tokenize import PreparedData
from mtrain.lora.peft_format import StoredAdapter
from mtrain.lora.plan import LoraPlan
from mtrain.parallel import ParallelLayout
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr("mtrain.platform.device.has_gpu", lambda: False)


def test_the_library_of_the_device_is_accepted() -> None:
    check_collectives(ParallelConfig())
    check_collectives(ParallelConfig(ddp_backend="gloo"))


def test_another_library_is_refused() -> None:
    with pytest.raises(ValueError, match="--ddp_backend nccl: the ranks talk over gloo on cpu"):
        check_collectives(ParallelConfig(ddp_backend="nccl"))


def test_kernels_are_not_recorded_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr("mtrain.cli.rank_checks.has_gpu", lambda: False)
    check_cuda_graphs(ModelConfig())
    with pytest.raises(ValueError, match="--cuda_graph_impl local: there is no GPU; use auto"):
        check_cuda_graphs(ModelConfig(cuda_graph_impl="local"))


@pytest.mark.parametrize("kernel", ["fused", "unfused", "local"])
def test_kernels_of_transformer_engine_are_refused_without_it(kernel) -> None:
    model = ModelConfig(attention_backend=kernel)
    check_attention(model, backend="te")
    with pytest.raises(ValueError, match=f"--attention_backend {kernel} is a kernel of Transf"):
        check_attention(model, backend="torch")
    check_attention(ModelConfig(attention_backend="flash"), backend="torch")


def prepared(key: str) -> PreparedData:
    counts = {field.name: 1 for field in dataclasses.fields(SplitReport)} | {"refusals": {}}
    report = PreparationReport(
        train=SplitReport(**counts),
        validation=None,
        max_length=8,
        pad_token_id=0,
        seconds=0.0,
        reused=True,
    )
    return PreparedData(train=Path(key, "train"), validation=None, report=report)


def compare(state, folder: Path, changes: list[dict], keys: list[str]) -> str:
    """What a rank says when ranks were given these settings and data."""
    config = SftConfig(**changes[state.rank])
    model = ModelConfig(model=str(folder))
    source = open_source(model, ParallelConfig(), world_size=1, download=False)
    try:
        check_same_inputs(config, source, state.world, data=prepared(keys[state.rank]))
    except ValueError as error:
        return str(error)
    return "same"


@pytest.mark.parametrize(
    ("second", "keys", "expected"),
    [
        ({}, ["/a/key", "/a/key"], "same"),
        (
            {
                "model": ModelConfig(model="/there"),
                "data": DataConfig(dataset=("/there/x.json",)),
                "checkpoint": CheckpointConfig(output_dir="/there/out"),
            },
            ["/here/key", "/there/key"],
            "same",
        ),
        (
            {"optimizer": OptimizerConfig(lr=2.0)},
            ["/a/key", "/a/key"],
            "--lr differs between the nodes: None on rank 0, 2.0 on rank 1",
        ),
        (
            {},
            ["/a/key", "/a/other"],
            "the prepared data differs between the nodes: key on rank 0, other on rank 1",
        ),
    ],
    ids=["same", "other_places", "other_flag", "other_data"],
)
def test_nodes_must_be_given_the_same(tmp_path, second, keys, expected) -> None:
    """T35: every rank says the same, so nobody waits for a rank that left."""
    folder = make_checkpoint(tmp_path, "llama")
    answers = run_ranks(ParallelLayout(world_size=2), compare, folder, [{}, second], keys)
    assert [answer.split(";")[0] for answer in answers] == [expected] * 2


def compare_adapters(state, folder: Path, alphas: list[int]) -> str:
    """What a rank says when ranks have adapters with these settings, at places of their own."""
    lora = LoraPlan(linears=())
    stored = StoredAdapter(
        folder=Path(f"/{state.rank}"),
        lora=lora,
        config={"lora_alpha": alphas[state.rank]},
        base=None,
        dropout=0.0,
        dtype="float32",
        source=lambda fused: nullcontext(),
    )
    config = ExportConfig(tuner=TunerConfig(adapters=(f"/{state.rank}",)))
    model = ModelConfig(model=str(folder))
    source = open_source(model, ParallelConfig(), world_size=1, download=False)
    try:
        check_same_inputs(
            config,
            source,
            state.world,
            adapter=AdapterSource(lora=lora, stored=stored, fingerprint=""),
        )
    except ValueError as error:
        return str(error)
    return "same"


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [([4, 4], "same"), ([4, 5], "adapter_config.json of --adapters differs between the nodes: ")],
)
def test_nodes_must_be_given_the_same_adapter(tmp_path, alphas, expected) -> None:
    """T35."""
    folder = make_checkpoint(tmp_path, "llama")
    for answer in run_ranks(ParallelLayout(world_size=2), compare_adapters, folder, alphas):
        assert answer.startswith(expected)
