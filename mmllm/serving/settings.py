"""Every limit of a server, with its unit: each is a promise to the server's other clients."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmllm.config.schema import PRECISIONS
from mmllm.config.validation import describe
from mmllm.errors import UserError

ORIGIN = re.compile(r"\*|https?://[^/\s]+")
Count = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def variable(name: str) -> str:
    return f"MMLLM_{name.upper()}"


class Settings(BaseModel):
    """The settings of a server. Each is also the environment variable MMLLM_<NAME>."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=variable, validate_by_name=True, protected_namespaces=()
    )

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    device: str = "auto"
    dtype: Literal[*PRECISIONS] | None = None
    api_key: str | None = None  # when set, requests must bring it; pages and probes need none
    require_key: bool = False  # refuse to start without a key, as in the container
    cors_origins: str | None = None  # whose pages may use the server, such as "https://a.example, https://b.example"
    slots: Count | None = None  # requests answered side by side; None: 8 on a CPU, 64 on a GPU
    queue: Count | None = None  # requests that may wait for a slot; None: 4 for each slot
    max_body_mb: Amount = 16
    max_reading_mb: Amount = 256  # of all bodies that are being read
    max_new_tokens: Count = 512
    max_message_chars: Count = 8000
    max_context: Count = 2048  # tokens of prompt and answer
    store_mb: float = Field(512, ge=0, allow_inf_nan=False)  # of images and prompts computed before; 0: nothing is kept
    conversations: Count = 1000  # each holds its text and one image of 224 x 224: at most 150 kB
    conversation_ttl_s: Amount = 3600
    state: Path | None = None  # folder of the conversations; None: in memory, or where several workers find them
    header_timeout_s: Amount = 10
    body_timeout_s: Amount = 30  # for a request to arrive, and for a client that has stopped reading to go on
    queue_timeout_s: Amount = 30
    deadline_s: Amount = 120
    drain_s: Amount = 30
    ping_s: Amount = 15  # how often a stream without text gets a comment

    @model_validator(mode="after")
    def check(self) -> "Settings":
        if self.api_key is not None and self.api_key != (self.api_key.strip() or None):
            raise ValueError("MMLLM_API_KEY is empty or has spaces around it; unset it to serve without a key")
        if self.require_key and self.api_key is None:
            raise ValueError("a key is required here; set MMLLM_API_KEY, or MMLLM_REQUIRE_KEY=0 to let anyone in")
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"MMLLM_CORS_ORIGINS has {origin!r}; it must be like https://example.org, or *")
        return self

    @property
    def origins(self) -> list[str]:
        return [origin.strip() for origin in (self.cors_origins or "").split(",") if origin.strip()]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], **flags: object) -> "Settings":
        """The settings in `environ`; `flags` win. Raises UserError for the first wrong value."""
        names = (variable(name) for name in cls.model_fields if name not in flags)
        try:
            return cls.model_validate({name: environ[name] for name in names if name in environ} | flags)
        except ValidationError as error:
            raise UserError(describe(error, cls.model_fields)) from None

    @property
    def model_name(self) -> str:
        """The model's name for clients, without paths of this machine."""
        last = Path(self.model).parts[-2:]
        return "/".join(last) if last[-1] == "best_model" or not Path(self.model).is_absolute() else last[-1]
