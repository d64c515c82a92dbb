"""Streamed text: pieces of whole characters, cut exactly at the first stop string."""

import random

import pytest

from mmllm.data.tokenizer import Tokenizer
from mmllm.inference.text_stream import AnswerText
from official import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def stream(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], AnswerText, int]:
    """The emitted pieces, the text, and the number of tokens used."""
    text, pieces = AnswerText(tokenizer, stops), []
    used = 0
    for token in ids:
        used += 1
        pieces.append(text.feed(token))
        if text.is_stopped:
            break
    pieces.append(text.close(ids[:used]))
    return pieces, text, used


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    words = "the cat: 👩‍👩‍👧 ünd 图片 in the thing"
    pieces, text, _ = stream(tokenizer, tokenizer.encode(words))
    assert "".join(pieces) == text.text == words
    assert all("\ufffd" not in piece for piece in pieces) and "👩" in pieces


def test_any_ids_give_the_decoded_text_without_an_incomplete_character_at_its_end(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        pieces, text, _ = stream(tokenizer, ids)
        assert "".join(pieces) == text.text == tokenizer.decode(ids).rstrip("\ufffd")


def first_stop(text: str, stops: tuple[str, ...]) -> str:
    """The slow way: character by character, until one of `stops` is complete."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


def test_text_is_cut_at_the_first_stop_string_and_no_part_of_it_is_emitted(tokenizer):
    rng = random.Random(1)
    for _ in range(400):
        words = "".join(rng.choices("abc the\n", k=rng.randrange(1, 40)))
        stops = tuple("".join(rng.choices("abc \n", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4)))
        pieces, text, used = stream(tokenizer, tokenizer.encode(words), stops)
        assert "".join(pieces) == text.text == first_stop(words, stops)
        assert text.is_stopped == (text.text != words)
        assert text.is_stopped or used == len(tokenizer.encode(words))


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided(tokenizer):
    text = AnswerText(tokenizer, ("ab:",))
    ids = tokenizer.encode("xabab:y")
    assert [text.feed(token) for token in ids[:5]] == ["x", "", "", "ab", ""]
    assert text.feed(ids[5]) == "" and text.is_stopped and text.text == "xab"


def test_a_stop_string_may_end_inside_a_token(tokenizer):
    ids = tokenizer.encode("x the cat")
    assert len(tokenizer.encode(" the")) == 1
    pieces, text, used = stream(tokenizer, ids, (" th",))
    assert (text.text, used) == ("x", 2)


def test_text_held_back_is_emitted_when_the_answer_ends(tokenizer):
    assert "".join(stream(tokenizer, tokenizer.encode("one ab"), ("abc",))[0]) == "one ab"
