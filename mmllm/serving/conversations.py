"""What the server remembers between the turns of a conversation: text and one image.

A conversation is an immutable value. A turn makes a new one, which is stored only when its answer exists, so a turn
that failed or was cancelled leaves nothing behind. The store lives in this process: run one process.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from PIL import Image

from mmllm.data.chat import Message, assistant, user
from mmllm.serving.http import HttpError


@dataclass(frozen=True)
class Conversation:
    """Turns of question and answer, and the image they are about, which precedes question number `image_turn`."""

    turns: tuple[tuple[str, str], ...] = ()
    image: Image.Image | None = None  # cropped and resized already
    image_turn: int = 0
    dropped: int = 0  # oldest turns, removed because they no longer fit the context

    def with_image(self, image: Image.Image) -> "Conversation":
        """With a new image at the next question, in place of any earlier one."""
        return replace(self, image=image, image_turn=len(self.turns))

    def without_oldest_turn(self) -> "Conversation":
        """The image stays: it moves to the oldest question left."""
        return replace(self, turns=self.turns[1:], image_turn=max(0, self.image_turn - 1), dropped=self.dropped + 1)

    def messages(self, question: str) -> list[Message]:
        """The whole conversation followed by `question`."""
        messages = []
        for i, (text, answer) in enumerate([*self.turns, (question, "")]):
            messages += [user(text, images=int(self.image is not None and i == self.image_turn)), assistant(answer)]
        return messages[:-1]


@dataclass
class ConversationLock:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0  # requests that hold the lock or wait for it


class Conversations:
    """The `limit` conversations used last, each within `ttl_s` seconds. Whoever knows an id can continue it."""

    def __init__(self, limit: int, ttl_s: float):
        self.limit, self.ttl_s = limit, ttl_s
        self.stored: OrderedDict[str, tuple[float, Conversation]] = OrderedDict()  # least recently used first
        self.locks: dict[str, ConversationLock] = {}

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[None]:
        """One request at a time per conversation; a second one waits, a third one is refused."""
        lock = self.locks.setdefault(name, ConversationLock())
        if lock.users == 2:
            message = f"conversation {name} has one question in progress and one waiting; wait for an answer first"
            raise HttpError(409, "conversation_busy", message, param="conversation_id")
        lock.users += 1
        try:
            async with lock.lock:
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self.locks[name]

    def get(self, name: str) -> Conversation:
        """The conversation so far; a new one if the id is unknown or expired."""
        used, conversation = self.stored.get(name, (-math.inf, Conversation()))
        return conversation if time.monotonic() - used < self.ttl_s else Conversation()

    def put(self, name: str, conversation: Conversation) -> None:
        now = time.monotonic()
        self.stored[name] = (now, conversation)
        self.stored.move_to_end(name)
        while len(self.stored) > self.limit or now - next(iter(self.stored.values()))[0] >= self.ttl_s:
            self.stored.popitem(last=False)

    def delete(self, name: str) -> None:
        self.stored.pop(name, None)
