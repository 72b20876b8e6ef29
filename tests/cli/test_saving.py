"""The lines and settings around a save; what is saved is tested in tests/test_resume.py."""

from pathlib import Path

from mtrain.checkpoint.saver import SaveReport
from mtrain.cli.saving import saved_line


def test_the_line_about_a_checkpoint_has_its_size_and_how_long_training_stood_still():
    report = SaveReport(
        folder=Path("out/checkpoint-9"),
        num_bytes=56_310_000_000,
        blocked_seconds=4.3,
        total_seconds=18.0,
    )
    assert saved_line(report) == (
        "saved out/checkpoint-9: 56.31 GB in 18.0 s (3.13 GB/s), training stood still for 4.3 s"
    )
