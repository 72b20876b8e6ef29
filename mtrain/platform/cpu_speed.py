"""What makes training on a CPU faster without changing what is computed.

The one thing to know: on a CPU nothing of Megatron-Core's is compiled (see `cpu.eager_fusions`), so
every operation of its fused functions is a pass over memory of its own.
"""

import ctypes
import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BUFFER = 32 * 2**20  # more is refused
_MOST_KEPT = 512 * 2**20


def keep_freed_memory() -> None:
    """Lets glibc hand freed memory to the next tensor instead of back to the system.

    A training step asks for the same buffers as the step before. By default large ones go back when
    they are freed, and whoever gets them next pays for fresh pages: a sixth of a step of a tiny
    model. Other C libraries have no such setting and are left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BUFFER)
        library.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def leave_out_the_compiler() -> None:
    """Keeps torch's optimizers from importing its compiler, which takes a second of every start.

    They only ask it to leave their methods alone, and remember the answer with each of them. Where
    nothing is compiled, the method itself is one.
    """
    for method in vars(torch.optim.Optimizer).values():
        if hasattr(method, "__wrapped__"):
            method.__wrapped__.__dynamo_disable = method.__wrapped__


def skip_lonely_collectives() -> None:
    """Lets a rank without others leave its buffers of gradients and parameters where they are.

    The distributed optimizer scatters and gathers them in place. gloo copies them through a buffer
    of its own also where there is one rank.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: torch.Tensor, own: torch.Tensor, *, group: Any, **options: Any) -> Any:
        # Who asked for a handle wants one.
        is_wanted = group.size() > 1 or options.get("async_op")
        if is_wanted or output.data_ptr() != own.data_ptr():
            return collective(output, own, group=group, **options)
        return None

    return call


def share_lonely_threads() -> None:
    """Lets all groups without other ranks share one thread for connections that none of them has.

    gloo starts one for every group, and each wakes up a hundred times a second. Megatron-Core makes
    a group for every axis of the layout: together they take 3 % of a step of a tiny model.
    """
    plain = torch.distributed.ProcessGroupGloo.__init__

    @functools.wraps(plain)
    def init(group: Any, store: Any, rank: int, size: int, *args: Any, **options: Any) -> None:
        if size == 1 and not args and options.keys() == {"timeout"}:
            args, options = (_lonely_options(options["timeout"]),), {}
        plain(group, store, rank, size, *args, **options)

    torch.distributed.ProcessGroupGloo.__init__ = init


def _lonely_options(timeout: timedelta) -> Any:
    options = torch.distributed.ProcessGroupGloo._Options()
    options._devices = [_lonely_device()]
    options._timeout = timeout
    return options


@functools.cache
def _lonely_device() -> Any:
    """Made late: a fork has no threads of the process before it."""
    return torch.distributed.ProcessGroupGloo.create_default_device()


def shorten_swiglu() -> None:
    """Replaces the gradient of Megatron-Core's SwiGLU, ten passes over memory, by four."""
    from megatron.core.fusions import fused_bias_swiglu

    fused_bias_swiglu.swiglu_back = swiglu_gradient


def swiglu_gradient(
    grad: torch.Tensor, hidden: torch.Tensor, activated: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `silu(gate) * up`.

    Args:
        grad: [..., inner], of the output.
        hidden: [..., 2 * inner], gates first.
        activated: [..., inner], `silu(gate)`, if it was kept: it is half of the work.

    Returns:
        [..., 2 * inner].

    Source: `swiglu_back` of Megatron-Core's `fused_bias_swiglu`, which this replaces.
    """
    gate, up = hidden.chunk(2, dim=-1)
    result = torch.empty_like(hidden, dtype=torch.result_type(grad, hidden))
    grad, gate, up = (tensor.to(result.dtype) for tensor in (grad, gate, up))
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(F.silu(gate) if activated is None else activated, grad, out=grad_up)
    # Each operation writes where its result stays: other memory would not be in the cache.
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return result
