"""Checkpoints written by all processes together, while they go on training.

The surprising fact: the threads that write never speak to each other. A collective in a thread would cross one of the
training, so each step's own question ("has anybody had a signal?") carries one number more: idle, busy or failed. When
nobody is busy any more, the first process makes the checkpoint of what lies there.

Where a copy of this process's rows does not fit into memory they are written at once, and training waits.
Next: trainer.py.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmllm.errors import RunError
from mmllm.runtime.distributed import World
from mmllm.runtime.memory import free_memory
from mmllm.storage import checkpoint as disk
from mmllm.storage.atomic import reported
from mmllm.storage.sharded_file import Piece, layout, own_pieces, write_pieces

IDLE, BUSY, FAILED = 0, 1, 2
MARGIN = 1.5  # of free memory over what a copy takes


@dataclass
class Save:
    """A checkpoint on its way: first the rows of each process, then, by the first process, its name."""

    folder: Path
    temporary: Path
    whole: Callable[[], None]  # called by the first process once it is whole
    work: Future[None] | None
    has_rows: bool = False


class CheckpointWriter:
    """Writes one checkpoint at a time. All processes call the same methods in the same order.

    `save` is the one on its way, `last_saved` the name of the last whole one, `failures` how many failed since.
    """

    def __init__(self, world: World, last_saved: str | None = None):
        self.world, self.last_saved = world, last_saved
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.save: Save | None = None
        self.failures = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()  # what is being written is written to its end

    def begin(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict,
        whole: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what the checkpoint shall hold, and begin to write it. RunError when there is no room for it.

        `whole` is called in the first process, perhaps in a thread, when the checkpoint has its name.
        """
        if self.save:
            raise ValueError(f"{self.save.folder} is still being written")
        files = disk.tensor_files(model, optimizer)
        layouts = {name: layout(tensors, metadata) for name, (tensors, metadata) in files.items()}
        state = state | {"updates": disk.updates_of(optimizer)}
        self.failures += 1  # until it is whole
        temporary = self.world.on_rank0(lambda: disk.begin_checkpoint(folder, model, layouts, state))
        pieces = {
            temporary / name: own_pieces(tensors, layouts[name], self.world) for name, (tensors, _) in files.items()
        }
        self.save = Save(folder, temporary, whole, None)
        if self._fits(pieces):
            copies = {path: [(place, part.to("cpu", copy=True)) for place, part in own] for path, own in pieces.items()}
            self.save.work = self.pool.submit(self._write, self.save, copies)
        else:
            self.save.work = Future()
            try:
                self.save.work.set_result(self._write(self.save, pieces))
            except RunError as error:
                self.save.work.set_exception(error)
            self.wait()

    def state(self) -> int:
        """Of this process's part: IDLE, BUSY or FAILED."""
        if self.save is None or self.save.work is None:
            return IDLE
        if not self.save.work.done():
            return BUSY
        error = self.save.work.exception()
        if error and not isinstance(error, RunError):
            raise error
        return FAILED if error else IDLE

    def advance(self, furthest: int) -> None:
        """Go on as far as can be without waiting; `furthest` is the largest `state` of all processes.

        RunError, in all of them, when the checkpoint could not be written; nothing of it is left then.
        """
        save = self.save
        if save is None or furthest == BUSY:
            return
        if furthest == FAILED:
            self._give_up(save)
        elif save.has_rows or self.world.size == 1:
            self.save, self.last_saved, self.failures = None, save.folder.name, 0
        else:
            save.has_rows = True
            save.work = self.pool.submit(self._finish, save) if self.world.is_first else None

    def wait(self) -> None:
        """Wait until no checkpoint is on its way; RunError as in `advance`."""
        while self.save:
            if self.save.work:
                self.save.work.exception()  # waits
            self.advance(self.world.all_reduce_max([self.state()])[0])

    def _fits(self, pieces: dict[Path, list[Piece]]) -> bool:
        needed = sum(part.numel() * part.element_size() for own in pieces.values() for _, part in own)
        return not self.world.all_reduce_max([MARGIN * needed * self.world.neighbours > free_memory()])[0]

    def _write(self, save: Save, pieces: dict[Path, list[Piece]]) -> None:
        with reported(save.folder):
            for path, own in pieces.items():
                write_pieces(path, own)
        if self.world.size == 1:
            self._finish(save)

    def _finish(self, save: Save) -> None:
        disk.end_checkpoint(save.temporary, save.folder)
        with reported(save.folder):
            save.whole()

    def _give_up(self, save: Save) -> None:
        """Forget the checkpoint, and raise why in all processes."""
        self.save = None
        error = save.work.exception() if save.work else None
        reasons = [reason for reason in self.world.all_gather(str(error) if error else "") if reason]
        self.world.on_rank0(lambda: shutil.rmtree(save.temporary, ignore_errors=True))
        raise RunError(reasons[0])
