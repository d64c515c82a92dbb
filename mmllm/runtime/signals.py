"""Signals in a training run: finish the step, save, then exit."""

import os
import signal
import stat
from contextlib import suppress
from types import FrameType

STDOUT, STDERR = 1, 2
REQUESTS = (signal.SIGINT, signal.SIGTERM)
# a terminal that is closed, and the warning that SLURM sends some time before SIGTERM; not on Windows
WARNINGS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopSignal:
    """Records the first of Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 in `number` while the block runs.

    A second Ctrl-C or SIGTERM ends the process at once. `nohup` ignores SIGHUP, and so does this.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopSignal":
        ignored = [number for number in WARNINGS if signal.getsignal(number) == signal.SIG_IGN]
        self.old = {n: signal.signal(n, self._record) for n in (*REQUESTS, *WARNINGS) if n not in ignored}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number in REQUESTS:
            for each in REQUESTS:
                signal.signal(each, signal.SIG_DFL)
        with suppress(OSError):  # of an output that is closed
            for output in (STDOUT, STDERR):
                if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):
                    # a terminal that is gone: whatever the run still prints would be an error
                    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
            # not print, which the signal may have interrupted
            once_more = "; Ctrl-C or SIGTERM once more stops at once" if number in REQUESTS else ""
            os.write(STDERR, f"\nstopping after this step, then saving{once_more}\n".encode())
