"""What the launcher does with a signal; with real ranks in test_launch.py."""

import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest

from mtrain.cli.rank_signals import RankSignals
from mtrain.platform import signals
from mtrain.platform.node_notes import NodeNotes


class Ended(Exception):
    """Raised where the wait for the ranks would be left."""


def end_ranks(signum: int) -> NoReturn:
    raise Ended(signal.Signals(signum).name)


@pytest.fixture
def folder(tmp_path: Path) -> NodeNotes:
    return NodeNotes(tmp_path)


def test_ranks_that_train_are_asked(folder: NodeNotes, capsys) -> None:
    folder.note_training()
    with RankSignals(folder, end_ranks=end_ranks) as ranks:
        os.kill(os.getpid(), signal.SIGUSR1)
        # A copy of it.
        os.kill(os.getpid(), signal.SIGTERM)
    assert folder.asked_to_stop() == signal.SIGUSR1
    assert ranks.ended_by is None
    assert capsys.readouterr().err.count("SIGUSR1: saving after this step") == 1


def test_a_second_request_kills(folder: NodeNotes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.note_training()
    with RankSignals(folder, end_ranks=end_ranks) as ranks:
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.setattr(signals, "COPY_SECONDS", 0.0)
        with pytest.raises(Ended, match="SIGKILL"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert ranks.ended_by.signum == signal.SIGTERM
    assert ranks.ended_by.at_once


def test_ranks_that_do_not_train_are_ended_and_leave_the_line_to_the_launcher(
    folder: NodeNotes,
) -> None:
    with (
        RankSignals(folder, end_ranks=end_ranks) as ranks,
        pytest.raises(Ended, match="SIGTERM"),
    ):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ranks.ended_by.signum == signal.SIGUSR1
    assert not ranks.ended_by.at_once
    assert not folder.claim_failure()
