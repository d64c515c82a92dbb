"""Whole answers: greedy and beams as transformers' generate gives them, beams as worked out by hand."""

import math

import pytest
import torch

from mmllm.errors import UserError
from mmllm.inference.engine import generate
from mmllm.inference.request import Generated, GenerationConfig, Prompt
from mmllm.models.multimodal import MultimodalLLM
from official import write_model

NO_IMAGE = torch.zeros(0, 3, 32, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultimodalLLM:
    return MultimodalLLM.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


def text_prompt(*ids: int) -> Prompt:
    return Prompt(ids, NO_IMAGE)


def answer(model: MultimodalLLM, prompt: Prompt, **options) -> Generated:
    return next(generate(model, [prompt], GenerationConfig(**options)))


def test_greedy_is_the_argmax_of_the_whole_sequence_at_every_step(model):
    """The cache against the slow way: the whole text anew for every token."""
    ids = [5, 17, 3, 200]
    fast = answer(model, text_prompt(*ids), max_new_tokens=12).ids
    with torch.no_grad():
        for token in fast:
            assert model.logits(torch.tensor([ids]), NO_IMAGE)[0, -1].argmax() == token
            ids.append(token)


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(model):
    first, again, other = (
        answer(model, text_prompt(5, 6), max_new_tokens=10, temperature=1.5, seed=seed).ids for seed in (7, 7, 8)
    )
    assert first == again != other


def test_images_change_the_answer(model):
    image_id, places = model.config.image_token_id, model.config.num_image_tokens
    prompt = (4, *[image_id] * places, 9)
    images = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = (answer(model, Prompt(prompt, pixels), max_new_tokens=10).ids for pixels in images)
    assert first != second


def test_cancelled_answers_end_within_one_step(model):
    asked = iter([False, False, True])
    prompts, config = [text_prompt(5, 6), text_prompt(9)], GenerationConfig(max_new_tokens=50, min_new_tokens=50)
    answers = list(generate(model, prompts, config, is_cancelled=lambda: next(asked, True)))
    assert [(one.finish_reason, len(one.ids)) for one in answers] == [("cancelled", 3)] * 2  # three steps


def test_a_prompt_without_room_for_the_answer_is_refused_with_both_counts(model):
    room = model.config.text.max_position_embeddings
    with pytest.raises(UserError, match=rf"2 tokens and max_new_tokens is {room - 1}.* {room} positions"):
        answer(model, text_prompt(5, 6), max_new_tokens=room - 1)


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


HYPOTHESES = [  # options, then the hypotheses and their scores, as worked out by hand
    ({"length_penalty": 0.0}, {"b": -1.33750, "ab": -2.40795}),
    ({"length_penalty": 1.0}, {"b": -0.66875, "ab": -0.80265}),
    ({"length_penalty": 2.0}, {"ab": -0.26755, "b": -0.33438}),
    ({"length_penalty": 2.0, "early_stopping": "never"}, {"aaab": -0.19264, "aab": -0.22574}),
    ({"length_penalty": -1.0}, {"b": -2.67501, "ab": -7.22384}),
    ({"length_penalty": 1.0, "min_new_tokens": 3}, {"aab": -0.90298, "aaab": -0.96318}),
    ({"num_beams": 3, "length_penalty": 2.0}, {"aaab": -0.19264, "aab": -0.22574, "aaaaa": -0.22929}),
    ({"num_beams": 3, "length_penalty": 2.0, "early_stopping": True}, {"aab": -0.22574, "ab": -0.26755, "b": -0.33438}),
]


@pytest.mark.parametrize("options, wanted", HYPOTHESES)
def test_beam_search_finds_the_hypotheses_worked_out_by_hand(bigram_model, options, wanted):
    options = {"max_new_tokens": 5, "num_beams": 2, "num_return_sequences": len(wanted)} | options
    found_answer = answer(bigram_model, text_prompt(S), **options)
    found = {
        "".join({A: "a", B: "b", C: "c"}[token] for token in one.ids): one.score for one in found_answer.hypotheses
    }
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), abs=1e-4)
    for one in found_answer.hypotheses:
        assert one.finish_reason == ("length" if len(one.ids) == 5 else "stop")
        tokens = len(one.ids) + (one.finish_reason == "stop")
        assert one.score == pytest.approx(one.logprob / tokens ** options["length_penalty"])
    best = found_answer.hypotheses[0]
    assert (found_answer.ids, found_answer.text) == (best.ids, best.text)


# --- whole answers of transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(write_model(tmp_path_factory.mktemp("theirs"))).eval()


def generated_by_transformers(theirs, ids: list[int], stop_ids: list[int], **options) -> tuple[list, list | None]:
    """The answers, without their end tokens, and the scores of beams."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1}
    out = theirs.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        eos_token_id=stop_ids, pad_token_id=stop_ids[0], return_dict_in_generate=True, output_scores=True,
        **plain | options,
    )  # fmt: skip
    answers = [[token for token in row if token not in stop_ids] for row in out.sequences[:, len(ids) :].tolist()]
    return answers, out.sequences_scores.tolist() if "num_return_sequences" in options else None


@pytest.mark.filterwarnings("ignore")  # transformers names the sampling options that greedy decoding does not use
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 20}, {"repetition_penalty": 0.9}], ids=str
)
def test_a_greedy_answer_is_that_of_transformers(model, theirs, options):
    stop_ids = list(model.processor.tokenizer.stop_ids)
    for ids in ([7, 30, 12, 99], [5], [250, 3, 3, 80, 41, 6]):
        ours = answer(model, text_prompt(*ids), max_new_tokens=25, **options)
        assert [list(ours.ids)] == generated_by_transformers(theirs, ids, stop_ids, max_new_tokens=25, **options)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.2},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 4, "min_new_tokens": 5, "length_penalty": -1.0},
    ],
    ids=str,
)
def test_beams_and_their_scores_are_those_of_transformers(model, theirs, options):
    options = {"max_new_tokens": 9, "num_return_sequences": options["num_beams"]} | options
    stop_ids = list(model.processor.tokenizer.stop_ids)
    for ids in ([7, 30, 12, 99], [5]):
        ours = answer(model, text_prompt(*ids), **options).hypotheses
        answers, scores = generated_by_transformers(theirs, ids, stop_ids, **options)
        assert [list(one.ids) for one in ours] == answers
        assert [one.score for one in ours] == pytest.approx(scores, abs=1e-3)  # sums of nine tokens, once times nine
