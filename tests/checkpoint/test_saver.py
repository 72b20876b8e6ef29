"""Saves of a run: what becomes of one that fails, and of one that goes on beside training."""

import dataclasses
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtrain.bridge import safetensors_writer
from mtrain.bridge.plan import plan_rank, weight_table
from mtrain.bridge.safetensors_writer import DeferredWriter, OpenFile, SafetensorsWriter
from mtrain.bridge.save import lookup_in
from mtrain.bridge.written import WrittenFile
from mtrain.checkpoint import saver as saver_module
from mtrain.checkpoint.folder import Contents, SaveError
from mtrain.checkpoint.optimizer_state import OptimizerFormat, OptimizerTensors
from mtrain.checkpoint.run_folder import Retention, latest_checkpoint
from mtrain.checkpoint.saver import Saver, SaveReport
from mtrain.checkpoint.trainer_state import state_contents
from mtrain.checkpoint.weights import WeightsFormat, weights_contents
from mtrain.cli import saving
from mtrain.config import CheckpointConfig, SftConfig
from mtrain.config.resume import list_checkpoints
from mtrain.parallel import ParallelLayout, ParallelState, World
from mtrain.verify.files import check_files
from tests.bridge.standin import make_chunks
from tests.checkpoint.disk import read_tree
from tests.checkpoint.saving import TRAINER, save, tiny_contents
from tests.ranks import run_ranks
from tests.tiny import tiny_config

ONE = ParallelLayout()
TWO = ParallelLayout(world_size=2)
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def saver_of(
    run: Path,
    world: World,
    *,
    is_async: bool,
    fail: Callable[[SaveError], None],
    report: Callable[[SaveReport], None] = lambda _: None,
) -> Saver:
    return Saver(
        run,
        world=world,
        retention=Retention(limit=None),
        is_async=is_async,
        report=report,
        fail=fail,
    )


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What an optimizer remembers of a parameter that never changed."""

    chunk: int
    name: str
    start: int
    stop: int

    def read(self, kind: str) -> torch.Tensor:
        return torch.zeros(self.stop - self.start)

    def write(self, kind: str, values: torch.Tensor) -> None:
        raise NotImplementedError


def contents_of_run(open_file: OpenFile, *, state: ParallelState, source: Path) -> Contents:
    """Weights and state of a tiny model as a run saves them, in files of many ranks."""
    hf_config = tiny_config("qwen3")
    table = weight_table(hf_config)
    plan = plan_rank(table, layout=state.layout, rank=state.rank)
    (chunk,) = make_chunks(plan, num_chunks=1, dtype=torch.float32)
    tensors = dict(chunk.named_parameters())
    weights = weights_contents(
        lookup_in([tensors]),
        form=WeightsFormat(
            source=source,
            hf_config=hf_config,
            table=weight_table(hf_config),
            dtype=torch.float32,
            max_shard_size=100_000,
        ),
        arguments={},
        state=state,
        open_file=open_file,
    )
    remembered = [Remembered(0, name, 0, value.numel()) for name, value in tensors.items()]
    return weights + state_contents(
        TRAINER,
        OptimizerTensors(
            parameters=remembered,
            trained=frozenset((0, name) for name in tensors),
            kinds=("exp_avg", "exp_avg_sq"),
            only={},
            is_sharded=False,
        ),
        None,
        form=OptimizerFormat(table=table, max_shard_size=100_000),
        state=state,
        open_file=open_file,
    )


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file becomes larger than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def save_to_full_disk(state: ParallelState, folder: Path, is_async: bool) -> list[str]:
    """The disk of rank 1 is full for a while: a run that stops, and one that trains on."""
    heard: list[str] = []

    def stop(error: SaveError) -> None:
        raise error

    def warn(error: SaveError) -> None:
        assert threading.current_thread() is threading.main_thread()
        heard.append(str(error))

    run = folder / "run"
    num_bytes = 20_000 if state.rank == 1 else resource.RLIM_INFINITY
    for fail in (stop, warn):
        saver = saver_of(run, state.world, is_async=is_async, fail=fail)
        make = partial(contents_of_run, saver.open_file, state=state, source=folder)
        with full_disk(num_bytes):
            try:
                saver.save(1, make())
                saver.wait()
            except SaveError as error:
                heard.append(str(error))
        assert not saver.is_pending
    # Once there is room again, the run that went on saves as before.
    saver.save(2, make())
    saver.wait()
    return heard


@ASYNC
def test_a_full_disk_of_one_rank_fails_the_save_on_all_ranks_and_no_later_one(tmp_path, is_async):
    """T03: --save_on_error stop raises, warn goes on; nothing half-written stays."""
    answers = run_ranks(
        ParallelLayout(world_size=2, tp_size=2), save_to_full_disk, tmp_path, is_async
    )
    reason = f"cannot save {tmp_path}/run/checkpoint-1: rank 1: [Errno 27] File too large"
    for heard in answers:
        assert [text[: len(reason)] for text in heard] == [reason, reason]
    run = tmp_path / "run"
    names = sorted(path.name for path in run.iterdir())
    assert names == ["checkpoint-2", "latest_checkpointed_iteration.txt"]
    assert check_files(run / "checkpoint-2") == []


def hold(event: threading.Event, order: list[str], name: str) -> list[WrittenFile]:
    assert event.wait(timeout=30)
    order.append(f"{name} is written")
    return []


def save_two(state: ParallelState, run: Path) -> dict:
    order: list[str] = []
    released = threading.Event()
    reports: list[SaveReport] = []

    def fail(error: SaveError) -> None:
        raise error

    def contents(name: str) -> Contents:
        tiny = tiny_contents(saver.open_file, world=state.world)

        def write(folder: Path) -> list:
            order.append(f"{name} is gathered")
            return [*tiny.write(folder), partial(hold, released, order, name)]

        return dataclasses.replace(tiny, write=write)

    def agree(*args):
        # Only now does the main thread wait.
        released.set()
        return real_agree(*args)

    saver = saver_of(run, state.world, is_async=True, fail=fail, report=reports.append)
    saver.save(1, contents("first"))
    visible = [path.name for path in run.iterdir() if not path.name.startswith(".")]
    meanwhile = (saver.is_pending, saver.is_working, visible)
    real_agree = saver_module.agree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver_module, "agree", agree)
        saver.save(2, contents("second"))
    between = [path.name for path in list_checkpoints(run)]
    saver.wait()
    return {
        "order": order,
        "meanwhile": meanwhile,
        "between": between,
        "at the end": (saver.is_pending, saver.is_working),
        "blocked": [saved.blocked_seconds < saved.total_seconds for saved in reports],
    }


def test_a_save_in_the_background_is_waited_for_by_the_next_one_and_at_the_end(tmp_path):
    """T07."""
    [seen] = run_ranks(ONE, save_two, tmp_path)
    assert seen["order"] == [
        "first is gathered",
        "first is written",
        "second is gathered",
        "second is written",
    ]
    assert seen["meanwhile"] == (True, True, [])
    assert seen["between"] == ["checkpoint-1"]
    assert seen["at the end"] == (False, False)
    assert seen["blocked"] == [True, True]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def save_both_ways(state: ParallelState, folder: Path) -> None:
    for name, is_async in (("sync", False), ("async", True)):
        contents = partial(tiny_contents, world=state.world)
        save(folder / name, [1, 2], contents, world=state.world, is_async=is_async, limit=1)


def test_a_save_in_the_background_writes_the_same_bytes(tmp_path):
    """T07."""
    run_ranks(TWO, save_both_ways, tmp_path)
    tree = read_tree(tmp_path / "sync")
    assert read_tree(tmp_path / "async") == tree
    assert "checkpoint-2/state/moment-1.safetensors" in tree
    assert check_files(tmp_path / "async" / "checkpoint-2") == []


def test_what_is_written_later_is_freed_part_by_part(tmp_path, monkeypatch):
    """T07: and is a copy, because training goes on in the memory that it was read from."""
    parts: list[weakref.ref] = []

    class Watching(SafetensorsWriter):
        def append(self, part: torch.Tensor) -> None:
            assert [old() for old in parts] == [None] * len(parts)
            parts.append(weakref.ref(part))
            super().append(part)

    monkeypatch.setattr(safetensors_writer, "SafetensorsWriter", Watching)
    buffer = torch.zeros(4, dtype=torch.uint8)
    with DeferredWriter(tmp_path / "later", [("a", "U8", (12,))]) as writer:
        for value in (1, 2, 3):
            writer.append(buffer.fill_(value))
    assert list(tmp_path.iterdir()) == []
    buffer.fill_(9)
    assert writer.written.num_bytes == (tmp_path / "later").stat().st_size
    assert (tmp_path / "later").read_bytes()[-12:] == bytes([1] * 4 + [2] * 4 + [3] * 4)
    assert len(parts) == 3


def room_for(state: ParallelState, folder: Path, num_bytes: int) -> str | None:
    """What is said where each rank finds another amount of free space."""
    contents = Contents(write=lambda _: [], num_bytes=num_bytes, source={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "checkpoint_contents", lambda *_, **__: contents)
        free = SimpleNamespace(free=1000 - state.rank)
        patch.setattr("mtrain.cli.saving.shutil.disk_usage", lambda _: free)
        try:
            saving.check_room(SimpleNamespace(state=state), folder)
        except ValueError as error:
            return str(error)
    return None


@pytest.mark.parametrize(("num_bytes", "fits"), [(999, True), (1000, False)])
def test_a_checkpoint_that_has_no_room_on_one_rank_is_refused_on_all(tmp_path, num_bytes, fits):
    """T04: before the first step."""
    for answer in run_ranks(TWO, room_for, tmp_path, num_bytes):
        assert (answer is None) == fits
        assert fits or "a checkpoint needs about 1000 bytes, and 999 are free" in answer


def resume_merged(state: ParallelState, run: Path) -> list[str]:
    """What is left of a run that goes on from its first checkpoint with a limit of one."""
    contents = partial(tiny_contents, world=state.world)
    save(run, [1], contents, world=state.world)
    checkpoint = CheckpointConfig(
        resume_from_checkpoint=str(run / "checkpoint-1"), save_total_limit=1, finetune=False
    )
    saver = saving.make_saver(
        SimpleNamespace(
            config=SftConfig(checkpoint=checkpoint),
            state=state,
            inputs=SimpleNamespace(
                source=SimpleNamespace(folder=run / "base"), adapter=SimpleNamespace(stored=None)
            ),
        ),
        run,
    )
    for step in (2, 3):
        saver.save(step, contents(saver.open_file))
    return [path.name for path in list_checkpoints(run)]


def test_the_checkpoint_that_is_continued_is_kept_even_if_its_weights_are_not_loaded(tmp_path):
    """T06: those with a merged adapter are not, the base is."""
    assert run_ranks(ONE, resume_merged, tmp_path) == [["checkpoint-1", "checkpoint-3"]]
