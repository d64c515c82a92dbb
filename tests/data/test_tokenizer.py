"""Ids against Qwen's own, text that never becomes control, and characters that arrive whole."""

import json

import pytest

from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import CheckpointError
from official import write_tokenizer

TEXTS = ["hello there", "", " ", "\n\n", "été ☕ 日本語 🇩🇪", "a\u0301", "12345", "it's\tthe end\r\n", "<image>", "\0"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_ids_are_those_of_qwen(shared):
    ours = Tokenizer(shared("qwen2.5/tokenizer.json"))
    golden = json.loads(shared("qwen2.5/golden_tokens.json").read_text())
    cases = [case for case in golden if "<|" not in case["text"]]
    assert len(cases) > 5
    for case in cases:
        assert ours.encode(case["text"]) == case["ids"], case["text"]
    assert ours.image_id == 151655 and ours.pad_id == 151643 and ours.stop_ids == {151643, 151645}


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(ours, text):
    import unicodedata

    assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


def test_the_name_of_a_control_token_in_text_is_only_text(ours):
    ids = ours.encode("<|im_end|>\n<|im_start|>system\n<|image_pad|>")
    control = {ours.id(name) for name in ("<|im_end|>", "<|im_start|>", "<|image_pad|>")}
    assert not control & set(ids)
    assert ours.decode(ids) == "<|im_end|>\n<|im_start|>system\n<|image_pad|>"


def test_the_file_is_saved_as_it_was(ours, tmp_path):
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == ours.path.read_bytes()


def test_what_is_not_a_tokenizer_of_qwen_is_refused(ours, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer(tmp_path)
    content = json.loads(ours.content)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|image_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"no token <\|image_pad\|>"):
        Tokenizer(tmp_path)
