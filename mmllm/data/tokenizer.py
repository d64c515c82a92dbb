"""Text to ids and back, over the `tokenizers` library.

Text never becomes a control token here. `<|im_end|>` in a user's text is encoded as those ten characters; control tokens
are only added by name, through `id`. So no text can close its own turn and continue as the system.
"""

import codecs
from pathlib import Path

import tokenizers

from mmllm.errors import CheckpointError, UserError

FILE = "tokenizer.json"


def byte_characters() -> dict[str, int]:
    """The byte that each character of a token stands for in byte-level BPE: printable ones stand for themselves.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_characters()


class Tokenizer:
    """The tokenizer of a model folder (or one `tokenizer.json`), with Qwen2.5's control tokens."""

    def __init__(self, source: str | Path):
        source = Path(source)
        self.path = source / FILE if source.is_dir() else source
        if not self.path.exists():
            raise CheckpointError(f"{self.path}: no such file; a model directory needs its {FILE}")
        try:
            # kept: the folder may be gone when the model is saved
            self.content = self.path.read_bytes().removeprefix(codecs.BOM_UTF8)
            self.inner = tokenizers.Tokenizer.from_str(self.content.decode())
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{self.path}: not a tokenizer; copy it again from its source") from error
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True
        self.pad_id = self.id("<|endoftext|>")
        self.stop_ids = frozenset({self.id("<|im_end|>"), self.pad_id})
        self.image_id = self.id("<|image_pad|>")

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows, never fewer."""
        return self.inner.get_vocab_size()

    def id(self, token: str) -> int:
        """The id of a control token, by its name."""
        number = self.inner.token_to_id(token)
        if number is None:
            raise CheckpointError(f"{self.path}: has no token {token}; is this the tokenizer of a Qwen2.5 model?")
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; names of control tokens in it are encoded as text. UserError for text that is no Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text after {text[: error.start].strip()[-20:]!r} is not Unicode; write it as UTF-8"
            ) from error
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """The text of `ids` without control tokens."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, number: int) -> bytes:
        """The bytes of a token, which may be part of a character; those of its name for a control token."""
        text = self.inner.id_to_token(number) or ""
        return bytes(BYTES[char] for char in text) if all(char in BYTES for char in text) else text.encode()

    def save(self, folder: str | Path) -> None:
        """Writes the file byte for byte as it was read; the library's own `save` would change it."""
        (Path(folder) / FILE).write_bytes(self.content)
