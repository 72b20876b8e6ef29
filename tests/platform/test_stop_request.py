"""Requests to save and end: from signals, from the launcher, and those that cannot wait."""

import os
import signal
import time
from pathlib import Path

import pytest

from mtrain.platform.node_notes import NodeNotes
from mtrain.platform.signals import STOP_SIGNALS
from mtrain.platform.stop_request import StopRequest
from tests.platform.test_signals import finish, start

REQUEST = """
from pathlib import Path
from mtrain.platform.node_notes import NodeNotes
from mtrain.platform.stop_request import StopRequest
"""


def wait_for(stop: StopRequest) -> int:
    deadline = time.monotonic() + 30
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.requested


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_a_request_and_nothing_else(signum: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.requested == 0
        os.kill(os.getpid(), signum)
        assert wait_for(stop) == signum
        # A copy, as from `timeout`, changes nothing.
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested == signum


def test_the_launcher_asks_in_the_folder(tmp_path: Path) -> None:
    folder = NodeNotes(tmp_path)
    with StopRequest(tmp_path) as stop:
        assert folder.is_training()
        assert stop.requested == 0
        folder.ask_to_stop(signal.SIGUSR1)
        assert wait_for(stop) == signal.SIGUSR1
    assert not folder.is_training()


def test_a_second_signal_ends_the_process_wherever_it_waits() -> None:
    process = start(
        REQUEST
        + """
signals.COPY_SECONDS = 0.2
with StopRequest() as stop:
    def tell():
        import time
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(signals.COPY_SECONDS)
        print("requested", flush=True)
    threading.Thread(target=tell, daemon=True).start()
    wait_in_c()
"""
    )
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "requested\n"
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert err == "megatron: ended at once by a second SIGTERM\n"


@pytest.mark.parametrize(
    "failure",
    [
        "folder.claim_failure()",
        # Killed while it trained, so it could not say so.
        "os.fork() or (folder.note_training(), os._exit(0)); os.wait()",
    ],
    ids=["reported", "killed"],
)
def test_torchrun_may_end_a_rank_after_another_one_failed(failure: str, tmp_path: Path) -> None:
    process = start(
        REQUEST
        + f"""
folder = NodeNotes(Path({str(tmp_path)!r}))
with StopRequest(folder.path) as stop:
    {failure}
    wait_in_c()
"""
    )
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert err == "megatron: ended by SIGTERM after another rank failed\n"
