"""Where this process stands among the ranks, and how the ranks are started.

The one thing to know: this is the only reader of the environment variables of launchers
(NPROC_PER_NODE and its siblings, torchrun's RANK, Slurm's SLURM_*). It answers with a `Launch`
(this process has to start the ranks) or a `Placement` (this process is a rank, maybe the only one).
"""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mtrain.cli.rank_processes import EndRanks, RankProcesses, end_on_hangup
from mtrain.cli.rank_signals import RankSignals
from mtrain.cli.start_clock import process_began
from mtrain.platform.node_notes import NodeNotes
from mtrain.platform.signals import signal_exit_code, signal_of_exit_code

__all__ = [
    "Launch",
    "Placement",
    "join_ranks",
    "launch_ranks",
    "launcher_began",
    "let_gpu_memory_grow",
    "rank_exit_code",
    "read_environment",
    "wait_until_prepared",
]

# Set by `launch_ranks` for the ranks it starts: a folder that lives as long as the run.
_RUN_FOLDER = "MTRAIN_RUN_FOLDER"
# Likewise: when the command began.
_BEGAN = "MTRAIN_BEGAN"
_DEFAULT_PORT = 29500
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The ranks that this process has to start on its node.

    `master_addr` and `master_port` are None when there is one node and they were not given.
    """

    nproc_per_node: int
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nproc_per_node * self.num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One rank.

    Attributes:
        rank: Global rank.
        local_rank: Rank on this node.
        world_size: Ranks on all nodes.
        is_prepared: Whether the process that started the ranks checks and prepares the input.
        data_key: What the prepared data are called in the cache; None: found by their contents.
        failure_folder: Folder that all ranks of this node share, to agree on who failed first.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    is_prepared: bool = False
    data_key: str | None = None
    failure_folder: Path | None = None


def read_environment(environ: Mapping[str, str] | None = None) -> Launch | Placement:
    """Finds out whether this process starts ranks, is one of several, or is alone.

    A rank started by torchrun is known by LOCAL_RANK; RANK and WORLD_SIZE alone may belong to the
    pod of a cluster. NPROC_PER_NODE wins over srun, which then starts one launcher a node.

    Raises:
        ValueError: A variable is missing or not a number.
    """
    environ = os.environ if environ is None else environ
    if {"LOCAL_RANK", "RANK", "WORLD_SIZE"} <= environ.keys():
        return Placement(
            rank=_read_int(environ, "RANK"),
            local_rank=_read_int(environ, "LOCAL_RANK"),
            world_size=_read_int(environ, "WORLD_SIZE", minimum=1),
            is_prepared=_RUN_FOLDER in environ,
            failure_folder=_torchrun_folder(environ),
        )
    if {"NPROC_PER_NODE", "NNODES"} & environ.keys():
        launch = _read_launch(environ)
        return launch if launch.world_size > 1 else Placement()
    # Set by srun for the tasks of a step, unlike SLURM_NTASKS, which a batch script sees too.
    if {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environ.keys():
        return _read_slurm(environ)
    return Placement()


def join_ranks(placement: Placement) -> None:
    """Sets what torch's process group reads, where srun instead of torchrun started the ranks."""
    if "LOCAL_RANK" in os.environ:
        return
    job = _read_int(os.environ, "SLURM_JOB_ID", default=0)
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    os.environ.update(
        RANK=str(placement.rank),
        LOCAL_RANK=str(placement.local_rank),
        WORLD_SIZE=str(placement.world_size),
        MASTER_ADDR=os.environ.get("MASTER_ADDR", _first_host(nodes)),
        # All nodes must agree without talking, and two jobs on a node must not meet.
        MASTER_PORT=os.environ.get("MASTER_PORT", str(20000 + job % 10000)),
    )


def let_gpu_memory_grow() -> None:
    """Lets torch extend its blocks of GPU memory, so that gaps between them are not lost.

    Its allocator reads the setting when it is first used; one that was given is left alone.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def launch_ranks(launch: Launch, words: Sequence[str], prepare: Callable[[], str | None]) -> int:
    """Starts the ranks of this node, prepares their data meanwhile, and waits for their end.

    When one fails the others are ended. The ranks report their errors themselves
    (`mtrain.cli.errors`). SIGTERM and SIGUSR1 are for the ranks (`mtrain.cli.rank_signals`).

    Args:
        launch: What to start.
        words: What each rank runs, as after `python` (`-m module arguments...`).
        prepare: Called while the ranks import what they need; they wait for its answer, which
            `wait_until_prepared` gives them. When it raises, they are ended.

    Returns:
        Exit code: 0, or that of the first rank that failed, or 128 + number if a signal ended them.

    Raises:
        EndedBySignal: A signal ended them that saved nothing for it.
        ValueError: The ranks cannot meet at MASTER_PORT.
    """
    with (
        _meeting_port(launch) as port,
        tempfile.TemporaryDirectory(prefix="mtrain-", ignore_cleanup_errors=True) as folder,
    ):
        notes = NodeNotes(Path(folder))
        notes.note_preparing()
        environs = _rank_environs(launch, port=port, folder=folder)
        with RankProcesses(words, environs) as ranks, end_on_hangup():
            return _run_ranks(ranks, notes, prepare, first_rank=_first_rank(launch))


def _run_ranks(
    ranks: RankProcesses,
    notes: NodeNotes,
    prepare: Callable[[], str | None],
    *,
    first_rank: int,
) -> int:
    signals = RankSignals(notes, end_ranks=_end_ranks)
    try:
        notes.note_prepared(prepare() or "")
        if notes.prepared() is None:
            raise RuntimeError(f"cannot write to {notes.path}, which the ranks share")
        with signals:
            failure = ranks.first_failure()
    except EndRanks as error:
        ranks.end(error.signum)
        if signals.ended_by is not None:
            raise signals.ended_by from None
        return 128 + error.signum
    except KeyboardInterrupt:
        ranks.end(signal.SIGINT)
        raise
    if failure is not None:
        place, code = failure
        ranks.end(signal.SIGTERM)
        return _exit_code(first_rank + place, code)
    stopped_by = notes.stopped_by()
    return signal_exit_code(stopped_by) if stopped_by else 0


def wait_until_prepared(placement: Placement) -> Placement:
    """Waits, on a rank of `launch_ranks`, for what the launcher prepares.

    Returns:
        The rank, with the name of the data.

    Raises:
        RuntimeError: The launcher is gone.
    """
    notes = NodeNotes(placement.failure_folder)
    while (key := notes.prepared()) is None:
        if not notes.is_preparing():
            raise RuntimeError("the process that started the ranks is gone")
        time.sleep(_POLL_SECONDS)
    return dataclasses.replace(placement, data_key=key or None)


def launcher_began() -> float | None:
    """When `launch_ranks` of another process began, by the monotonic clock; None without one."""
    text = os.environ.get(_BEGAN)
    return None if text is None else float(text)


def _rank_environs(launch: Launch, *, port: int, folder: str) -> list[dict[str, str]]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = str(max(1, cores // launch.nproc_per_node))
    return [
        {
            "OMP_NUM_THREADS": threads,
            **os.environ,
            "RANK": str(_first_rank(launch) + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(launch.world_size),
            "LOCAL_WORLD_SIZE": str(launch.nproc_per_node),
            "MASTER_ADDR": launch.master_addr or "127.0.0.1",
            "MASTER_PORT": str(port),
            _RUN_FOLDER: folder,
            _BEGAN: str(process_began()),
        }
        for local_rank in range(launch.nproc_per_node)
    ]


def _first_rank(launch: Launch) -> int:
    return launch.node_rank * launch.nproc_per_node


@contextlib.contextmanager
def _meeting_port(launch: Launch) -> Iterator[int]:
    """The port that rank 0 will listen at, kept free for it where it is on this node.

    Raises:
        ValueError: It is in use.
    """
    if launch.node_rank > 0:
        assert launch.master_port is not None, "several nodes have one"
        yield launch.master_port
        return
    with socket.socket() as kept:
        # Rank 0, which sets the same, may listen there; nobody else is given the port.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            kept.bind(("", launch.master_port or 0))
        except OSError as error:
            raise ValueError(f"MASTER_PORT={launch.master_port}: {error.strerror}") from error
        yield kept.getsockname()[1]


def _end_ranks(signum: int) -> NoReturn:
    """Leaves the wait for the ranks, which get the signal."""
    raise EndRanks(signum)


def rank_exit_code(placement: Placement, code: int) -> int:
    """What a rank ends with.

    For whoever starts ranks every code but 0 is a failure, for which the other ranks are ended. So
    a rank of `launch_ranks` that saved and ended because of a signal leaves a note, which becomes
    the exit code of the run.
    """
    signum = signal_of_exit_code(code)
    if not signum or not placement.is_prepared:
        return code
    NodeNotes(placement.failure_folder).note_stopped(signum)
    return 0


def _exit_code(rank: int, code: int) -> int:
    if code >= 0:
        return code
    # A killed process could not say anything itself.
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    sys.stderr.write(f"megatron: rank {rank} was ended by {name}{hint}\n")
    return 128 - code


def _read_launch(environ: Mapping[str, str]) -> Launch:
    num_nodes = _read_int(environ, "NNODES", default=1, minimum=1)
    if "NPROC_PER_NODE" not in environ:
        if num_nodes > 1:
            raise ValueError(f"NNODES={num_nodes} needs NPROC_PER_NODE (ranks on each node)")
        return Launch(nproc_per_node=1)
    if num_nodes > 1:
        for name in ("NODE_RANK", "MASTER_ADDR"):
            if name not in environ:
                raise ValueError(f"NNODES={num_nodes} needs {name} (the same run on each node)")
    node_rank = _read_int(environ, "NODE_RANK", default=0)
    if node_rank >= num_nodes:
        raise ValueError(f"NODE_RANK={node_rank} must be below NNODES={num_nodes}")
    port = None
    if "MASTER_PORT" in environ or num_nodes > 1:
        port = _read_int(environ, "MASTER_PORT", default=_DEFAULT_PORT, minimum=1)
    return Launch(
        nproc_per_node=_read_int(environ, "NPROC_PER_NODE", minimum=1),
        num_nodes=num_nodes,
        node_rank=node_rank,
        # On one node the address is this machine, whatever a cluster put there.
        master_addr=environ["MASTER_ADDR"] if num_nodes > 1 else None,
        master_port=port,
    )


def _read_slurm(environ: Mapping[str, str]) -> Placement:
    world_size = _read_int(environ, "SLURM_STEP_NUM_TASKS", minimum=1)
    if world_size == 1:
        return Placement()
    step = "-".join(environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID"))
    restart = environ.get("SLURM_RESTART_COUNT", "0")
    return Placement(
        rank=_read_int(environ, "SLURM_PROCID"),
        local_rank=_read_int(environ, "SLURM_LOCALID"),
        world_size=world_size,
        failure_folder=Path(tempfile.gettempdir()) / f"mtrain-slurm-{step}-{restart}",
    )


def _torchrun_folder(environ: Mapping[str, str]) -> Path | None:
    if _RUN_FOLDER in environ:
        return Path(environ[_RUN_FOLDER])
    # A torchrun that somebody else started gives every rank .../attempt/local_rank/error.json.
    error_file = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def _read_int(
    environ: Mapping[str, str], name: str, *, default: int | None = None, minimum: int = 0
) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"the environment variable {name} is missing")
        return default
    if not text.strip().isdecimal() or int(text) < minimum:
        raise ValueError(f"{name}={text}: must be a whole number from {minimum} on")
    return int(text)


def _first_host(nodes: str) -> str:
    """First host of a Slurm list: `node[03-05,9],other` -> `node03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}: set MASTER_ADDR to the first node")
    return "".join(part or "" for part in match.groups())
