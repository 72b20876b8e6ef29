"""Where a run stands comes back to the bit, and nothing else is taken for it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtrain.checkpoint.trainer_state import (
    read_random_states,
    read_trainer_state,
    write_random_states,
    write_trainer_state,
)
from mtrain.parallel import ParallelLayout, World
from tests.checkpoint.saving import TRAINER


def checkpoint_with(folder: Path, **changes: object) -> Path:
    """A checkpoint whose trainer.json has other values; DROP takes one out."""
    (folder / "state").mkdir()
    content = {"format": 1, **dataclasses.asdict(TRAINER), **changes}
    content = {name: value for name, value in content.items() if value is not DROP}
    (folder / "state" / "trainer.json").write_text(json.dumps(content))
    return folder


DROP = object()


def world_of(rank: int, size: int) -> World:
    device = torch.device("cpu")
    return World(size=size, rank=rank, device=device, group=None, timeout_seconds=1)


def test_a_state_is_read_as_it_was_written(tmp_path):
    """Also numbers that have many digits, or are no number."""
    (tmp_path / "state").mkdir()
    written = write_trainer_state(tmp_path, TRAINER)
    assert written.name == "state/trainer.json"
    assert read_trainer_state(tmp_path) == TRAINER
    assert TRAINER.metrics[0][0].hex() == read_trainer_state(tmp_path).metrics[0][0].hex()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TRAINER)])
def test_a_state_that_lacks_something_is_refused(tmp_path, name):
    """T14."""
    checkpoint = checkpoint_with(tmp_path, **{name: DROP})
    with pytest.raises(ValueError, match=rf"^{tmp_path}/state/trainer\.json: {name} is missing"):
        read_trainer_state(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "3"),
        ("step", -1),
        ("step", True),
        ("step", 3.0),
        ("total_steps", None),
        ("layout", []),
        ("layout", {"tp_size": "2"}),
        ("belongs_to", {"torch_dtype": 16}),
        ("num_updates", -1),
        ("loss_scale", {"scale": "65536"}),
        ("loss_scale", {"scale": True}),
        ("schedule_steps", {}),
        ("data", [1]),
        ("data_unit", -5),
        ("metrics", []),
        ("metrics", {}),
        ("metrics", [[]]),
        ("metrics", [[1.0, 2.0], 3.0]),
        ("metrics", [[1.0, "2"]]),
        ("has_random_states", 1),
    ],
)
def test_a_value_that_is_none_of_ours_is_refused(tmp_path, name, value):
    """T14: before it is used."""
    checkpoint = checkpoint_with(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"^{tmp_path}/state/trainer\.json: {name} is .* not "):
        read_trainer_state(checkpoint)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "is of format 2, and this version reads 1"),
        ({"format": DROP}, "is of format None"),
        ({"weather": "sunny"}, "has weather, which is not known"),
    ],
)
def test_another_format_is_refused(tmp_path, changes, reason):
    checkpoint = checkpoint_with(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"trainer\.json: {reason}"):
        read_trainer_state(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{} {}", '{"step": 1, "step": 2}', "\xff"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    checkpoint = checkpoint_with(tmp_path)
    (checkpoint / "state" / "trainer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/state/trainer\.json: "):
        read_trainer_state(checkpoint)


def test_a_checkpoint_without_state_is_refused(tmp_path):
    """T14."""
    reason = rf"^{tmp_path}: has no state to continue from \(.*/state/trainer\.json is missing\)"
    with pytest.raises(ValueError, match=reason):
        read_trainer_state(tmp_path)


@pytest.mark.parametrize(
    ("layout", "is_same"),
    [
        (ParallelLayout(), True),
        (ParallelLayout(world_size=2), False),
        (ParallelLayout(world_size=2, tp_size=2), False),
    ],
)
def test_random_states_are_those_of_one_layout(layout, is_same):
    assert TRAINER.is_of_layout(layout) == is_same


def test_random_states_of_each_rank_are_read_as_they_were_written(tmp_path):
    (tmp_path / "state").mkdir()
    states = [
        {"cpu": torch.arange(5, dtype=torch.uint8) + rank, "tracked.x": torch.empty(0).byte()}
        for rank in range(2)
    ]
    for rank, mine in enumerate(states):
        written = write_random_states(tmp_path, mine, world=world_of(rank, 2))
        assert written.name == f"state/rng-0000{rank + 1}-of-00002.safetensors"
        assert written.num_bytes == (tmp_path / written.name).stat().st_size
    for rank, mine in enumerate(states):
        read = read_random_states(tmp_path, world=world_of(rank, 2))
        assert read.keys() == mine.keys()
        assert all(torch.equal(read[name], mine[name]) for name in mine)


def test_missing_or_damaged_random_states_are_refused(tmp_path):
    """T14: never fresh ones instead, unless a flag says so."""
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "rng-00001-of-00001.safetensors"
    with pytest.raises(ValueError, match=rf"^{path}: is missing; use --no_load_rng true"):
        read_random_states(tmp_path, world=world_of(0, 1))
    write_random_states(tmp_path, {"cpu": torch.zeros(5).byte()}, world=world_of(0, 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"^{path}: "):
        read_random_states(tmp_path, world=world_of(0, 1))
    for tensor in (torch.zeros(5), torch.zeros(5, 2).byte()):
        save_file({"cpu": tensor}, path)
        with pytest.raises(ValueError, match=f"^{path}: cpu is no random state"):
            read_random_states(tmp_path, world=world_of(0, 1))
