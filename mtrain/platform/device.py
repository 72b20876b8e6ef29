"""Which device this process trains on, and Megatron-Core made ready for it.

Call `prepare_megatron()` before the first import of `megatron.core`; the packages that import it
(`mtrain.model`, `mtrain.training`) do so in their `__init__`. What only needs its checkpoint format
calls `prepare_megatron_files()`.
"""

import contextlib
import functools
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mtrain.platform import cpu
from mtrain.platform.weight_gradients import install_weight_gradients

# Dense bf16 peaks of the data sheets, in FLOP/s, by a part of the device name; the first that
# matches counts, so longer names come first.
_PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the training log says about the device.

    Attributes:
        name: The device's name, "cpu" without a GPU.
        peak_flops: Dense bf16 peak in FLOP/s, None where it is not known.
    """

    name: str
    peak_flops: float | None


def has_gpu() -> bool:
    """Whether this process can use a CUDA device."""
    return torch.cuda.is_available()


@functools.cache
def has_triton() -> bool:
    """Whether kernels written in Triton can run."""
    return has_gpu() and importlib.util.find_spec("triton") is not None


def training_device(local_rank: int) -> torch.device:
    """The device of the process with this rank on its machine, made current."""
    if not has_gpu():
        return cpu.CPU
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def collective_backend(device: torch.device | None = None) -> str:
    """The `torch.distributed` backend for a device: nccl for a GPU, otherwise gloo.

    Args:
        device: The device; None for the one that is trained on.
    """
    is_gpu = has_gpu() if device is None else device.type == "cuda"
    return "nccl" if is_gpu else "gloo"


def device_info() -> DeviceInfo:
    """Name and known peak of the current device."""
    if not has_gpu():
        return DeviceInfo(name="cpu", peak_flops=None)
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in _PEAK_BF16_FLOPS if part in name), None)
    return DeviceInfo(name=name, peak_flops=peak)


@functools.cache
def prepare_megatron() -> None:
    """Imports Megatron-Core quietly, with CPU stand-ins where there is no GPU.

    Its warnings about missing apex and Transformer Engine say nothing to a user of mtrain: both
    are optional here and the chosen backend is printed at start.
    """
    with _quiet_import(), contextlib.nullcontext() if has_gpu() else cpu.eager_fusions():
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules  # noqa: F401
    cpu.mend_megatron()
    install_weight_gradients()


def prepare_megatron_files(*, only: bool = False) -> None:
    """Imports what writes Megatron-Core's checkpoints; its models may follow.

    Args:
        only: None will: then neither Transformer Engine nor torch's compiler is imported, which is
            half of the time. A model would be without both.
    """
    if "megatron.core" in sys.modules:
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_import())
        if only or not has_gpu():
            stack.enter_context(cpu.eager_fusions())
        if only:
            stack.enter_context(cpu.hidden_module("transformer_engine"))
        import megatron.core.dist_checkpointing  # noqa: F401


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    cpu.install_cpu_stand_ins()
    for name in ("megatron.core", "megatron.core.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Later too: they speak to developers of Megatron-Core, once a rank.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", module=r"torch\.distributed", category=FutureWarning)
    # For timers that we do not use; it takes a third of a second.
    with cpu.hidden_module("torch.utils.tensorboard"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported and used on this device."""
    if not has_gpu():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True
