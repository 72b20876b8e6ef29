"""Prepares datasets once, into a cache that is found again by the contents of everything used.

The one thing to know: any number of processes may call `prepare_datasets` at the same time; one
does the work under a file lock, the others wait and then find it done. No collective is involved.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mtrain.config.data import DataConfig, TemplateConfig
from mtrain.config.dataset_name import DatasetName
from mtrain.data.cache import content_key, locked
from mtrain.data.encode import (
    Drop,
    Encoded,
    Encoder,
    EncodeSettings,
    encode_chunk,
    longest_position,
)
from mtrain.data.formats import Conversation
from mtrain.data.prefetch import map_ahead
from mtrain.data.report import PreparationReport, SplitReport, Tally
from mtrain.data.rows import BadRow
from mtrain.data.source import Source, conversations_of, open_source, sample_indices
from mtrain.data.storage import write_samples
from mtrain.data.without_torch import hide_torch

__all__ = ["PreparedData", "open_prepared", "prepare_datasets"]

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 512
# Written last.
_MARKER = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Folders for `TokenizedDataset`, and what happened."""

    train: Path
    validation: Path | None
    report: PreparationReport


_OpenSources = tuple[tuple[DatasetName, Source], ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The usable rows of a split, and how many lines were skipped on the way."""

    usable: list[Conversation]
    num_bad: int


def prepare_datasets(
    data: DataConfig,
    template: TemplateConfig,
    *,
    model_dir: Path,
    cache_dir: Path,
    show_progress: bool,
    use_hf: bool = False,
    hub_token: str | None = None,
) -> PreparedData:
    """Read, render, tokenise and store what the configuration names, or find it in the cache.

    With `load_from_cache_file` false it is made anew, unless another process did so after this
    call began.

    Args:
        data: Sources, split, and how rows are read.
        template: How conversations are rendered and cut.
        model_dir: Checkpoint folder; only its tokenizer files and config.json are used.
        cache_dir: Root of the cache, on a disk of this node (see `cache.default_cache_dir`).
        show_progress: Draw a progress bar on stderr.
        use_hf: Ids without hf:: or ms:: are Hugging Face's, not ModelScope's.
        hub_token: For private datasets.

    Raises:
        ValueError: A source, a row or the tokenizer is unusable, or no sample is left.
        RuntimeError: A hub cannot be reached.
    """
    started = time.time()
    settings = _encode_settings(data, template, model_dir)
    if not data.dataset:
        raise ValueError("--dataset is missing: give a file, a folder or a hub id")
    train, validation = (
        _open(values, data, use_hf=use_hf, hub_token=hub_token)
        for values in (data.dataset, data.val_dataset)
    )
    key = _cache_key(data, settings, train=train, validation=validation)
    folder = cache_dir / "prepared" / key
    marker = folder / _MARKER
    with locked(folder.with_suffix(".lock")):
        fresh_enough = marker.is_file() and (
            data.load_from_cache_file or marker.stat().st_mtime >= started
        )
        if fresh_enough:
            report = PreparationReport.read(marker)
        else:
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            rows = _split(_collect(train, data), _collect(validation, data), data)
            report = _prepare(
                rows, settings, partial, num_proc=data.dataset_num_proc, show_progress=show_progress
            )
            report.write(partial / marker.name)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return _prepared(folder, report)


def open_prepared(cache_dir: Path, key: str) -> PreparedData:
    """What `prepare_datasets` left in the cache under this name (that of its folder).

    Raises:
        ValueError: It is not there any more.
    """
    folder = cache_dir / "prepared" / key
    if not (folder / _MARKER).is_file():
        raise ValueError(f"{folder}: the prepared data are gone; start again to prepare them")
    return _prepared(folder, PreparationReport.read(folder / _MARKER))


def _prepared(folder: Path, report: PreparationReport) -> PreparedData:
    return PreparedData(
        train=folder / "train",
        validation=folder / "validation" if report.validation else None,
        report=report,
    )


def _encode_settings(data: DataConfig, template: TemplateConfig, model_dir: Path) -> EncodeSettings:
    max_length = template.max_length or longest_position(model_dir)
    if data.packing and data.packing_length is not None:
        max_length = min(max_length or data.packing_length, data.packing_length)
    return EncodeSettings(
        model_dir=model_dir,
        system=template.system,
        enable_thinking=template.enable_thinking,
        max_length=max_length,
        truncation_strategy=template.truncation_strategy,
    )


def _open(
    values: Sequence[str], data: DataConfig, *, use_hf: bool, hub_token: str | None
) -> _OpenSources:
    sources = []
    for value in values:
        name = DatasetName.parse(value, use_hf=use_hf)
        source = open_source(
            name, hub_token=hub_token, model_name=data.model_name, model_author=data.model_author
        )
        sources.append((name, source))
    return tuple(sources)


def _cache_key(
    data: DataConfig, settings: EncodeSettings, *, train: _OpenSources, validation: _OpenSources
) -> str:
    parts = {
        "settings": {**dataclasses.asdict(settings), "model_dir": None},
        "sources": [
            [[source.fingerprint(), name.count] for name, source in sources]
            for sources in (train, validation)
        ],
        "columns": dict(data.columns or {}),
        "split": [data.split_dataset_ratio, data.data_seed],
        "shuffle": [data.dataset_shuffle, data.val_dataset_shuffle],
        "skip_bad_lines": data.skip_bad_lines,
    }
    return content_key(parts, model_dir=settings.model_dir)


def _collect(sources: _OpenSources, data: DataConfig) -> _Rows:
    """Read the sources of a split and sample `#count` rows of each."""
    collected: list[Conversation] = []
    num_bad = 0
    for name, source in sources:
        usable: list[Conversation] = []
        for row in conversations_of(source, columns=data.columns):
            if isinstance(row, Conversation):
                usable.append(row)
                continue
            _skip_or_raise(row, skip=data.skip_bad_lines)
            num_bad += 1
        if not usable:
            raise ValueError(f"{name.path}: no usable row ({num_bad} bad lines)")
        indices = sample_indices(num_rows=len(usable), count=name.count, seed=data.data_seed)
        collected.extend(usable[index] for index in indices)
    return _Rows(collected, num_bad)


def _skip_or_raise(row: BadRow, *, skip: bool) -> None:
    if not skip:
        raise ValueError(f"{row} (--skip_bad_lines true leaves such rows out)")
    logger.warning("skipped %s", row)


def _split(train: _Rows, validation: _Rows, data: DataConfig) -> dict[str, _Rows]:
    """Shuffle as told and, without a validation set, split one off."""
    rng = np.random.default_rng(data.data_seed)
    rows, held_out = train.usable, validation.usable
    if data.dataset_shuffle:
        rows = [rows[index] for index in rng.permutation(len(rows))]
    if data.val_dataset_shuffle:
        held_out = [held_out[index] for index in rng.permutation(len(held_out))]
    if not held_out and data.split_dataset_ratio > 0:
        size = max(1, round(len(rows) * data.split_dataset_ratio))
        if size >= len(rows):
            raise ValueError(
                f"--split_dataset_ratio {data.split_dataset_ratio} leaves no training row "
                f"of {len(rows)}"
            )
        rows, held_out = rows[:-size], rows[-size:]
    splits = {"train": _Rows(rows, train.num_bad)}
    return {**splits, "validation": _Rows(held_out, validation.num_bad)} if held_out else splits


def _prepare(
    splits: dict[str, _Rows],
    settings: EncodeSettings,
    folder: Path,
    *,
    num_proc: int,
    show_progress: bool,
) -> PreparationReport:
    """Encode and store every split in a folder of its name."""
    started = time.monotonic()
    encoder = Encoder(settings)
    reports: dict[str, SplitReport] = {}
    for split, rows in splits.items():
        tally = Tally(rows=len(rows.usable), bad_rows=rows.num_bad)
        # None: where somebody watches, which is not the case in a log file.
        hidden = None if show_progress else True
        bar = tqdm(total=len(rows.usable), desc=f"Tokenising {split}", disable=hidden)
        with bar:
            chunks = _encoded_chunks(encoder, rows.usable, num_proc=num_proc)
            write_samples(folder / split, _counted(chunks, tally, bar))
        reports[split] = tally.report()
        if reports[split].kept == 0:
            raise ValueError(f"no {split} sample is left: {reports[split].summary()}")
    return PreparationReport(
        train=reports["train"],
        validation=reports.get("validation"),
        max_length=settings.max_length,
        pad_token_id=encoder.tokenizer.pad_token_id or 0,
        seconds=time.monotonic() - started,
        reused=False,
    )


def _counted(
    chunks: Iterator[list[Encoded | Drop]], tally: Tally, bar: tqdm
) -> Iterator[list[Encoded]]:
    for chunk in chunks:
        yield tally.add(chunk)
        bar.update(len(chunk))


def _encoded_chunks(
    encoder: Encoder, rows: Sequence[Conversation], *, num_proc: int
) -> Iterator[list[Encoded | Drop]]:
    chunks = [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
    # A worker takes seconds to start, about as long as it needs for eight chunks.
    num_proc = min(num_proc, len(chunks) // 8)
    if num_proc <= 1:
        # While the tokenizer library works on a chunk, Python renders the next one.
        with ThreadPoolExecutor(1) as executor:
            yield from map_ahead(executor, encoder.tokenise, map(encoder.render, chunks), ahead=2)
        return
    # Spawned, not forked: the tokenizer library runs threads, which do not survive a fork.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(num_proc, mp_context=spawn, initializer=hide_torch) as executor:
        tasks = ((encoder.settings, chunk) for chunk in chunks)
        yield from map_ahead(executor, encode_chunk, tasks, ahead=2 * num_proc)
