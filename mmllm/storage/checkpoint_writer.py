"""Checkpoints that all processes write together while training goes on.

The threads that write never communicate: a collective in a thread would cross one of the training. Instead, the question
that all processes ask each other once a step ("has anybody had a signal?") carries one number more, the state of the
writer: idle, busy or failed. When no process is busy, rank 0 turns what was written into a checkpoint.

Where a copy of this process's rows does not fit into memory, they are written at once and training waits.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmllm.errors import RunError
from mmllm.runtime.distributed import World
from mmllm.runtime.files import writing
from mmllm.runtime.memory import free_memory
from mmllm.runtime.threads import worker_pool
from mmllm.storage import checkpoint as disk
from mmllm.storage.sharded_file import Piece, layout, own_pieces, write_pieces

IDLE, BUSY, FAILED = 0, 1, 2
MARGIN = 1.5  # free memory that a copy needs, over its size


@dataclass
class Save:
    """A checkpoint in progress: every process writes its rows, then rank 0 gives it its name."""

    folder: Path
    temporary: Path
    on_complete: Callable[[], None]
    work: Future[None] | None = None
    has_rows: bool = False


class CheckpointWriter:
    """Writes one checkpoint at a time. All processes call the same methods in the same order.

    `save` is the one in progress, `last_saved` the name of the last one, `failures` how many have failed since.
    """

    def __init__(self, world: World, last_saved: str | None = None):
        self.world, self.last_saved = world, last_saved
        self.pool = worker_pool(1, "save")
        self.save: Save | None = None
        self.failures = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()  # finishes what is being written

    def begin(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict,
        on_complete: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy model and optimizer, and begin to write them. RunError where there is no room on the disk.

        Rank 0 calls `on_complete`, perhaps in a thread, when the checkpoint has its name.
        """
        if self.save:
            raise ValueError(f"{self.save.folder} is still being written")
        files = model.tensor_files() | {disk.OPTIMIZER: disk.moments_of(model, optimizer)}
        layouts = {name: layout(files[name], {"format": "pt"} if name != disk.OPTIMIZER else {}) for name in files}
        updates = max((int(moments["step"]) for moments in optimizer.state.values()), default=0)
        state = state | {"updates": updates}
        self.failures += 1  # until it is complete
        temporary = self.world.on_rank0(lambda: disk.begin_checkpoint(folder, model, layouts, state))
        pieces = {temporary / name: own_pieces(files[name], layouts[name], self.world) for name in files}
        fits = self._fits(pieces)
        if fits:
            pieces = {path: [(at, part.to("cpu", copy=True)) for at, part in own] for path, own in pieces.items()}
        self.save = Save(folder, temporary, on_complete)
        self.save.work = self.pool.submit(self._write, self.save, pieces)
        if not fits:
            self.wait()

    def state(self) -> int:
        """IDLE, BUSY or FAILED: the part of this process."""
        if self.save is None or self.save.work is None:
            return IDLE
        if not self.save.work.done():
            return BUSY
        error = self.save.work.exception()
        if error and not isinstance(error, RunError):
            raise error
        return FAILED if error else IDLE

    def advance(self, state: int) -> None:
        """Go on as far as possible without waiting; `state` is the largest of all processes.

        RunError, in all of them, where the checkpoint could not be written; nothing of it is left then.
        """
        save = self.save
        if save is None or state == BUSY:
            return
        if state == FAILED:
            self._give_up(save)
        elif save.has_rows or self.world.size == 1:
            self.save, self.last_saved, self.failures = None, save.folder.name, 0
        else:
            save.has_rows = True
            save.work = self.pool.submit(self._finish, save) if self.world.is_first else None

    def wait(self) -> None:
        """Wait until no checkpoint is in progress; RunError as in `advance`."""
        while self.save:
            if self.save.work:
                self.save.work.exception()  # waits
            self.advance(self.world.all_reduce_max([self.state()])[0])

    def _fits(self, pieces: dict[Path, list[Piece]]) -> bool:
        needed = sum(part.nbytes for own in pieces.values() for _, part in own)
        return not self.world.all_reduce_max([MARGIN * needed * self.world.neighbours > free_memory()])[0]

    def _write(self, save: Save, pieces: dict[Path, list[Piece]]) -> None:
        with writing(save.folder):
            for path, own in pieces.items():
                write_pieces(path, own)
        if self.world.size == 1:
            self._finish(save)

    def _finish(self, save: Save) -> None:
        disk.end_checkpoint(save.temporary, save.folder)
        with writing(save.folder):
            save.on_complete()

    def _give_up(self, save: Save) -> None:
        """Forget the checkpoint, and raise the reason in all processes."""
        self.save = None
        error = save.work.exception() if save.work else None
        reasons = [reason for reason in self.world.all_gather(str(error) if error else "") if reason]
        self.world.on_rank0(lambda: shutil.rmtree(save.temporary, ignore_errors=True))
        raise RunError(reasons[0])
