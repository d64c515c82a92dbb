"""Data parallelism: each process has its own rows of every batch, and the whole model or its shard of it (training/fsdp.py).

    torchrun --nproc_per_node=4 train.py configs/full.py

Nothing here averages. Each process divides its summed loss by the targets of *all* processes, so the gradients are only
added, and any split of the same samples into processes and micro-batches gives the same step.

Only rank 0 prints and decides. Each process keeps its position in the store of torchrun, which outlives it, so that the
others can name the one that is lost. With one process every method returns at once.
"""

import datetime
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmllm.errors import RunError, UserError
from mmllm.runtime.device import choose_device

GRACE_S = 3  # for the others to report that they are alive, when one is lost
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run: this one has number `rank` of `size`, and its model is on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1
    neighbours: int = 1  # processes on this machine, this one included
    store: dist.Store | None = None  # positions and errors of all processes
    timeout_s: int = 600

    @classmethod
    def start(cls, device: str, timeout_s: int = 600) -> "World":
        """Join the processes that torchrun has started, if it has. `device` is the setting of that name."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(choose_device(device))
        own, neighbours = choose_device(device), int(os.environ["LOCAL_WORLD_SIZE"])
        is_cuda = own.type == "cuda"
        if is_cuda:
            cards = torch.cuda.device_count()
            if neighbours > cards:  # checked in every process: those that have a card would wait for the others
                raise UserError(f"torchrun started {neighbours} processes for {cards} GPUs; lower --nproc_per_node")
            own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(own)
        timeout = datetime.timedelta(seconds=timeout_s)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=own if is_cuda else None,
        )
        store.set(f"process {rank}", f"{platform.node()} {os.getpid()}")
        world = cls(own, rank, size, neighbours, store, timeout_s)
        signal.signal(signal.SIGTERM, world._end_with_others)  # until the training loop has a handler of its own
        return world

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Leave the group together with the others, or at once after an error; RunError names a process that was lost.

        A broken group is not destroyed, which may block for ever: the process must end by `errors.run`.
        """
        if self.size == 1:
            return
        if error is None:
            dist.barrier()
            dist.destroy_process_group()
        elif is_lost_contact(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once, before `lost` has an answer
            raise RunError(self.lost()) from error
        else:
            self.store.set(f"error {self.rank}", str(error))

    def _end_with_others(self, number: int, frame: FrameType | None) -> None:
        """On SIGTERM, which torchrun sends when a process is lost: say which; no collective fails while models load."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RunError(f"ended by SIGTERM: {self.lost()}")

    def report_position(self, text: str) -> None:
        """Record where this process is, for the message of the others if it is lost."""
        if self.size > 1:
            self.store.set(f"position {self.rank}", text)

    def lost(self) -> str:
        """Which processes answer no more, and why, if they said so."""
        self.store.set(f"alive {self.rank}", "")
        silent = [rank for rank in range(self.size) if rank != self.rank]
        end = time.monotonic() + GRACE_S
        while silent and time.monotonic() < end:
            for rank in silent:
                if self.store.check([f"error {rank}"]):
                    return f"rank {rank} failed: {self.store.get(f'error {rank}').decode()}"
            silent = [rank for rank in silent if not self.store.check([f"alive {rank}"])]
            time.sleep(0.05)
        silent = [rank for rank in silent if self._is_gone(rank)] or silent  # others may not have noticed yet
        keys = [key for key in (f"position {rank}" for rank in silent) if self.store.check([key])]
        positions = f" ({', '.join(self.store.get(key).decode() for key in keys)})" if keys else ""
        who = f"rank {', '.join(map(str, silent))}{positions}" if silent else "another process"
        return (
            f"lost contact with {who}: it was killed, or gave no answer for {self.timeout_s} s (training.timeout_s); "
            "look at what it said, and go on with --resume auto"
        )

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this machine has ended; False for those of another, and where there is no /proc."""
        host, _, number = self.store.get(f"process {rank}").decode().rpartition(" ")
        return host == platform.node() and Path("/proc/self").exists() and not Path("/proc", number).exists()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Iterable[float]) -> list[float]:
        """The sum of each number over all processes."""
        return self._all_reduce(numbers, torch.float64, dist.ReduceOp.SUM)

    def all_reduce_max(self, numbers: Iterable[int]) -> list[int]:
        """The largest of each number over all processes."""
        return self._all_reduce(numbers, torch.int64, dist.ReduceOp.MAX)

    def _all_reduce(self, numbers: Iterable[float], dtype: torch.dtype, how: dist.ReduceOp) -> list[float]:
        numbers = list(numbers)
        if self.size == 1:
            return numbers
        found = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(found, how)
        return found.tolist()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same in all of them."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes; where a parameter has none in one of them, it counts as zero there."""
        if self.size == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.sum_(p.grad for p in parameters)

    def all_gather(self, text: str) -> list[str]:
        """The text of each process."""
        if self.size == 1:
            return [text]
        texts: list = [None] * self.size
        dist.all_gather_object(texts, text)
        return texts

    def on_rank0(self, work: Callable[[], Result]) -> Result:
        """Run `work` in rank 0 and return its result in all processes; a UserError or RunError is raised in all."""
        if self.size == 1:
            return work()
        outcome: list = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (UserError, RunError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: gloo's errors have no type, but name their file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


ALONE = World(torch.device("cpu"))  # one process


# The same functions for a sharded tensor and for one that every process has in full


def row_range(rows: int, world: World) -> tuple[int, int]:
    """The rows of this process, as FSDP2 shards them: equal pieces, the last ones short or empty."""
    share = -(-rows // world.size)
    return min(rows, world.rank * share), min(rows, (world.rank + 1) * share)


def rows_for(tensor: Tensor, whole: Tensor, world: World) -> Tensor:
    """The rows of `whole` that this process holds of `tensor`; the others are not read."""
    return whole[slice(*row_range(len(whole), world))] if isinstance(tensor, DTensor) else whole


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, all of it or its rows; shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
