"""What the server remembers between the turns of a conversation: text, and one picture.

The surprising fact: a conversation is a value. A turn makes a new one and the store takes it only when the answer is
there, so a turn that failed or was given up leaves nothing behind. All of it lives in this process: one server, one
process. Next: server.py.
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
    """Turns of question and answer, and the picture they are about, which stands in front of question `image_turn`."""

    turns: tuple[tuple[str, str], ...] = ()
    image: Image.Image | None = None  # cropped and resized already
    image_turn: int = 0
    dropped: int = 0  # turns that no longer fit the context

    def with_image(self, image: Image.Image) -> "Conversation":
        """A new picture, shown with the next question, takes the place of the old one."""
        return replace(self, image=image, image_turn=len(self.turns))

    def without_oldest(self) -> "Conversation":
        """The picture stays: it moves to the oldest question left."""
        return replace(self, turns=self.turns[1:], image_turn=max(0, self.image_turn - 1), dropped=self.dropped + 1)

    def messages(self, question: str) -> list[Message]:
        """All that was said, and the next question."""
        questions = [*(asked for asked, _ in self.turns), question]
        messages = [
            user(q, images=int(self.image is not None and i == self.image_turn)) for i, q in enumerate(questions)
        ]
        for i in range(len(self.turns), 0, -1):
            messages.insert(i, assistant(self.turns[i - 1][1]))
        return messages


@dataclass
class Place:
    """Where the requests of one conversation wait for their turn."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Conversations:
    """The last `limit` conversations used within `ttl_s`, in memory. An id is all it takes to go on with one."""

    def __init__(self, limit: int, ttl_s: float):
        self.limit, self.ttl_s = limit, ttl_s
        self.kept: OrderedDict[str, tuple[float, Conversation]] = OrderedDict()
        self.places: dict[str, Place] = {}

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """One request at a time per conversation; a second waits, a third is refused."""
        place = self.places.setdefault(name, Place())
        if place.users == 2:
            message = f"conversation {name} has a question under way and another waiting; wait for an answer first"
            raise HttpError(409, "conversation_busy", message, param="conversation_id")
        place.users += 1
        try:
            async with place.lock:
                yield
        finally:
            place.users -= 1
            if not place.users:
                del self.places[name]

    def get(self, name: str) -> Conversation:
        """The conversation so far; an unknown or expired one is new."""
        used, conversation = self.kept.get(name, (-math.inf, Conversation()))
        return conversation if time.monotonic() - used < self.ttl_s else Conversation()

    def put(self, name: str, conversation: Conversation) -> None:
        self.kept[name] = (time.monotonic(), conversation)
        self.kept.move_to_end(name)
        while len(self.kept) > self.limit or time.monotonic() - self.oldest() >= self.ttl_s:
            self.kept.popitem(last=False)

    def oldest(self) -> float:
        return next(iter(self.kept.values()))[0]

    def forget(self, name: str) -> None:
        self.kept.pop(name, None)
