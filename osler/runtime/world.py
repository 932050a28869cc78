"""The processes of a run: each knows its place from torchrun's environment, and they agree through a ``World``.

Every process runs the same program on its own rows. Tensors travel by NCCL between GPUs and by gloo on CPUs. The processes agree
over further gloo connections, which never wait for a GPU and are patient enough for the preparation of data.

A process that dies closes its connections, so the others fail when they next communicate; ``joined`` turns that into one clear
error. A process that ends with a UserError leaves the error where the others find it, so each machine prints it once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from osler.runtime.errors import UserError
from osler.runtime.stop import ended_by_requests

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a rank that hangs in a step is given up after this
HOST_TIMEOUT = timedelta(days=1)  # the others wait as long as rank 0 needs to prepare the data
REPORT_TIMEOUT = timedelta(seconds=10)  # the longest wait for the store when an error is reported
EXIT_LOST = 75  # other processes were lost, and the same command goes on; EX_TEMPFAIL of sysexits.h
ERROR_KEY = "user_error"  # its entry in the store through which the processes met


@dataclass(frozen=True)
class Place:
    """The rank of a process among all processes, and among those of its machine, and how many processes these are."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1


def place() -> Place:
    """Return this process's place by torchrun's environment; raises UserError when that is incomplete."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Place()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start several processes with torchrun.")
    local_rank = int(os.environ["LOCAL_RANK"])
    return Place(int(os.environ["RANK"]), local_rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))


def is_distributed() -> bool:
    """Return whether something started several processes of this program."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_silent(rank_variable: str = "RANK") -> bool:
    """Return whether rank 0 speaks for this process; with ``LOCAL_RANK``, whether rank 0 of this machine does."""
    return is_distributed() and os.environ.get(rank_variable, "0") != "0"


def require_one_process(command: str) -> None:
    """Raise UserError when torchrun started several processes of a command that runs as one."""
    if place().size > 1:
        raise UserError(f"{place().size} processes were started, but {command} runs as one: start it without torchrun.")


@dataclass(frozen=True)
class World:
    """The processes that train one model together. All of them must call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    device: str = "auto"  # the device of this process, as a config names it
    hosts: ProcessGroup | None = None  # gloo, for what the processes agree on without a GPU

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.rank == 0

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks, for work that they share on the device; None for one process."""
        if self.size == 1:
            return None
        import torch.distributed as dist

        return dist.group.WORLD

    def broadcast_from_first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 alone and return its result, which must be picklable, on every rank."""
        if self.size == 1:
            return work()
        import torch
        import torch.distributed as dist

        box = [work() if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self.hosts, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here; does not wait for a GPU."""
        self.all_reduce_min(0)

    def all_reduce_min(self, *values: int) -> list[int]:
        """Return the least that any rank gives for each of the values; does not wait for a GPU."""
        return self._all_reduce(values, "int64", "MIN")

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return the sum over the ranks of each of the values, in fp64; does not wait for a GPU."""
        return self._all_reduce(values, "float64", "SUM")

    def _all_reduce(self, values: Sequence[Any], dtype: str, operation: str) -> list[Any]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        reduced = torch.tensor(values, dtype=getattr(torch, dtype))
        dist.all_reduce(reduced, op=getattr(dist.ReduceOp, operation), group=self.hosts)
        return reduced.tolist()

    def all_gather(self, value: T) -> list[T]:
        """Return what every rank gives, which must be picklable, in the order of the ranks; does not wait for a GPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        box: list[T | None] = [None] * self.size
        dist.all_gather_object(box, value, group=self.hosts)
        return box  # type: ignore[return-value]

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks in place, on its device and without waiting for it."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Connect to the other processes that torchrun started, for as long as the context lasts; ``device`` is the config's.

    Each process takes the GPU of its local rank. Raises UserError when another process was lost or ended with a UserError.
    """
    here = place()
    if here.size == 1:
        yield World(device=device)
        return
    import torch
    import torch.distributed as dist

    own = device_of(device, here)
    on_gpu = own.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(own)
    store: Store | None = None
    try:
        with ended_by_requests():  # torch waits for ranks that are not there, or are gone, without a look at signals
            store = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))[0]
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                timeout=COLLECTIVE_TIMEOUT,
                store=dist.PrefixStore("ranks", store),
                rank=here.rank,
                world_size=here.size,
                device_id=torch.device(own) if on_gpu else None,
            )
            world = World(here.rank, here.size, own, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
        yield world
        world.barrier()  # nobody hangs up while another still listens
        dist.destroy_process_group()  # not after an error: it could wait for a rank that is gone
    except UserError as error:
        with suppress(RuntimeError):
            if store is not None:
                store.set(ERROR_KEY, f"{error.exit_code} {error}")
        error.is_reporter = is_reporter(str(error), store)
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors have no class
            raise
        first_line = str(error).partition("\n")[0][:200]
        code, left = str(EXIT_LOST), None  # the exit code and the message of a UserError that another process left
        with suppress(RuntimeError):
            if store is not None and store.check([ERROR_KEY]):
                code, _, left = str(store.get(ERROR_KEY), "utf-8").partition(" ")
        lost = UserError(
            left
            or f"Rank {here.rank} of {here.size} lost the others: one of them ended or cannot be reached ({first_line}). "
            "Its last message says why; the same command goes on from the newest checkpoint."
        )
        lost.exit_code = int(code)
        lost.is_reporter = is_reporter(left or "lost", store)
        raise lost from error


def is_reporter(message: str, store: Store | None = None) -> bool:
    """Return whether this process is the first on its machine to report this error; ``store`` is where the processes met.

    Under torchrun the store outlives all processes, and even a process that has not connected can ask it. Torchrun ends the
    others as soon as one has ended, so the first to end must report. Elsewhere the store ends with rank 0. Without a store, local
    rank 0 reports, and so does a process that never connected.
    """
    from socket import gethostname  # not every command needs it

    has_connected = store is not None
    with suppress(RuntimeError):
        if store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            import torch.distributed as dist

            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=REPORT_TIMEOUT)
        if store is not None:
            return bool(store.add(f"{ERROR_KEY}/{gethostname()}/{message}", 1) == 1)
    return not (has_connected and is_silent("LOCAL_RANK"))


def device_of(device: str, here: Place) -> str:
    """Return the device of one process among several; raises UserError when there is not one GPU for each."""
    import torch

    from osler.runtime.device import pick_device

    chosen = pick_device(device)
    if chosen.type == "cpu":
        return "cpu"
    if ":" in device:
        raise UserError(f"device={device} names one GPU, but {here.size} processes were started: use device=auto.")
    gpus = torch.cuda.device_count()
    if here.local_size > gpus:
        raise UserError(
            f"{here.local_size} processes were started on this machine, and it has {gpus} GPUs: start torchrun with "
            f"--nproc-per-node {gpus}, or train on the CPU with device=cpu."
        )
    return f"cuda:{here.local_rank}"
