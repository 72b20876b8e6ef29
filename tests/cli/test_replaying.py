"""When layers are replayed; that it changes nothing is in tests/model/test_replay.py."""

import pytest

from mtrain.cli import replaying
from mtrain.config import DataConfig, ModelConfig, SftConfig

PACKED = DataConfig(packing=True)


def replays(monkeypatch, *, impl="auto", reason="", **sections) -> bool:
    monkeypatch.setattr(replaying, "why_not_replayed", lambda model: reason)
    sections = {"data": PACKED, "model": ModelConfig(cuda_graph_impl=impl)} | sections
    return replaying.replays_layers(["model"], SftConfig(**sections))


@pytest.mark.parametrize("impl", ["auto", "local"])
def test_layers_are_replayed_where_they_can_be(impl, monkeypatch) -> None:
    assert replays(monkeypatch, impl=impl)


@pytest.mark.parametrize(
    "options",
    [
        {"impl": "none"},
        {"reason": "there is no GPU"},
        {"data": DataConfig()},
    ],
)
def test_elsewhere_they_are_computed_as_they_are(options, monkeypatch) -> None:
    assert not replays(monkeypatch, **options)


def test_who_asks_for_it_is_told_why_it_cannot_be(monkeypatch) -> None:
    with pytest.raises(ValueError) as caught:
        replays(monkeypatch, impl="local", reason="the model has gated delta nets")
    assert str(caught.value) == (
        "--cuda_graph_impl local: the model has gated delta nets; use auto or none"
    )


def test_every_chunk_has_its_own_data_parallelism(monkeypatch) -> None:
    replayed: list[tuple] = []
    monkeypatch.setattr(replaying, "graph_recorder", lambda: "record")
    monkeypatch.setattr(replaying, "replay_layers", lambda *given: replayed.append(given))
    replaying.replay(["model"], ["chunk"])
    assert replayed == [("model", "record", "chunk")]
