"""Stand-ins that let Megatron-Core run without a GPU and without Transformer Engine.

Megatron-Core 0.16.1 names CUDA outright: `torch.cuda.current_device()`, `device="cuda"`, streams,
CUDA random states, `'torch.cuda.FloatTensor'`; and in two places it uses names that only exist when
Transformer Engine is installed. Beside `weight_gradients` this file, and the two `cpu_*` ones that
it calls, are the one place that patches other libraries. Where there is a GPU with Transformer
Engine it changes nothing.
Each stand-in says which call needs it; the rest of mtrain asks `mtrain.platform.device`.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from mtrain.platform.cpu_collectives import exchange_directly
from mtrain.platform.cpu_speed import (
    keep_freed_memory,
    leave_out_the_compiler,
    share_lonely_threads,
    shorten_swiglu,
    skip_lonely_collectives,
)

CPU = torch.device("cpu")
# Creation functions that megatron-core calls with device="cuda" or torch.cuda.current_device().
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "eye")


class _Stream:
    """A CUDA stream that has nothing to order: CPU work is done when the call returns."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    """A CUDA event that is always complete."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def record(self, _stream: object = None) -> None: ...

    def wait(self, _stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@functools.cache
def install_cpu_stand_ins() -> None:
    """Replaces the CUDA calls that Megatron-Core makes; does nothing where there is a GPU.

    Call it before `megatron.core` is imported. Calling it again changes nothing.
    """
    if torch.cuda.is_available():
        return
    _replace_device_queries()
    _replace_streams()
    _replace_random_state()
    _replace_placement()


def _replace_device_queries() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "ipc_collect",
    ):
        setattr(cuda, name, lambda *_args, **_kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *_args, **_kwargs: 0)
    properties = SimpleNamespace(major=0, minor=0, name="cpu", multi_processor_count=1)
    cuda.get_device_properties = lambda *_args: properties
    cuda.get_device_capability = lambda *_args: (0, 0)


def _replace_streams() -> None:
    """Streams, events and NVTX ranges: DDP buckets, the token dispatcher, the attention layer."""
    cuda = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_args: _Stream()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_args: None
    torch.Tensor.record_stream = lambda _tensor, _stream: None


class _Generators:
    """`torch.cuda.default_generators`: whatever the device, it is the CPU generator."""

    def __getitem__(self, _device: object) -> torch.Generator:
        return torch.default_generator


def _replace_random_state() -> None:
    """The tensor-parallel RNG tracker (dropout, recompute) then forks the CPU generator."""
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.default_generator.get_state()
        module.set_rng_state = lambda state, device=None: torch.default_generator.set_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = module.manual_seed
    torch.cuda.default_generators = _Generators()
    # set_rng_state of the tracker defers to a queued call on CUDA; here it can run at once.
    torch.cuda._lazy_call = lambda call, **_kwargs: call()


def _replace_placement() -> None:
    """`.cuda()`, `.to("cuda")`, `device="cuda"`, and the type names the optimizers compare."""
    # `with torch.device(...)`, by which transformers builds models, recognises creation functions
    # by identity and remembers them at its first use: let that be before they are wrapped.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to)
    torch.Tensor.cuda = lambda tensor, *_args, **_kwargs: tensor
    torch.nn.Module.cuda = lambda module, *_args, **_kwargs: module
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def type_with_cuda_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(tensor, *args, **kwargs)
        return plain_type(tensor).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_with_cuda_name


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that a CUDA device among its arguments means the CPU."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if len(args) > 1 and isinstance(args[1], (str, torch.device)):
            args = (args[0], _cpu_for_cuda(args[1]), *args[2:])
        return function(*args, **kwargs)

    return wrapped


def _cpu_for_cuda(device: Any) -> Any:
    is_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return CPU if is_cuda else device


@contextlib.contextmanager
def eager_fusions() -> Iterator[None]:
    """While Megatron-Core is imported: its fused functions stay plain Python functions.

    It decorates them with `torch.compile` at import, which on a CPU would start a C++ compiler in
    the middle of the first step (and import the compiler stack at start-up).
    """
    compile_function = torch.compile

    def keep(model: Callable[..., Any] | None = None, **_options: object) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = keep
    try:
        yield
    finally:
        torch.compile = compile_function


@contextlib.contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """While Megatron-Core is imported: it does not find a library, as if that were not installed.

    Args:
        name: The library; it is left alone if it is imported already.
    """
    if name in sys.modules:
        yield
        return
    # An import of what is None there fails as one of what is missing.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def mend_megatron() -> None:
    """Fills what Megatron-Core leaves undefined without Transformer Engine or without a GPU."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not random.HAVE_TE:
        # The router asks whether the name is None; it is not defined at all.
        moe_utils.te_general_gemm = None
        # Recomputing a norm or an activation always enters the contexts of 8-bit training.
        random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        random.activation_recompute_forward = _no_context
        random.fp8_autocast = _no_context
    if not torch.cuda.is_available():
        token_dispatcher.maybe_move_tensor_to_cpu = _as_split_sizes
        exchange_directly()
        leave_out_the_compiler()
        shorten_swiglu()
        skip_lonely_collectives()
        share_lonely_threads()
        keep_freed_memory()


def _no_context(**_options: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _as_split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron-Core's leaves CPU tensors alone, which `all_to_all_single` rejects as sizes."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
