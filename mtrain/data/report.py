"""What preparation did with every row, counted while the samples pass by.

The one thing to know: no row disappears without a count; the counts are stored beside the samples,
so a dataset that comes out of the cache reports the same as when it was made.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtrain.data.encode import Drop, Why
from mtrain.data.storage import IGNORED, Encoded

__all__ = ["PreparationReport", "SplitReport", "Tally"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """What became of the rows of one split.

    `rows` counts the usable ones after `#count` and the split, `bad_rows` those skipped before.
    `rows == kept + too_long + refused + no_label`; `truncated` ones are kept.
    """

    rows: int
    kept: int
    too_long: int
    truncated: int
    refused: int
    no_label: int
    bad_rows: int
    tokens: int
    label_tokens: int
    longest: int
    max_token_id: int
    refusals: dict[str, int]

    def summary(self) -> str:
        """One line for a person."""
        dropped = {
            "too long": self.too_long,
            f"refused ({self._most_frequent_refusals()})": self.refused,
            "without a label": self.no_label,
            "bad lines": self.bad_rows,
        }
        parts = [f"{self.kept:,} of {self.rows:,} rows kept"]
        parts += [f"{count:,} {what}" for what, count in dropped.items() if count]
        parts += [f"{self.truncated:,} truncated"] if self.truncated else []
        parts += [f"{self.tokens:,} tokens, {self.label_tokens:,} with loss"]
        parts += [f"longest {self.longest:,}"]
        return "; ".join(parts)

    def _most_frequent_refusals(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in list(self.refusals.items())[:3])


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationReport:
    """Counts of both splits and the limits that were used."""

    train: SplitReport
    validation: SplitReport | None
    max_length: int | None
    pad_token_id: int
    seconds: float
    reused: bool

    def write(self, path: Path) -> None:
        """Store as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "PreparationReport":
        """Load what `write` stored; `reused` is then true."""
        values = json.loads(path.read_text(encoding="utf-8"))
        train, validation = values.pop("train"), values.pop("validation")
        return cls(
            **{**values, "reused": True},
            train=SplitReport(**train),
            validation=SplitReport(**validation) if validation else None,
        )


class Tally:
    """Counts what passes by on its way to the disk."""

    def __init__(self, *, rows: int, bad_rows: int) -> None:
        self.counts: Counter[str] = Counter(rows=rows, bad_rows=bad_rows)
        self.refusals: Counter[str] = Counter()
        self._longest = self._max_token_id = 0

    def add(self, results: Sequence[Encoded | Drop]) -> list[Encoded]:
        """Count results and hand on the samples among them."""
        kept = []
        for result in results:
            if isinstance(result, Drop):
                self.counts[result.why.name.lower()] += 1
                if result.why is Why.REFUSED:
                    self.refusals[result.reason] += 1
                continue
            kept.append(result)
            self.counts["kept"] += 1
            self.counts["truncated"] += result.truncated
            self.counts["tokens"] += len(result.input_ids)
            self.counts["label_tokens"] += int(np.count_nonzero(result.labels != IGNORED))
            self._longest = max(self._longest, len(result.input_ids))
            self._max_token_id = max(self._max_token_id, int(result.input_ids.max()))
        return kept

    def report(self) -> SplitReport:
        """The counts so far."""
        return SplitReport(
            **{
                field.name: self.counts[field.name]
                for field in dataclasses.fields(SplitReport)
                if field.name not in ("longest", "max_token_id", "refusals")
            },
            longest=self._longest,
            max_token_id=self._max_token_id,
            refusals=dict(self.refusals.most_common(10)),
        )
