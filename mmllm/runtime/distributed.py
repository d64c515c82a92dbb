"""Several processes, one gradient: each has its own rows of every batch, and the whole model or its part of it (shard.py).

    torchrun --nproc_per_node=4 train.py configs/full.py

The surprising fact: nothing here averages. Each process divides its summed loss by the targets of *all* processes, so the
gradients only need to be added, and any split of the same samples into processes and micro-batches gives the same step.

The first process alone speaks and decides; what it decides, the others are told. When one is lost, the others say which:
each leaves word of itself with torchrun, which outlives them. Nothing to do for one process: the same code runs, and every
method returns at once. Next: shard.py, trainer.py.
"""

import datetime
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmllm.errors import RunError, UserError
from mmllm.runtime.device import choose_device

GRACE_S = 3  # in which the others say that they are alive, when one is lost
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run: this is number `rank` of `size`, and its model lives on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1
    neighbours: int = 1  # processes on this machine
    notes: dist.Store | None = None  # where each process leaves word of itself; torchrun keeps it
    timeout_s: int = 600

    @classmethod
    def start(cls, device: str, timeout_s: int = 600) -> "World":
        """Joins the processes that torchrun has started; alone where it has not. `device` is that of the settings."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(choose_device(device))
        local, place = int(os.environ["LOCAL_RANK"]), choose_device(device)
        if place.type == "cuda":
            here, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if here > cards:  # in all of them: else those that have one wait for the others
                raise UserError(f"torchrun started {here} processes for {cards} GPUs; lower --nproc_per_node")
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        patience = datetime.timedelta(seconds=timeout_s)
        notes, rank, size = next(dist.rendezvous("env://", timeout=patience))
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", notes),
            rank=rank,
            world_size=size,
            timeout=patience,
            device_id=place if place.type == "cuda" else None,
        )
        return cls(place, rank, size, int(os.environ["LOCAL_WORLD_SIZE"]), notes, timeout_s)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Part: all at the same time, or at once when something went wrong here. End the process with `errors.leave`.

        When another one was lost, RunError says which. A group that is broken is not taken apart: that may wait for ever.
        """
        if self.size == 1:
            return
        if error is None:
            dist.barrier()
            dist.destroy_process_group()
        elif is_lost_contact(error):
            raise RunError(self.lost()) from error
        else:
            self.notes.set(f"error of {self.rank}", str(error))

    def report_position(self, words: str) -> None:
        """Leave word of where this process is, for the others to tell if it is lost."""
        if self.size > 1:
            self.notes.set(f"place of {self.rank}", words)

    def lost(self) -> str:
        """What became of the processes that say nothing any more."""
        self.notes.set(f"alive {self.rank}", "")
        others = [rank for rank in range(self.size) if rank != self.rank]
        end = time.monotonic() + GRACE_S
        silent = others
        while silent and time.monotonic() < end:
            for rank in silent:
                if self.notes.check([f"error of {rank}"]):
                    return f"rank {rank} failed: {self.notes.get(f'error of {rank}').decode()}"
            silent = [rank for rank in silent if not self.notes.check([f"alive {rank}"])]
            time.sleep(0.05)
        places = [self.notes.get(key).decode() for key in (f"place of {r}" for r in silent) if self.notes.check([key])]
        who = f"rank {', '.join(map(str, silent))} ({', '.join(places)})" if silent else "another process"
        return (
            f"lost contact with {who}: it was killed, or gave no answer for {self.timeout_s} s (training.timeout_s); "
            "look at what it said, and go on with --resume auto"
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Iterable[float]) -> list[float]:
        """The sums of each number over all processes."""
        numbers = list(numbers)
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, which is the same in all of them."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds the gradients of all processes; a parameter that saw nothing in one of them counts as zero there."""
        if self.size == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.sum_(p.grad for p in parameters)

    def all_reduce_max(self, numbers: Iterable[int]) -> list[int]:
        """The largest of each number over all processes: one signal is enough to stop them all."""
        numbers = [int(number) for number in numbers]
        if self.size == 1:
            return numbers
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_gather(self, words: str) -> list[str]:
        """What each process says."""
        if self.size == 1:
            return [words]
        said: list = [None] * self.size
        dist.all_gather_object(said, words)
        return said

    def on_rank0(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the first process, for all of them; an error of the user's is raised in all."""
        if self.size == 1:
            return work()
        answer: list = [None, None]
        if self.is_first:
            try:
                answer[0] = work()
            except (UserError, RunError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: gloo's errors have no type, but name their source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


ALONE = World(torch.device("cpu"))  # for what does not depend on the device


# A tensor whose rows lie with different processes (shard.py) and one that is whole in each, by the same words ----------


def row_range(rows: int, world: World) -> tuple[int, int]:
    """The rows of this process, as FSDP2 cuts them: equal pieces, the last ones short or empty."""
    share = -(-rows // world.size)
    return min(rows, world.rank * share), min(rows, (world.rank + 1) * share)


def rows_for(tensor: Tensor, whole: Tensor, world: World) -> Tensor:
    """What of `whole` belongs into this process's part of `tensor`; nothing else of it is read."""
    return whole[slice(*row_range(len(whole), world))] if isinstance(tensor, DTensor) else whole


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its rows; to write there is to write to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
