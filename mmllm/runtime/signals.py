"""Ctrl-C and SIGTERM: noted, not obeyed at once, so that what was learnt is saved.

The surprising fact: a handler must not print. The signal may have come in the middle of another print, so it writes to
the descriptor itself. Next: trainer.py.
"""

import os
import signal
from types import FrameType

STDERR = 2


class StopSignal:
    """Notes Ctrl-C or SIGTERM while the block runs, so that the step ends and is saved; a second one ends at once."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self.old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self.old:
            signal.signal(each, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        os.write(STDERR, b"\nstopping after this step, then saving; once more stops at once\n")
