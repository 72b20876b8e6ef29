"""How fast and how full rows are planned, from lengths alone, on one core.

    python benchmarks/packing.py [--data FILE ... --tokenizer FOLDER] [--samples 1000000]

Lengths are drawn from a Zipf distribution, and with `--data` also from the tokens of real
conversations: with replacement. Planning includes the shuffle.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mtrain.data.packing import plan_packs

ROW_LENGTHS = (2048, 8192)


def zipf_lengths(rng: np.random.Generator, count: int, longest: int) -> np.ndarray:
    """Lengths whose frequency falls with their rank; at most a row."""
    return np.minimum(rng.zipf(1.3, count), longest - 15) + 15


def real_lengths(paths: list[Path], tokenizer_folder: Path) -> np.ndarray:
    """Tokens of the texts of each record, without the words of a template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = []
    for path in paths:
        for record in json.loads(path.read_text(encoding="utf-8")):
            values = record.get("messages") or record.get("conversations") or [record]
            texts.append(" ".join(str(part) for turn in values for part in turn.values()))
    return np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])


def measure(name: str, lengths: np.ndarray, row_length: int) -> str:
    """One row of the table: seconds to plan, and the share of the rows that is filled."""
    started = time.perf_counter()
    units = plan_packs(
        lengths, packing_length=row_length, strategy="binpack", shuffle=True, seed=0, epoch=0
    )
    seconds = time.perf_counter() - started
    filled = lengths.sum() / (len(units) * row_length)
    assert np.array_equal(np.sort(units.sample_ids), np.arange(len(lengths)))
    return f"| {name} | {row_length:,} | {len(units):,} | {seconds:.2f} | {filled:.3%} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", type=Path, default=[])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| lengths | tokens of a row | rows | seconds | filled |")
    print("|---|---|---|---|---|")
    real = real_lengths(options.data, options.tokenizer) if options.data else None
    for row_length in ROW_LENGTHS:
        print(measure("Zipf", zipf_lengths(rng, options.samples, row_length), row_length))
        if real is not None:
            drawn = rng.choice(np.minimum(real, row_length), options.samples)
            print(measure("real", drawn, row_length))


if __name__ == "__main__":
    main()
