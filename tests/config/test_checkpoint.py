"""Sizes of files are read as people write them."""

import pytest

from mtrain.config.checkpoint import CheckpointConfig, parse_byte_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5 gb", 1_500_000_000),
        ("2GiB", 2 * 2**30),
        ("10KB", 10_000),
        ("12345", 12345),
    ],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_byte_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "5TB", "-1GB", "0", "0GB", "5GBs"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as 5GB or 500MB"):
        parse_byte_size(text)


def test_the_default_is_five_gigabytes() -> None:
    assert CheckpointConfig().max_shard_bytes == 5_000_000_000
