"""Times `megatron export` itself: formats, precision and loading, beside the raw rates of the disk.

    python benchmarks/convert.py --shape qwen3-8b --layers 25 --folder DIR --memory_limit 4GB

A random checkpoint of the shape is made in DIR, as a stream. Each step runs in a process of its
own, under the limit (RLIMIT_DATA). Before it, what it reads is dropped from the page cache; what it
writes is on disk when it ends, and so it is for the raw rates. At the end the tensors that went to
torch_dist and back are compared with the first ones.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES

from mtrain.bridge.convert import num_threads, write_weights
from mtrain.bridge.plan import Shape, hf_tensors, weight_table
from mtrain.bridge.sources import TensorShape
from mtrain.config.checkpoint import parse_byte_size
from mtrain.platform.device import prepare_megatron_files

HEADER = "| step | start-up s | work s | GB/s | of raw | peak anonymous GB | peak RSS GB | CPU s |"
STEPS = ("load", "to_mcore", "to_hf", "dtype")
_BLOCK_BYTES = 8 * 2**20
# Random values that all tensors are cut from, each at another place.
_POOL_SIZE = 64 * 2**20
_SAMPLE_SECONDS = 0.02
Words = tuple[str, ...]
Work = Callable[..., Callable[[], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a step took.

    Attributes:
        step: Which one.
        startup: Seconds until all was imported.
        seconds: Seconds of work.
        cpu_seconds: Processor time of the work, of all threads.
        anonymous_bytes: Most memory that was no page of a file.
        rss_bytes: Most memory with the pages of mapped files, which can be dropped any time.
        failure: What went wrong; empty if all is well.
    """

    step: str
    startup: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    anonymous_bytes: int = 0
    rss_bytes: int = 0
    failure: str = ""


class RandomWeights:
    """Random bfloat16 tensors (standard deviation 0.02), made when they are written."""

    def __init__(self, folder: Path, tensors: Mapping[str, Shape], *, pool_size: int) -> None:
        self.folder = folder
        self.tensors = {name: TensorShape("BF16", shape) for name, shape in tensors.items()}
        self._pool = torch.empty(pool_size, dtype=torch.bfloat16).normal_(std=0.02)

    @contextmanager
    def open(self) -> Iterator["RandomWeights"]:
        """Itself."""
        yield self

    def slices(self, name: str) -> "_RandomRows":
        """Gives rows of a tensor."""
        return _RandomRows(self._pool, name, self.tensors[name].shape)


class _RandomRows:
    def __init__(self, pool: torch.Tensor, name: str, shape: Shape) -> None:
        self._pool, self._name, self._shape = pool, name, shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        row_size = math.prod(self._shape[1:])
        count = (rows.stop - rows.start) * row_size
        first = zlib.crc32(self._name.encode()) + rows.start * row_size
        start = first % (len(self._pool) - count)
        return self._pool[start : start + count].view(-1, *self._shape[1:])


def make_checkpoint(folder: Path, config: dict[str, Any], *, max_shard_size: int) -> None:
    """Writes config.json and the weights, unless they are there."""
    text = json.dumps(config, indent=2)
    path = folder / "config.json"
    if path.is_file() and path.read_text() == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = hf_tensors(weight_table(config))
    largest_row = max(math.prod(shape[1:]) for shape in tensors.values())
    # Rows are asked for in blocks of a bounded size, or one by one if they are larger.
    weights = RandomWeights(folder, tensors, pool_size=_POOL_SIZE + 2 * largest_row)
    write_weights(weights, folder, max_shard_size=max_shard_size, rank=0, world_size=1)
    path.write_text(text)


def weight_files(folder: Path) -> list[Path]:
    """The files with tensors, of either format."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".distcp"))


def forget_cached(folder: Path) -> None:
    """Drops files from the page cache, where the system lets it."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_rates(source: Path, scratch: Path) -> dict[str, float]:
    """Bytes a second of plain reads, writes and both, on the files of a checkpoint.

    Args:
        source: The checkpoint.
        scratch: A folder to write in; it is removed again.
    """
    files = weight_files(source)
    num_bytes = sum(path.stat().st_size for path in files)
    rates = {"memory copy": _memory_copy_rate()}
    for name, work in (("read", _read), ("write", _write), ("file copy", _copy)):
        forget_cached(source)
        scratch.mkdir()
        start = time.perf_counter()
        with ThreadPoolExecutor(num_threads()) as threads:
            list(threads.map(functools.partial(work, scratch), files))
        rates[name] = num_bytes / (time.perf_counter() - start)
        shutil.rmtree(scratch)
    return rates


def _memory_copy_rate() -> float:
    """Of buffers that are larger than the caches, with torch's threads."""
    source = torch.ones(2**28, dtype=torch.uint8)
    target = torch.ones_like(source)
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    return 4 * source.numel() / (time.perf_counter() - start)


def _read(_: Path, path: Path) -> None:
    buffer = bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _write(scratch: Path, path: Path) -> None:
    block = os.urandom(_BLOCK_BYTES)
    with (scratch / path.name).open("wb") as file:
        for start in range(0, path.stat().st_size, _BLOCK_BYTES):
            file.write(memoryview(block)[: path.stat().st_size - start])
        file.flush()
        os.fsync(file.fileno())


def _copy(scratch: Path, path: Path) -> None:
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as source, (scratch / path.name).open("wb") as target:
        while count := source.readinto(buffer):
            target.write(buffer[:count])
        target.flush()
        os.fsync(target.fileno())


def measure(step: str, work: Work, limit: int | None, *words: str) -> Measured:
    """Runs one step in a new process.

    Args:
        step: Its name.
        work: Is called with `words` there to import and prepare; gives what is timed.
        limit: RLIMIT_DATA of the process, in bytes.
        words: What to do.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, step, work, limit, time.time(), words)
    process = context.Process(target=_run_measured, args=arguments)
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        result = Measured(step=step, failure="the process died")
    process.join()
    return result


def _run_measured(
    results: Connection, step: str, work: Work, limit: int | None, started: float, words: Words
) -> None:
    """The child: sets the limit, imports, works, and tells what it took."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        run = work(*words)
        peak = _AnonymousPeak()
        startup, start, cpu = time.time() - started, time.perf_counter(), time.process_time()
        with peak:
            run()
        measured = Measured(
            step=step,
            startup=startup,
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
            anonymous_bytes=peak.num_bytes,
            # Not ru_maxrss: a new process inherits that from its parent.
            rss_bytes=_status_bytes("VmHWM"),
        )
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        measured = Measured(step=step, failure=f"{type(error).__name__}: {error}")
    results.send(measured)


class _AnonymousPeak(threading.Thread):
    """Looks at the anonymous memory of this process again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_bytes = _status_bytes("RssAnon")
        self._done = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        """Until it is told to stop."""
        while not self._done.wait(_SAMPLE_SECONDS):
            self.num_bytes = max(self.num_bytes, _status_bytes("RssAnon"))


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def megatron(*words: str) -> Callable[[], None]:
    """The command; what it will import is imported now."""
    import mtrain.cli.export  # noqa: F401
    from mtrain.cli.main import main

    if "--to_mcore" in words:
        prepare_megatron_files(only=True)

    def run() -> None:
        if main(list(words)) != 0:
            raise RuntimeError(f"megatron {' '.join(words)} failed")

    return run


def load(model: str) -> Callable[[], None]:
    """Filling a model that is built already, on the GPU if there is one."""
    from mtrain.bridge.load import load_weights
    from mtrain.cli.joining import join, training_dtype
    from mtrain.cli.launch import Placement
    from mtrain.cli.loading import find_backend, load_model, start_parallel
    from mtrain.cli.parser import parse_config
    from mtrain.cli.preparation import open_export_inputs
    from mtrain.config import ExportConfig, TrainingConfig
    from mtrain.config.run import resolve_export

    words = ["--model", model, "--to_hf", "true", "--output_dir", f"{model}-unused"]
    config = resolve_export(parse_config(ExportConfig, words))
    backend = find_backend(config)
    source, _ = open_export_inputs(config, world_size=1)
    state = start_parallel(config, join(config, Placement()), seed=0)
    dtype, training = training_dtype(config.model, source.hf_config), TrainingConfig()
    chunks = load_model(config, source, state, backend=backend, training=training, dtype=dtype)
    forget_cached(Path(model))

    def run() -> None:
        weights, layout = source.weights, state.layout
        load_weights(chunks, weights, table=source.table, layout=layout, rank=0, backend=backend)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def run_steps(arguments: argparse.Namespace, folder: Path) -> Iterator[Measured]:
    """Runs the steps that were asked for; what is no longer needed is removed meanwhile."""
    limit = arguments.memory_limit
    hf, mcore, back, other = (folder / name for name in ("hf", "mcore", "hf-again", "float16"))
    wanted = arguments.steps

    def export(step: str, source: Path, target: Path, *words: str) -> Measured:
        shutil.rmtree(target, ignore_errors=True)
        forget_cached(source)
        return measure(step, megatron, limit, "export", *words, "--output_dir", str(target))

    if "load" in wanted:
        yield measure("load", load, limit, str(hf))
    if "to_mcore" in wanted:
        yield export("to_mcore", hf, mcore, "--model", str(hf), "--to_mcore", "true")
    if "to_hf" in wanted:
        yield export("to_hf", mcore, back, "--mcore_model", str(mcore), "--to_hf", "true")
        forget_cached(hf)
        yield measure("verify", megatron, limit, "verify", str(hf), str(back))
    if not arguments.keep:
        shutil.rmtree(mcore, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)
    if "dtype" in wanted:
        words = ("--model", str(hf), "--to_hf", "true", "--torch_dtype", "float16")
        yield export("dtype", hf, other, *words)


def table_row(measured: Measured, rates: Mapping[str, float], num_bytes: int) -> str:
    """The row of one step; its rate is that of the raw work that it is compared with."""
    if measured.failure:
        return f"| {measured.step} | {measured.failure} |"
    raw = {"load": "read", "verify": "read"}.get(measured.step, "file copy")
    # Both checkpoints are read to compare them.
    rate = (2 if measured.step == "verify" else 1) * num_bytes / measured.seconds
    return (
        f"| {measured.step} | {measured.startup:.1f} | {measured.seconds:.1f} | {rate / 1e9:.2f} "
        f"| {100 * rate / rates[raw]:.0f} % of {raw} | {measured.anonymous_bytes / 1e9:.2f} "
        f"| {measured.rss_bytes / 1e9:.2f} | {measured.cpu_seconds:.1f} |"
    )


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="How many, instead of those of the shape.")
    parser.add_argument("--sizes", type=json.loads, default={}, help="More of config.json, as JSON")
    parser.add_argument("--folder", type=Path, help="Where files are made; room for four models.")
    steps = STEPS if torch.cuda.is_available() else STEPS[1:]
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=steps)
    parser.add_argument("--max_shard_size", type=parse_byte_size, default="5GB")
    parser.add_argument("--memory_limit", type=parse_byte_size, help="Such as 4GB; default: none.")
    parser.add_argument("--keep", action="store_true", help="Leave all files where they are.")
    parser.add_argument("--json", type=Path, help="Write the numbers here.")
    return parser.parse_args()


def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Makes the checkpoint, runs the steps and prints the table; 1 if one failed."""
    config = {**SHAPES[arguments.shape], **arguments.sizes}
    if arguments.layers is not None:
        config["num_hidden_layers"] = arguments.layers
    make_checkpoint(folder / "hf", config, max_shard_size=arguments.max_shard_size)
    num_bytes = sum(path.stat().st_size for path in weight_files(folder / "hf"))
    rates = raw_rates(folder / "hf", folder / "raw")
    rows = [f"| raw {name} | | | {rate / 1e9:.2f} | | | | |" for name, rate in rates.items()]
    results = []
    for measured in run_steps(arguments, folder):
        results.append(measured)
        rows.append(table_row(measured, rates, num_bytes))
        # Now too, because the steps that follow may be cut short.
        print(rows[-1], flush=True)
    print(f"{num_bytes / 1e9:.2f} GB, {num_threads()} threads")
    print("\n".join([HEADER, "|" + "---|" * HEADER.count(" |"), *rows]))
    if arguments.json is not None:
        content = {"num_bytes": num_bytes, "rates": rates, "steps": [asdict(m) for m in results]}
        arguments.json.write_text(json.dumps(content, indent=2))
    return int(any(measured.failure for measured in results))


def main() -> int:
    """Runs the benchmark in its folder."""
    arguments = read_arguments()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.keep:
        return run(arguments, arguments.folder or Path.cwd())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return run(arguments, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
