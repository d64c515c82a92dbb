"""The exceptions that a command shows as one line, and its exit codes.

`UserError` is bad input: the line names the file or field and what to do, exit code 2. `RunError` is good input whose
work failed, exit code 1. Anything else is a bug and keeps its traceback.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line that is understood on its own and says what to do."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """A data file or one of its samples cannot be used."""


class CheckpointError(UserError):
    """A model directory or a weights file is missing, incomplete, or of another shape."""


class ImageError(UserError):
    """An image cannot be used; `code` is a stable snake_case name of the reason."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class RunError(RuntimeError):
    """The input is good but the work failed. The message is one line."""


class GenerationError(RunError):
    """The model produced no usable logits."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit: 0 or what it returns, 2 bad input, 1 failed run, 130 Ctrl-C, 141 closed pipe (`| head`).

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
        # The reader is gone. Python flushes once more at exit and would complain: give it a place to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # While the interpreter shuts down, a thread of the process group may still want its lock. Then the process aborts
        # ("terminate called without an active exception") and a run that is saved counts as failed: exit at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
