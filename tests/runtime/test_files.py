import errno
import json
import subprocess
import sys

import pytest

from conftest import ROOT
from mmllm.errors import CheckpointError, UserError
from mmllm.runtime.files import locked, read_json, read_json_lines, write_json


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "sizes": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"name": "é", "sizes": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"step": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"step": object()})
    assert read_json(tmp_path / "a.json") == {"step": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file; train it first"),
        (b"{", "not JSON; copy it"),
        (b"\xff", "not JSON; copy it"),
        (b"[]", "not a"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_mend(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"a.json: {message}"):
        read_json(tmp_path / "a.json", missing="train it first", damaged="copy it")


def test_json_lines_end_at_newlines_only_and_a_cut_off_line_is_dropped(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\x1cf", "g\vh"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"text": "cut']), encoding="utf-8")
    assert read_json_lines(tmp_path / "rows.jsonl") == [{"text": text} for text in texts]
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_lock_on_a_folder_ends_with_its_process_even_if_that_is_killed(tmp_path):
    program = (
        f"from pathlib import Path; from mmllm.runtime.files import locked\nwith locked(Path({str(tmp_path)!r})):\n"
    )
    program += "    print('locked', flush=True)\n    input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(UserError, match=f"another run is writing there .process {holder.pid} on "),
            locked(tmp_path),
        ):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mmllm.runtime.files.fcntl.flock", refuse)
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: cannot be locked (No locks available); start no second run in it\n"
    )
