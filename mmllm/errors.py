"""What can go wrong for a user, and how a command line says it.

Bad input is a `UserError`: one line that names the file or field and the mend, exit code 2.
A run that fails is a `RunError`: one line, exit code 1. Anything else is a bug and keeps its traceback.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input; the message is one line that stands alone and says the mend."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """A data file or one of its samples cannot be used."""


class CheckpointError(UserError):
    """A model directory or a weights file is missing, incomplete, or of another shape."""


class ImageError(UserError):
    """A picture cannot be used; `code` is a stable snake_case name of the reason."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class RunError(RuntimeError):
    """Valid input, but the work failed; the message is one line."""


class GenerationError(RunError):
    """The model produced no usable logits."""


def leave(code: int) -> NoReturn:
    """End this process with `code`; one of several that torchrun started, at once.

    While the interpreter ends, a thread of the process group may still want its lock: then all of it aborts
    ("terminate called without an active exception"), and a run that is whole and saved counts as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and leave with the exit code that its outcome deserves.

    0 or what `main` returns; 2 bad input; 1 failed run; 130 Ctrl-C; 141 closed pipe (`| head`).
    `MMLLM_DEBUG=1` shows the traceback instead of the one line.
    """
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except (UserError, RunError) as error:
        if os.environ.get("MMLLM_DEBUG") == "1":
            raise
        if isinstance(error, RunError) or os.environ.get("RANK", "0") == "0":  # bad input is the same in every process
            print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(flush=True)
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader left. Python would complain once more while flushing at exit: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    leave(code)
