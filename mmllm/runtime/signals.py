"""Ctrl-C and SIGTERM in a training run: finish the step, save, then exit."""

import os
import signal
from types import FrameType

STDERR = 2


class StopSignal:
    """Records Ctrl-C or SIGTERM in `number` while the block runs; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self.old = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self.old:
            signal.signal(each, signal.SIG_DFL)
        # not print, which the signal may have interrupted
        os.write(STDERR, b"\nstopping after this step, then saving; once more stops at once\n")
