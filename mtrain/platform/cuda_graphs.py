"""Work for a GPU that is recorded once and then started with one call.

The one thing to know: a recording runs no kernel. It notes kernels with the addresses of their
tensors, so whatever it reads and writes must stay where it is, and the host must not look at
numbers in between.
"""

from collections.abc import Callable

import torch

__all__ = ["Record", "graph_recorder"]

Record = Callable[[Callable[[], None]], Callable[[], None]]


def graph_recorder() -> Record:
    """A function that records what another one does and returns what repeats it.

    All recordings use the same memory for what is not kept outside of them. So they are to be
    repeated one after the other.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads copy checkpoints and batches meanwhile, which is none of its business.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record
