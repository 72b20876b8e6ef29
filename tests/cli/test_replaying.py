"""When layers are replayed; that it changes nothing is in tests/model/test_replay.py."""

from types import SimpleNamespace

import pytest

from mtrain.cli import replaying
from mtrain.cli.rank_checks import check_cuda_graphs
from mtrain.config import DataConfig, ModelConfig, SftConfig
from mtrain.platform.device import has_gpu

PACKED = DataConfig(packing=True)


@pytest.fixture
def left(monkeypatch):
    """Parameters that data parallelism was told to leave."""
    monkeypatch.setattr(replaying, "graph_recorder", lambda: "record")
    monkeypatch.setattr(replaying, "replay_layers", lambda model, record: [(model.name, record)])
    monkeypatch.setattr(replaying, "why_not_replayed", lambda model, num_ranks: model.reason)
    return []


def replay(left, *, impl="auto", data=PACKED, world_size=1, reason=""):
    config = SftConfig(model=ModelConfig(cuda_graph_impl=impl), data=data)
    model, chunk = SimpleNamespace(name="model", reason=reason), SimpleNamespace(leave=left.extend)
    replaying.replay_where_possible([model], [chunk], config, world_size=world_size)
    return left


@pytest.mark.parametrize("impl", ["auto", "local"])
def test_layers_are_replayed_where_they_can_be(impl, left) -> None:
    assert replay(left, impl=impl) == [("model", "record")]


@pytest.mark.parametrize(
    "options",
    [{"impl": "none"}, {"data": DataConfig()}, {"world_size": 2}, {"reason": "there is no GPU"}],
)
def test_elsewhere_they_are_computed_as_they_are(options, left) -> None:
    assert replay(left, **options) == []


def test_who_asks_for_it_is_told_why_it_cannot_be(left) -> None:
    with pytest.raises(ValueError) as caught:
        replay(left, impl="local", reason="the model has gated delta nets")
    assert str(caught.value) == (
        "--cuda_graph_impl local: the model has gated delta nets; use auto or none"
    )


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_before_anything_is_loaded() -> None:
    check_cuda_graphs(ModelConfig())
    with pytest.raises(ValueError, match="--cuda_graph_impl local: there is no GPU; use auto"):
        check_cuda_graphs(ModelConfig(cuda_graph_impl="local"))
