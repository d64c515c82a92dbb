"""What a server can be told.

The surprising fact: every limit of a server is a promise to its other clients. So each is here, with its unit, and none
of them is a number in the code.
Next: server.py.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from mmllm.config.schema import PRECISIONS
from mmllm.errors import UserError

NUMBERS = {int: int, float: float, int | None: int}  # how settings are read, by their type


@dataclass(frozen=True)
class Settings:
    """What a server can be told, each also by the environment variable MMLLM_<NAME>."""

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str | None = None
    api_key: str | None = None  # when set, every POST and DELETE must bring it
    slots: int | None = None  # requests answered side by side; None: 4 on a CPU, 64 on a GPU
    queue: int | None = None  # requests that may wait for a slot; None: 4 for each slot
    max_body_mb: float = 16
    max_new_tokens: int = 512
    max_message_chars: int = 8000
    max_context: int = 2048  # tokens of prompt and answer: reading the prompt is one step, which nobody can interrupt
    conversations: int = 1000  # each keeps its text and one picture of 224 x 224: at most 150 kB
    conversation_ttl_s: float = 3600
    header_timeout_s: float = 10
    body_timeout_s: float = 30
    queue_timeout_s: float = 30
    deadline_s: float = 120
    drain_s: float = 30
    ping_s: float = 15  # a sign of life to those who wait for the next word of a stream

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            is_number = each.type in NUMBERS and value is not None
            if is_number and not (0 < value < math.inf or (each.name == "port" and value == 0)):
                raise UserError(f"MMLLM_{each.name.upper()} is {value}; it must be above 0")
        if self.port > 65535:
            raise UserError(f"MMLLM_PORT is {self.port}; it must be below 65536")
        if self.dtype not in (None, *PRECISIONS):
            raise UserError(f"MMLLM_DTYPE is {self.dtype!r}; it must be one of {', '.join(PRECISIONS)}")

    @classmethod
    def from_environment(cls, environ: dict[str, str]) -> "Settings":
        given = {}
        for each in fields(cls):
            name = f"MMLLM_{each.name.upper()}"
            if name not in environ:
                continue
            number = NUMBERS.get(each.type, str)
            try:
                given[each.name] = number(environ[name])
            except ValueError:
                kind = "a whole number" if number is int else "a number"
                raise UserError(f"{name} is {environ[name]!r}; it must be {kind}") from None
        return cls(**given)

    @property
    def model_name(self) -> str:
        """The model as clients hear of it: no path of this machine."""
        last = Path(self.model).parts[-2:]
        return "/".join(last) if last[-1] == "best_model" or not Path(self.model).is_absolute() else last[-1]
