"""Rows and tokens per second of data preparation, beside the `tokenizers` library alone.

    python benchmarks/tokenizing.py --data FILE ... --tokenizer FOLDER [--num_proc 1 2]

Preparation is what `megatron sft` does: rows are read, rendered with the chat template, tokenised,
labelled and written to a cache. The library gets the rendered texts of the same rows and as many
threads as there are processes; it starts one thread in each process of ours, beside Python's.
Rows of the files are repeated, each time with a few new words, so that not every word is one that
the tokenizer remembers. Every measurement is a process of its own. What it imports first is not
counted; what its workers import is.
"""

import argparse
import json
import os
import random
import resource
import string
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HEADER = "| what | processes | rows/s | tokens/s | seconds | CPU s |"
BATCH = 512


@dataclass(frozen=True, slots=True)
class Result:
    """What one measurement did."""

    tokens: int
    seconds: float
    cpu_seconds: float


def varied(paths: list[Path], count: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Rows of the files in turn, with words at the end of the first text that nobody wrote."""
    chance = random.Random(0)
    tables = [(path, json.loads(path.read_text("utf-8"))) for path in paths]
    rows = [(path, row) for path, table in tables for row in table]
    for index in range(count):
        path, row = rows[index % len(rows)]
        words = ("".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(3))
        yield path, with_words(row, " ".join(words))


def with_words(row: dict[str, Any], words: str) -> dict[str, Any]:
    """The row with more words in the first thing that the user says."""
    key = next((key for key in ("messages", "conversations") if key in row), None)
    if key is None:
        text = next(key for key in ("instruction", "query", "text") if key in row)
        return {**row, text: f"{row[text]} {words}"}
    first, *others = row[key]
    text = "value" if "value" in first else "content"
    return {**row, key: [{**first, text: f"{first[text]} {words}"}, *others]}


def write_rows(paths: list[Path], count: int, folder: Path) -> list[Path]:
    """A file of lines for every file, `count` rows in all."""
    outputs = {path: (folder / path.name).with_suffix(".jsonl") for path in paths}
    files = {path: output.open("w", encoding="utf-8") for path, output in outputs.items()}
    for path, row in varied(paths, count):
        files[path].write(json.dumps(row, ensure_ascii=False) + "\n")
    for file in files.values():
        file.close()
    return [path for path in outputs.values() if path.stat().st_size]


def prepare(paths: list[Path], tokenizer: Path, folder: Path, num_proc: int) -> Result:
    """Prepares the files as `megatron sft` does; in a process of its own."""
    from mtrain.config.data import DataConfig, TemplateConfig
    from mtrain.data.template import load_tokenizer
    from mtrain.data.tokenize import prepare_datasets

    load_tokenizer(tokenizer)
    settings = DataConfig(dataset=tuple(map(str, paths)), dataset_num_proc=num_proc)

    def work() -> int:
        folders = {"model_dir": tokenizer, "cache_dir": folder / f"cache-{num_proc}"}
        data = prepare_datasets(settings, TemplateConfig(), **folders, show_progress=False)
        assert data.report.train.kept == data.report.train.rows, data.report.train.summary()
        return data.report.train.tokens

    return timed(work)


def encode(texts_path: Path, tokenizer: Path) -> Result:
    """Encodes texts with the library alone; in a process of its own."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [json.loads(line) for line in texts_path.read_text("utf-8").splitlines()]

    def work() -> int:
        batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        encoded = (library.encode_batch(batch, add_special_tokens=False) for batch in batches)
        return sum(len(encoding.ids) for batch in encoded for encoding in batch)

    return timed(work)


def timed(work: Callable[[], int]) -> Result:
    """Seconds on the clock and of all processors, workers included, until it returns tokens."""
    started, cpu = time.perf_counter(), cpu_seconds()
    tokens = work()
    return Result(tokens, time.perf_counter() - started, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(who) for who in both]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def render(paths: list[Path], tokenizer: Path, output: Path) -> None:
    """Writes the texts that preparation tokenises, one a line, as JSON; in a process of its own."""
    from mtrain.data.formats import read_conversations
    from mtrain.data.rows import read_rows
    from mtrain.data.template import ChatTemplate, load_tokenizer

    template = ChatTemplate(load_tokenizer(tokenizer))
    with output.open("w", encoding="utf-8") as file:
        for path in paths:
            for conversation in read_conversations(read_rows(path)):
                file.write(json.dumps(template.render(conversation).text) + "\n")


def apart(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """Calls it in a fresh process whose tokenizer has so many threads."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def table_row(what: str, num_proc: int, rows: int, result: Result) -> str:
    """A row of the table."""
    rates = f"{rows / result.seconds:,.0f} | {result.tokens / result.seconds:,.0f}"
    return f"| {what} | {num_proc} | {rates} | {result.seconds:.1f} | {result.cpu_seconds:.1f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, type=Path, help="JSON arrays.")
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--num_proc", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    lines = [HEADER, "|" + "---|" * HEADER.count(" |")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_rows(options.data, options.rows, folder)
        texts = folder / "texts"
        apart(render, paths, options.tokenizer, texts, threads=1)
        for num_proc in options.num_proc:
            # The threads of the library are shared out among the workers.
            ours = apart(prepare, paths, options.tokenizer, folder, num_proc, threads=1)
            bare = apart(encode, texts, options.tokenizer, threads=num_proc)
            assert ours.tokens == bare.tokens, (ours, bare)
            lines.append(table_row("prepare", num_proc, options.rows, ours))
            lines.append(table_row("tokenizers alone", num_proc, options.rows, bare))
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
