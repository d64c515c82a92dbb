"""Decoding: each option against transformers' own processors, beams against values worked out by hand."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from mmllm.errors import GenerationError, UserError
from mmllm.generate import GenerationConfig, Prompt, draw, filter_top, generate, penalise_repetition
from mmllm.model import MultimodalLLM
from official import write_model

NO_IMAGE = torch.zeros(0, 3, 32, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultimodalLLM:
    return MultimodalLLM.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


def text_prompt(*ids: int) -> Prompt:
    return Prompt(ids, NO_IMAGE)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(6, 97, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("top_k", [1, 2, 50, 96, 97, 500])
def test_top_k_keeps_what_transformers_keeps(scores, top_k):
    assert_close(filter_top(scores, top_k, 1.0), TopKLogitsWarper(top_k)(None, scores))


def test_tokens_that_tie_with_the_last_of_the_top_k_stay():
    kept = filter_top(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), 2, 1.0).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.95, 0.9999])
def test_top_p_keeps_what_transformers_keeps(scores, top_p):
    assert_close(filter_top(scores, 0, top_p), TopPLogitsWarper(top_p)(None, scores))


def test_top_p_keeps_the_token_that_crosses_the_line():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {p: int(filter_top(scores, 0, p).isfinite().sum()) for p in (0.49, 0.51, 0.79, 0.81, 0.9999)}
    assert kept == {0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.9999: 4}


def test_the_repetition_penalty_is_that_of_transformers(scores):
    ids = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 97, dtype=torch.bool).scatter(1, ids, True)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    assert_close(penalise_repetition(scores, seen, 1.3), wanted)


def test_draws_follow_the_probabilities():
    chance = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    tokens = draw(torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(20000, -1), chance)
    assert_close(tokens.bincount() / 20000, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.01, rtol=0)


def test_a_draw_never_takes_a_token_of_probability_zero():
    probabilities = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, -1)
    assert draw(probabilities, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [1, 1, 1]


def test_greedy_is_the_argmax_of_the_whole_sequence_at_every_step(model):
    """The cache against the slow way: the whole text anew for every token."""
    ids = [5, 17, 3, 200]
    fast = generate(model, [text_prompt(*ids)], GenerationConfig(max_new_tokens=12))[0].ids
    with torch.no_grad():
        for token in fast:
            assert model.logits(torch.tensor([ids]), NO_IMAGE)[0, -1].argmax() == token
            ids.append(token)


def test_an_answer_does_not_depend_on_its_neighbours(model):
    prompts = [text_prompt(*range(3, 3 + n)) for n in (2, 9, 30, 1)]
    for config in (GenerationConfig(max_new_tokens=8), GenerationConfig(max_new_tokens=8, temperature=1.0, seed=3)):
        alone = [generate(model, [prompt], config)[0].ids for prompt in prompts]
        assert [answer.ids for answer in generate(model, prompts, config)] == alone


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(model):
    first, again, other = (
        generate(model, [text_prompt(5, 6)], GenerationConfig(max_new_tokens=10, temperature=1.5, seed=seed))[0].ids
        for seed in (7, 7, 8)
    )
    assert first == again != other


def test_pictures_change_the_answer(model):
    image_id, places = model.config.image_token_id, model.config.num_image_tokens
    prompt = (4, *[image_id] * places, 9)
    pictures = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = (
        generate(model, [Prompt(prompt, pixels)], GenerationConfig(max_new_tokens=10))[0].ids for pixels in pictures
    )
    assert first != second


def test_a_cancelled_answer_ends_within_one_step(model):
    heard = []
    answer = generate(
        model,
        [text_prompt(5, 6)],
        GenerationConfig(max_new_tokens=50),
        on_token=lambda row, token: heard.append(token),
        cancelled=lambda: len(heard) == 3,
    )[0]
    assert (answer.finish_reason, len(answer.ids)) == ("cancelled", 3)


def test_logits_that_are_not_finite_are_an_error_and_not_exclamation_marks(model):
    weight = model.language_model.model.norm.weight
    before = weight.detach().clone()
    weight.data[0] = math.nan
    try:
        with pytest.raises(GenerationError, match="not finite at token 0"):
            generate(model, [text_prompt(5)], GenerationConfig())
    finally:
        weight.data.copy_(before)


def test_a_prompt_without_room_for_the_answer_is_refused_with_both_counts(model):
    room = model.config.text.max_position_embeddings
    with pytest.raises(UserError, match=rf"2 tokens and max_new_tokens is {room - 1}.* {room} positions"):
        generate(model, [text_prompt(5, 6)], GenerationConfig(max_new_tokens=room - 1))


@pytest.mark.parametrize(
    "field, value",
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.inf), ("top_k", -5), ("top_p", 0.0),
     ("top_p", 2.0), ("num_beams", 0), ("seed", -1), ("seed", 2**63), ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field} is {value}"):
        GenerationConfig(**{field: value})


# --- beam search on a model whose next-token probabilities are a table -------------------------------------------

S, A, B, C = 10, 11, 12, 13
BIGRAMS = {S: (0.4, 0.35, 0.15, 0.1), A: (0.3, 0.3, 0.2, 0.2), B: (0.1, 0.05, 0.1, 0.75), C: (0.6, 0.1, 0.1, 0.2)}


@pytest.fixture(scope="module")
def bigram_model(tmp_path_factory) -> MultimodalLLM:
    """Real code, weights by hand: layers add nothing, embeddings are one-hot, the head holds log-probabilities."""
    folder = write_model(tmp_path_factory.mktemp("bigram"), tie_word_embeddings=False)
    model = MultimodalLLM.from_pretrained(folder)
    width, vocab = model.config.text.hidden_size, model.config.text.vocab_size
    end = model.processor.tokenizer.id("<|im_end|>")
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.language_model.model.norm.weight.fill_(1.0)
        model.language_model.model.embed_tokens.weight.copy_(torch.eye(vocab, width))
        table = torch.full((vocab, width), 1e-12)
        for row, probabilities in BIGRAMS.items():
            table[[A, B, C, end], row] = torch.tensor(probabilities)
        model.language_model.lm_head.weight.copy_(table.log() / math.sqrt(width))
    return model


@pytest.mark.parametrize(
    "beams, length_penalty, wanted",
    [(2, 0.0, "b"), (2, 1.0, "b"), (2, 2.0, "ab"), (2, -1.0, "b"), (3, 2.0, "aaab")],
)
def test_beam_search_finds_the_hypothesis_worked_out_by_hand(bigram_model, beams, length_penalty, wanted):
    config = GenerationConfig(max_new_tokens=5, num_beams=beams, length_penalty=length_penalty)
    answer = generate(bigram_model, [text_prompt(S)], config)[0]
    assert "".join({A: "a", B: "b", C: "c"}[token] for token in answer.ids) == wanted
    assert answer.finish_reason == "stop"


def test_beams_are_those_of_transformers_on_a_whole_model(tmp_path):
    from transformers import LlavaForConditionalGeneration

    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    ours, theirs = MultimodalLLM.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([[7, 30, 12, 99]])
    stop_ids = list(ours.processor.tokenizer.stop_ids)
    for beams, penalty in ((2, 1.0), (4, 0.5)):
        found = generate(
            ours,
            [text_prompt(*ids[0].tolist())],
            GenerationConfig(max_new_tokens=9, num_beams=beams, length_penalty=penalty),
        )
        wanted = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, num_beams=beams, do_sample=False,
            length_penalty=penalty, eos_token_id=stop_ids, pad_token_id=stop_ids[0], repetition_penalty=1.0,
            top_k=0, top_p=1.0, temperature=1.0,
        )[0, 4:].tolist()  # fmt: skip
        assert list(found[0].ids) == [token for token in wanted if token not in stop_ids], config["model_type"]
