"""What the server remembers between the turns of a conversation: text and one image.

A conversation is an immutable value. A turn makes a new one, which is stored only when its answer exists, so a turn
that failed or was cancelled leaves nothing behind. The store is an SQLite database: in memory, or in a folder that
several worker processes share and that outlives each of them.
"""

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from mmllm.data.chat import Message, assistant, user
from mmllm.errors import UserError
from mmllm.runtime.files import fcntl
from mmllm.serving.http import HttpError

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS conversations (name TEXT PRIMARY KEY, used REAL, turns TEXT, image BLOB);
CREATE INDEX IF NOT EXISTS by_use ON conversations (used);
"""
LOCK_EVERY_S = 0.02  # how often a worker asks whether another one has finished its turn


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
    users: int = 0  # requests of this process that hold the lock or wait for it


class Conversations:
    """The `limit` conversations used last, each within `ttl_s` seconds. Whoever knows an id can continue it.

    They are kept in `folder` (None: in memory). UserError where it cannot be used.
    """

    def __init__(self, limit: int, ttl_s: float, folder: Path | None = None):
        self.limit, self.ttl_s = limit, ttl_s
        self.locks: dict[str, ConversationLock] = {}
        self.lock_file = self.database = None
        try:
            if folder is not None:
                if fcntl is None:
                    raise OSError("this system has no locks for it")
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.lock_file = (folder / "locks").open("w")
                (folder / "conversations.sqlite").touch(mode=0o600)
            place = ":memory:" if folder is None else folder / "conversations.sqlite"
            # used by the event loop only, whichever thread that is
            self.database = sqlite3.connect(place, check_same_thread=False)
            self.database.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise UserError(
                f"conversations cannot be kept in {folder} ({error}); set MMLLM_STATE to a folder"
            ) from None

    def close(self) -> None:
        for opened in (self.database, self.lock_file):
            if opened is not None:
                opened.close()

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[None]:
        """One request at a time per conversation; a second one in this process waits, a third one is refused."""
        lock = self.locks.setdefault(name, ConversationLock())
        if lock.users == 2:
            message = f"conversation {name} has one question in progress and one waiting; wait for an answer first"
            raise HttpError(409, "conversation_busy", message, param="conversation_id")
        lock.users += 1
        try:
            async with lock.lock, self.lock_between_processes(name):
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self.locks[name]

    @asynccontextmanager
    async def lock_between_processes(self, name: str) -> AsyncIterator[None]:
        """Locks one byte of a file, which the system unlocks however the process ends."""
        if self.lock_file is None:
            yield
            return
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        while True:
            try:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except BlockingIOError:
                await asyncio.sleep(LOCK_EVERY_S)
        try:
            yield
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN, 1, place)

    def get(self, name: str) -> Conversation:
        """The conversation so far; a new one if the id is unknown or expired."""
        query = "SELECT turns, image FROM conversations WHERE name = ? AND used > ?"
        row = self.database.execute(query, (name, time.time() - self.ttl_s)).fetchone()
        if row is None:
            return Conversation()
        turns, image_turn, dropped, size = json.loads(row[0])
        image = None if row[1] is None else Image.frombytes("RGB", size, row[1])
        return Conversation(tuple(map(tuple, turns)), image, image_turn, dropped)

    def put(self, name: str, conversation: Conversation) -> None:
        now, image = time.time(), conversation.image
        size, pixels = (image.size, image.tobytes()) if image else (None, None)
        text = json.dumps([conversation.turns, conversation.image_turn, conversation.dropped, size])
        oldest = "SELECT used FROM conversations ORDER BY used DESC LIMIT 1 OFFSET ?"
        with self.database:
            row = (name, now, text, pixels)
            self.database.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?)", row)
            delete = f"DELETE FROM conversations WHERE used <= ? OR used < ({oldest})"
            self.database.execute(delete, (now - self.ttl_s, self.limit - 1))

    def delete(self, name: str) -> None:
        with self.database:
            self.database.execute("DELETE FROM conversations WHERE name = ?", (name,))


def shared_folder() -> Path:
    """The folder of the workers that have the same parent process; those of parents that ended are removed."""
    above = Path(tempfile.gettempdir()) / f"mmllm-{os.getuid()}"
    above.mkdir(mode=0o700, exist_ok=True)
    if above.is_symlink() or above.stat().st_uid != os.getuid() or above.stat().st_mode & 0o077:
        raise UserError(f"{above}: open to other users, so no place for conversations; set MMLLM_STATE to a folder")
    for other in above.iterdir():
        if other.name.isdigit() and not is_running(int(other.name)):
            shutil.rmtree(other, ignore_errors=True)
    return above / str(os.getppid())


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
