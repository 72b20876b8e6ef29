import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtrain.platform import device


def test_the_peak_of_a_known_gpu_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert device.device_info() == device.DeviceInfo(name="NVIDIA H200", peak_flops=989e12)


def test_an_unknown_gpu_has_no_peak(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert device.device_info().peak_flops is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_everything_is_on_the_cpu_with_gloo():
    assert device.training_device(0).type == "cpu"
    assert device.collective_backend() == "gloo"
    assert not device.has_transformer_engine()


_PREPARE = """
import sys
from mtrain.platform.device import prepare_megatron_files
prepare_megatron_files(only=True)
import megatron.core.dist_checkpointing
print(*(name for name in ("megatron.core.models.gpt", "torch._dynamo") if name in sys.modules))
"""


def test_where_no_model_will_follow_megatron_comes_without_layers(tmp_path) -> None:
    """Nor does it find Transformer Engine, where that is installed."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("print('was imported')")
    done = subprocess.run(
        [sys.executable, "-c", _PREPARE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "\n", done.stderr
