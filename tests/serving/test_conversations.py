"""The store of conversations where several processes share it. Alone in one process: test_answers.py."""

import asyncio
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmllm.errors import UserError
from mmllm.serving import conversations
from mmllm.serving.conversations import Conversation, Conversations

TURN = ("Is 5 > 3?\n\N{CAT}", 'It "is".')


def opened(folder: Path, limit: int = 10):
    return closing(Conversations(limit, 60, folder))


def test_what_one_process_stores_another_one_reads(tmp_path):
    image = Image.linear_gradient("L").convert("RGB").resize((8, 6))
    stored = replace(Conversation((TURN,)).with_image(image), dropped=2)
    with opened(tmp_path) as first, opened(tmp_path) as second:
        first.put("a", stored)
        read = second.get("a")
    assert (read.turns, read.image_turn, read.dropped) == ((TURN,), 1, 2)
    assert (read.image.mode, read.image.size, read.image.tobytes()) == ("RGB", (8, 6), image.tobytes())


def test_the_limit_holds_for_all_processes_together(tmp_path):
    with opened(tmp_path, limit=2) as first, opened(tmp_path, limit=2) as second:
        for store, name in ((first, "a"), (second, "b"), (first, "c")):
            store.put(name, Conversation((TURN,)))
        assert [bool(second.get(name).turns) for name in "abc"] == [False, True, True]


def test_others_on_the_machine_cannot_read_conversations(tmp_path):
    with opened(tmp_path / "state") as store:
        store.put("a", Conversation((TURN,)))
        files = [file for file in (tmp_path / "state").iterdir() if "sqlite" in file.name]
        assert len(files) == 3 and {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


HOLD = """
import asyncio, sys
from pathlib import Path
from mmllm.serving.conversations import Conversations

async def hold():
    async with Conversations(10, 60, Path(sys.argv[1])).lock("a"):
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(hold())
"""


@pytest.mark.slow
def test_a_turn_waits_for_the_turn_of_another_process_and_not_for_a_killed_one(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with opened(tmp_path) as store, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"

        async def take(name: str) -> str:
            async with store.lock(name):
                return name

        async def turns() -> None:
            assert await take("b") == "b"
            waiting = asyncio.create_task(take("a"))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            other.kill()
            assert await waiting == "a"

        asyncio.run(turns())


def test_a_folder_that_cannot_be_used_is_named_with_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"conversations cannot be kept in .*file.*; set MMLLM_STATE to a folder"):
        Conversations(10, 60, tmp_path / "file")
    (tmp_path / "conversations.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        Conversations(10, 60, tmp_path)


def test_the_shared_folder_is_ours_alone_and_forgets_parents_that_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = conversations.shared_folder()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for path in (folder, folder.with_name(str(ended.pid))):
        path.mkdir()
    (folder.parent / "notes.txt").touch()
    assert conversations.shared_folder() == folder
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "notes.txt"}
    folder.parent.chmod(0o755)
    with pytest.raises(UserError, match="open to other users"):
        conversations.shared_folder()
