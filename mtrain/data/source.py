"""Finds what a value of `--dataset` names and yields its rows.

The one thing to know: a source is opened before it is read, because its fingerprint (a hash of the
contents) is part of the cache key; a prepared dataset is then found again without reading rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mtrain.config.dataset_name import DatasetName
from mtrain.data.formats import Conversation, read_conversations
from mtrain.data.rows import SUFFIXES, BadRow, Place, Row, read_rows
from mtrain.data.self_cognition import self_cognition_rows

if TYPE_CHECKING:
    import datasets

__all__ = ["Source", "conversations_of", "open_source", "sample_indices"]

SELF_COGNITION = "swift/self-cognition"


class Source(Protocol):
    """Something opened, with parts (files) that each have one layout."""

    def fingerprint(self) -> str:
        """Changes whenever the rows change."""

    def parts(self) -> Iterator[Iterator[Row | BadRow]]:
        """Rows, file by file."""


def _hash_files(paths: Iterable[Path]) -> str:
    """Hash contents and suffixes, not names or times: a copied dataset is the same dataset."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.suffix.lower().encode())
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _LocalFiles:
    files: tuple[Path, ...]

    def fingerprint(self) -> str:
        return _hash_files(self.files)

    def parts(self) -> Iterator[Iterator[Row | BadRow]]:
        return (read_rows(path) for path in self.files)


@dataclass(frozen=True, slots=True)
class _HubDataset:
    name: DatasetName
    dataset: "datasets.Dataset"

    def fingerprint(self) -> str:
        return _hash_files(Path(file["filename"]) for file in self.dataset.cache_files)

    def parts(self) -> Iterator[Iterator[Row | BadRow]]:
        yield _numbered(self.name.path, self.dataset)


@dataclass(frozen=True, slots=True)
class _SelfCognition:
    rows: tuple[dict[str, str], ...]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(list(self.rows)).encode()).hexdigest()

    def parts(self) -> Iterator[Iterator[Row | BadRow]]:
        yield _numbered(SELF_COGNITION, self.rows)


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, columns in enumerate(rows, start=1):
        yield Row(Place(name, number, "row"), dict(columns))


def open_source(
    name: DatasetName,
    *,
    hub_token: str | None = None,
    model_name: Sequence[str] = (),
    model_author: Sequence[str] = (),
) -> Source:
    """Find the files of a source, downloading a hub dataset if it is not in the hub's cache.

    Args:
        name: What to open.
        hub_token: Token for private datasets.
        model_name: One name, or a Chinese and an English one, for swift/self-cognition.
        model_author: Likewise, who made the model.

    Raises:
        ValueError: There is nothing to read at that place.
        RuntimeError: The hub cannot be reached or refuses.
    """
    if name.path == SELF_COGNITION and name.hub is not None:
        if not model_name or not model_author:
            raise ValueError(
                f"--dataset {SELF_COGNITION} needs --model_name and --model_author "
                "(one value, or two: Chinese and English)"
            )
        return _SelfCognition(tuple(self_cognition_rows(names=model_name, authors=model_author)))
    if name.hub is not None:
        return _HubDataset(name, _load_from_hub(name, hub_token=hub_token))
    path = Path(name.path)
    if path.is_file():
        return _LocalFiles((path,))
    files = tuple(
        sorted(
            found
            for found in path.rglob("*")
            if found.suffix.lower() in SUFFIXES and not found.name.startswith(".")
        )
    )
    if not files:
        raise ValueError(f"--dataset {path}: the folder holds no {', '.join(SUFFIXES)} file")
    return _LocalFiles(files)


def _load_from_hub(name: DatasetName, *, hub_token: str | None) -> "datasets.Dataset":
    import datasets

    try:
        location = name.path
        if name.hub == "ms":
            from modelscope.hub.snapshot_download import dataset_snapshot_download

            # ModelScope's dataset folders are laid out like Hugging Face's, so one reader serves
            # both, and no script of the dataset is ever run.
            location = dataset_snapshot_download(name.path, token=hub_token)
        return datasets.load_dataset(
            location,
            name=name.subset,
            split="train",
            token=hub_token if name.hub == "hf" else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        site = "Hugging Face" if name.hub == "hf" else "ModelScope"
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"--dataset {name.path}: cannot load it from {site} ({reason}); check the id, the "
            "network and --use_hf, or pass a local file"
        ) from error


def conversations_of(
    source: Source, *, columns: Mapping[str, str] | None
) -> Iterator[Conversation | BadRow]:
    """All parts of a source, normalised, in order."""
    for rows in source.parts():
        yield from read_conversations(rows, columns=columns)


def sample_indices(*, num_rows: int, count: int | None, seed: int) -> np.ndarray:
    """Which rows `#count` takes, int64 [count], in file order.

    More than there are: every row once per full cycle, the rest drawn without replacement.
    """
    if count is None or num_rows == 0:
        return np.arange(num_rows)
    cycles, rest = divmod(count, num_rows)
    drawn = np.random.default_rng(seed).permutation(num_rows)[:rest]
    return np.concatenate([*([np.arange(num_rows)] * cycles), np.sort(drawn)])
