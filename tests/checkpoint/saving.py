"""What tests save: a `Saver` whose errors are raised, and a checkpoint of a few hundred bytes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.bridge.written import WrittenFile, record_file, write_json
from mtrain.checkpoint.folder import Contents, PendingFiles, SaveError
from mtrain.checkpoint.run_folder import Retention
from mtrain.checkpoint.saver import Saver, SaveReport
from mtrain.checkpoint.trainer_state import (
    TrainerState,
    write_random_states,
    write_trainer_state,
)
from mtrain.config.resume import STATE_FOLDER
from mtrain.parallel import ParallelLayout, World

TENSORS = [("b", "F32", (2, 3)), ("a", "BF16", (4,))]
TRAINER = TrainerState(
    step=3,
    total_steps=10,
    layout=dataclasses.asdict(ParallelLayout()),
    belongs_to={"torch_dtype": "float32"},
    num_updates=2,
    loss_scale={"scale": 2.0**16, "growth_tracker": 1.0},
    schedule_steps=24,
    data={"prepared": "abc", "seed": 42, "packing_length": None},
    data_unit=24,
    metrics=[[0.1, 2.0], [1e-300, float("inf")]],
    has_random_states=True,
)


def fail(error: SaveError) -> None:
    raise error


def save(
    run: Path,
    steps: list[int],
    contents: Callable[[OpenFile], Contents],
    *,
    world: World,
    limit: int | None = None,
    protected: Path | None = None,
    is_async: bool = False,
    report: Callable[[SaveReport], None] = lambda _: None,
) -> list[SaveReport]:
    """Saves checkpoints one after the other, as a run does; what was reported of each."""
    reports: list[SaveReport] = []

    def remember(saved: SaveReport) -> None:
        reports.append(saved)
        report(saved)

    saver = Saver(
        run,
        world=world,
        retention=Retention(limit=limit, protected=protected),
        is_async=is_async,
        report=remember,
        fail=fail,
    )
    for step in steps:
        saver.save(step, contents(saver.open_file))
    saver.wait()
    return reports


def tiny_contents(open_file: OpenFile, *, world: World, step: int = 3) -> Contents:
    """All kinds of files that a checkpoint has, each written as a run writes it.

    Weights and a moment of this rank, random states, JSON files, and a file that the first rank
    makes of another.
    """
    names = [f"model-{world.rank}", f"part-{world.rank}", f"{STATE_FOLDER}/moment-{world.rank}"]

    def write(folder: Path) -> list[PendingFiles]:
        writers = {}
        for index, name in enumerate(names):
            tensors = [(f"{name}.{key}", dtype, shape) for key, dtype, shape in TENSORS]
            with open_file(folder / f"{name}.safetensors", tensors) as writer:
                # The gatherer's buffer is used again for the next part.
                buffer = torch.empty(16, dtype=torch.uint8)
                for part in range(2):
                    writer.append(buffer.fill_(64 * index + 32 * part + step))
            writers[name] = writer

        def finish() -> list[WrittenFile]:
            written = {name: writer.written for name, writer in writers.items()}
            return [
                dataclasses.replace(file, name=f"{name}.safetensors")
                for name, file in written.items()
                if not name.startswith("part")
            ]

        states = {"cpu": torch.arange(16, dtype=torch.uint8)}
        pending: list[PendingFiles] = [finish]
        pending.append(lambda: [write_random_states(folder, states, world=world)])
        if world.is_first_rank:
            trainer = dataclasses.replace(TRAINER, step=step)
            pending.append(lambda: [write_trainer_state(folder, trainer)])
            pending.append(lambda: [write_json(folder, "args.json", {"step": step})])
        return pending

    def join(folder: Path) -> list[WrittenFile]:
        parts = sorted(folder.glob("part-*"))
        (folder / "joined.bin").write_bytes(b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
        return [record_file(folder, folder / "joined.bin")]

    return Contents(
        write=write, num_bytes=4096, source={"step": step}, folders=(STATE_FOLDER,), finish=join
    )
