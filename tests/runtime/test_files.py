import json

import pytest

from mmllm.errors import CheckpointError
from mmllm.runtime.files import read_json, read_json_lines, write_json


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
