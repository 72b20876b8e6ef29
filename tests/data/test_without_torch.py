"""A process that only prepares data does without torch; each test is a process of its own."""

import subprocess
import sys
from pathlib import Path

from tests.data.tiny_tokenizer import CHATML, save_tokenizer

ROOT = Path(__file__).parents[2]

ENCODE = """
import sys
from pathlib import Path
from mtrain.data.without_torch import hide_torch
if sys.argv[2] == "hidden":
    hide_torch()
from mtrain.data.encode import Encoder, EncodeSettings
from mtrain.data.formats import Conversation
from mtrain.data.rows import Place
settings = EncodeSettings(
    model_dir=Path(sys.argv[1]),
    system=None,
    enable_thinking=None,
    max_length=None,
    truncation_strategy="delete",
)
messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
conversation = Conversation(Place("f", 1), messages)
(encoded,) = Encoder(settings).encode([conversation])
print(encoded.input_ids.tolist(), encoded.labels.tolist())
print(sys.modules.get("torch") is not None)
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_samples_are_the_same_and_nothing_is_said(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, CHATML)
    done = [run(ENCODE, str(tmp_path), how) for how in ("hidden", "there")]
    assert [process.stderr for process in done] == ["", ""]
    (ids, has_torch), (expected, had_torch) = (process.stdout.splitlines() for process in done)
    assert ids == expected
    assert (has_torch, had_torch) == ("False", "True")


def test_a_process_that_has_torch_keeps_it() -> None:
    code = (
        "import torch; from mtrain.data.without_torch import hide_torch; hide_torch(); "
        "import sys; assert sys.modules['torch'] is torch"
    )
    assert run(code).returncode == 0


def test_hubs_can_be_asked_without_torch() -> None:
    code = (
        "from mtrain.data.without_torch import hide_torch; hide_torch(); import datasets; "
        "from modelscope import snapshot_download; "
        "from modelscope.hub.snapshot_download import dataset_snapshot_download; "
        "from huggingface_hub import snapshot_download"
    )
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")
