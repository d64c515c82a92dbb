"""Several processes, one gradient: every process holds the whole model and its own rows of each batch.

    torchrun --nproc_per_node=4 train.py configs/full.py

The surprising fact: nothing here averages. Each process divides its summed loss by the targets of *all* processes, so the
gradients only need to be added, and any split of the same samples into processes and micro-batches gives the same step.

The first process alone writes, prints and validates; what it decides, the others are told. Nothing to do for one process:
the same code runs, and every method returns at once. Next: trainer.py.
"""

import datetime
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmllm.device import choose_device
from mmllm.errors import RunError, UserError

PATIENCE = datetime.timedelta(minutes=30)  # the others wait while the first process validates and saves
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run: this is number `rank` of `size`, and its model lives on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def start(cls, device: str) -> "World":
        """Joins the processes that torchrun has started; alone where it has not. `device` is that of the settings."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(choose_device(device))
        local, place = int(os.environ["LOCAL_RANK"]), choose_device(device)
        if place.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started process {local + 1} for {torch.cuda.device_count()} GPUs; lower --nproc_per_node"
                )
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(place, dist.get_rank(), size)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Part: all at the same time, or at once when something went wrong here. End the process with `errors.leave`."""
        if self.size > 1:
            if error is None:
                dist.barrier()
            dist.destroy_process_group()

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

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers: one signal is enough to stop them all."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def by_first(self, work: Callable[[], Result]) -> Result:
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
