"""The engine: requests come and go between steps, and none of them notices the others."""

import math
import random
import shutil
from contextlib import contextmanager

import pytest
import torch

from mmllm.errors import GenerationError, UserError
from mmllm.inference.engine import Engine
from mmllm.inference.generate import generate_each
from mmllm.inference.optimize import load_model
from mmllm.inference.request import Handle, Prompt
from mmllm.inference.sampling import GenerationConfig
from mmllm.inference.static_step import FixedStep
from mmllm.layers.quantized import quantize_
from mmllm.models.multimodal import MultimodalLLM
from official import write_model

NO_IMAGE = torch.zeros(0, 3, 32, 32)
SHORT = GenerationConfig(max_new_tokens=8)
ENDLESS = GenerationConfig(max_new_tokens=1500, min_new_tokens=1500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder) -> MultimodalLLM:
    return MultimodalLLM.from_pretrained(folder)


def text_prompt(*ids: int) -> Prompt:
    return Prompt(ids, NO_IMAGE)


def picture_prompt(model: MultimodalLLM, seed: int, *words: int) -> Prompt:
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Prompt((4, *[model.config.image_token_id] * model.config.num_image_tokens, *words), pixels)


def run(engine: Engine, *handles: Handle) -> list:
    while engine.step():
        pass
    return [handle.answer for handle in handles]


def alone(model: MultimodalLLM, prompt: Prompt, config: GenerationConfig):
    engine = Engine(model, 1)
    return run(engine, engine.submit(prompt, config))[0]


def ragged_requests(model: MultimodalLLM) -> list[tuple[Prompt, GenerationConfig]]:
    """64 questions of all lengths, some with a picture; greedy but for every fourth."""
    rng = random.Random(0)
    requests = []
    for i in range(64):
        words = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 60))]
        prompt = picture_prompt(model, i, *words) if i % 3 == 0 else text_prompt(*words)
        sampled = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": i} if i % 4 == 3 else {}
        requests.append((prompt, GenerationConfig(max_new_tokens=rng.randrange(1, 8), **sampled)))
    return requests


def loaded(folder, kind: str) -> MultimodalLLM:
    """A model with torch's products in two precisions, with int8 ones to train under, or made fast in one of ours."""
    if kind.startswith("fast "):
        return load_model(folder, precision=kind.removeprefix("fast "))
    model = MultimodalLLM.from_pretrained(folder, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "int8":
        quantize_(model.language_model)
    return model


KINDS = ("float32", "bfloat16", "int8", "fast bfloat16", "fast int8", "fast int8-dynamic", "fast int4")


@pytest.mark.parametrize("kind", KINDS)
def test_64_ragged_requests_together_are_answered_as_one_by_one(folder, kind):
    model = loaded(folder, kind)
    requests = ragged_requests(model)
    engine = Engine(model, 16, prefills_per_step=3)
    together = run(engine, *[engine.submit(*request) for request in requests])
    assert together == [alone(model, *request) for request in requests]


def test_a_request_that_comes_later_joins_the_others_and_ends_before_them(model):
    engine = Engine(model, 2)
    long = engine.submit(text_prompt(5, 6), GenerationConfig(max_new_tokens=40, min_new_tokens=40))
    for _ in range(5):
        engine.step()
    short = engine.submit(text_prompt(9), SHORT)
    while not short.is_done:
        engine.step()
    assert not long.is_done and engine.busy == 1
    run(engine)
    assert long.answer.ids == alone(model, long.prompt, long.config).ids
    assert engine.busy == 0


def test_requests_beyond_the_slots_wait_in_the_order_they_came(model):
    engine, started = Engine(model, 2, prefills_per_step=2), []
    for i in range(6):
        engine.submit(text_prompt(5, i), SHORT, on_start=lambda i=i: started.append(i))
    engine.step()
    assert (engine.busy, len(engine.waiting), started) == (2, 4, [0, 1])
    run(engine)
    assert started == [0, 1, 2, 3, 4, 5]


def test_a_request_that_is_given_up_frees_its_slot_within_one_step(model):
    engine = Engine(model, 1)
    running, waiting, next_one = (engine.submit(text_prompt(5, i), ENDLESS) for i in range(3))
    for _ in range(4):
        engine.step()
    running.cancel()
    waiting.cancel()
    engine.step()
    assert running.answer.finish_reason == waiting.answer.finish_reason == "cancelled"
    assert len(running.answer.ids) == 5 and waiting.answer.ids == ()  # reading the prompt gave one, four steps four
    assert [live.handle for live in engine.live] == [next_one]


@contextmanager
def poisoned_word(model, token: int):
    """The embedding of one token is not a number."""
    embedding = model.language_model.model.embed_tokens
    poisoned = embedding.weight.detach().clone()
    poisoned[token] = math.nan
    model.language_model.model.embed_tokens = torch.nn.Embedding.from_pretrained(poisoned)
    try:
        yield
    finally:
        model.language_model.model.embed_tokens = embedding


def test_logits_that_are_not_finite_fail_their_row_and_no_other(model):
    prompts = [text_prompt(5, 6), text_prompt(5, 300), text_prompt(7)]
    wanted = [alone(model, prompt, SHORT) for prompt in prompts]
    with poisoned_word(model, 300):
        engine = Engine(model, 3)
        handles = [engine.submit(prompt, SHORT) for prompt in prompts]
        run(engine)
    with pytest.raises(GenerationError, match="not finite at token 0"):
        handles[1].result()
    assert [handles[0].answer, handles[2].answer] == [wanted[0], wanted[2]]


def test_a_slot_that_held_what_is_not_finite_serves_the_next_request(model):
    """At a fixed shape, where a row attends over more than it has, masked: a NaN behind its end would come through."""
    wanted = alone(model, text_prompt(7), SHORT)
    engine = Engine(model, 1)
    engine.fixed = FixedStep(model.language_model, engine.cache, 1, is_compiled=False)
    with poisoned_word(model, 300):
        handle = engine.submit(text_prompt(5, 6, 8, 9, 300), SHORT)
        run(engine)
    with pytest.raises(GenerationError, match="not finite at token 0"):
        handle.result()
    after = engine.submit(text_prompt(7), SHORT)
    run(engine)
    assert after.answer == wanted


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_row_that_is_not_finite_on_the_way_fails_alone(model, num_beams):
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=6, num_beams=num_beams)
    prompts = [text_prompt(5, 6), text_prompt(7)]
    undisturbed = Engine(model, num_beams)
    (wanted,) = run(undisturbed, undisturbed.submit(prompts[1], config))
    engine = Engine(model, 2 * num_beams)
    handles = [engine.submit(prompt, config) for prompt in prompts]
    for _ in range(3):
        engine.step()
    with torch.inference_mode():
        engine.cache.values[0, engine.live[0].slots] = math.nan
    run(engine)
    with pytest.raises(GenerationError, match=r"not finite at token \d"):
        handles[0].result()
    assert handles[1].answer == wanted
    assert engine.busy == 0


def test_a_request_that_cannot_be_read_is_its_own_error(model):
    engine = Engine(model, 2)
    good = engine.submit(text_prompt(5), SHORT)
    bad = engine.submit(Prompt((5, 6), torch.zeros(1, 3, 32, 32)), SHORT)
    run(engine)
    with pytest.raises(ValueError, match="0 image places in the text for 1 images"):
        bad.result()
    assert good.answer == alone(model, good.prompt, SHORT) and engine.busy == 0


def test_when_the_engine_fails_every_request_hears_of_it(model):
    engine, done = Engine(model, 1), []
    for i in range(3):
        engine.submit(text_prompt(i), ENDLESS, on_done=lambda handle: done.append(handle.error))
    engine.step()
    error = RuntimeError("the device is gone")
    engine.fail(error)
    assert done == [error] * 3 and not engine.has_work and engine.busy == 0


def test_beams_take_slots_beside_other_requests(model):
    beams = GenerationConfig(max_new_tokens=9, num_beams=3, num_return_sequences=3)
    requests = [(text_prompt(7, 30), beams), (text_prompt(5), SHORT), (text_prompt(9, 8, 7), beams)]
    engine = Engine(model, 4)
    together = run(engine, *[engine.submit(*request) for request in requests])
    single = Engine(model, 3)
    assert together == [run(single, single.submit(*request))[0] for request in requests]


def test_more_beams_than_slots_are_refused(model):
    with pytest.raises(UserError, match="num_beams is 5, but this engine has 4 slots"):
        Engine(model, 4).submit(text_prompt(5), GenerationConfig(num_beams=5))


def test_beams_that_are_given_up_tell_the_best_so_far(model):
    engine = Engine(model, 3)
    handle = engine.submit(text_prompt(7, 30), GenerationConfig(max_new_tokens=50, min_new_tokens=50, num_beams=3))
    for _ in range(3):
        engine.step()
    handle.cancel()
    engine.step()
    assert (handle.answer.finish_reason, len(handle.answer.ids), engine.busy) == ("cancelled", 4, 0)


def test_an_answer_ends_before_its_stop_string_and_no_piece_of_it_is_told(model):
    prompt, config = text_prompt(7, 30, 12, 99), GenerationConfig(max_new_tokens=30, temperature=1.0, seed=2)
    text = alone(model, prompt, config).text
    stop = text[len(text) // 2 :][:2]
    stopping = GenerationConfig(max_new_tokens=30, temperature=1.0, seed=2, stop=(stop,))
    engine, pieces = Engine(model, 1), []
    handle = engine.submit(prompt, stopping, on_text=pieces.append)
    run(engine)
    assert handle.answer.text == "".join(pieces) == text[: text.index(stop)]
    assert handle.answer.finish_reason == "stop"


def test_tokens_and_text_are_told_as_they_come(model):
    engine, tokens, pieces = Engine(model, 1), [], []
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12)
    handle = engine.submit(text_prompt(7, 30), config, on_token=tokens.append, on_text=pieces.append)
    engine.step()
    assert len(tokens) == 2  # one for the prompt, one for the step
    run(engine)
    assert tuple(tokens) == handle.answer.ids and "".join(pieces) == handle.answer.text


def test_a_beginning_is_read_once_and_asked_about_many_times(model):
    engine = Engine(model, 2)
    first = picture_prompt(model, 0)
    prefix = engine.read(first.ids, first.pixels)
    for words in ((9,), (30, 31, 32), (7, 7)):
        asked = picture_prompt(model, 0, *words)
        handle = engine.submit(Prompt(asked.ids, asked.pixels, prefix), SHORT)
        assert run(engine, handle)[0].ids == alone(model, asked, SHORT).ids


def test_a_beginning_that_a_prompt_does_not_have_is_not_used(model):
    engine = Engine(model, 1)
    prefix = engine.read((4, 5), NO_IMAGE)
    asked = picture_prompt(model, 0, 9)
    assert run(engine, engine.submit(Prompt(asked.ids, asked.pixels, prefix), SHORT))[0] == alone(model, asked, SHORT)


def test_a_prompt_longer_than_the_cache_makes_it_grow_while_others_run(model):
    engine = Engine(model, 2)
    short = engine.submit(text_prompt(5), GenerationConfig(max_new_tokens=20, min_new_tokens=20))
    engine.step()
    long = engine.submit(text_prompt(*[8] * 300), SHORT)
    run(engine)
    assert short.answer == alone(model, short.prompt, short.config)
    assert long.answer == alone(model, long.prompt, long.config)


def test_many_prompts_are_answered_in_order_and_taken_as_slots_become_free(model):
    taken = []

    def prompts():
        for i in range(20):
            taken.append(i)
            yield text_prompt(5, i)

    answers = generate_each(model, prompts(), SHORT, slots=4)
    first = next(answers)
    assert len(taken) < 20
    assert [first, *answers] == [alone(model, text_prompt(5, i), SHORT) for i in range(20)]


def test_a_step_of_fixed_shape_gives_the_same_answers(model):
    from mmllm.inference.static_step import FixedStep

    requests = ragged_requests(model)[:12]
    engine = Engine(model, 4, max_length=512)
    engine.fixed = FixedStep(model.language_model, engine.cache, 4, is_compiled=False)
    together = run(engine, *[engine.submit(*request) for request in requests])
    assert [answer.ids for answer in together] == [alone(model, *request).ids for request in requests]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
def test_a_compiled_step_gives_the_same_answers(tmp_path):
    model = load_model(write_model(tmp_path / "model", num_hidden_layers=1), precision="int8")
    requests = [(text_prompt(5, 6), SHORT), (text_prompt(*[9] * 30), SHORT), (picture_prompt(model, 0, 7), SHORT)]
    engine = Engine(model, 2, is_compiled=True)
    together = run(engine, *[engine.submit(*request) for request in requests])
    assert together == [alone(model, *request) for request in requests]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_graphs_on_a_gpu_give_the_answers_of_one_by_one(folder, is_compiled):
    model = MultimodalLLM.from_pretrained(folder, device="cuda")
    requests = ragged_requests(model)
    engine = Engine(model, 16, max_length=512, prefills_per_step=4, is_compiled=is_compiled)
    together = run(engine, *[engine.submit(*request) for request in requests])
    single = Engine(model, 16, max_length=512, is_compiled=is_compiled)
    assert together == [run(single, single.submit(*request))[0] for request in requests]
