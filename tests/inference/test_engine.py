"""The engine: requests come and go between steps without changing one another's answers."""

import math
import random
from contextlib import contextmanager

import pytest
import torch

from mmllm.errors import GenerationError, UserError
from mmllm.inference.engine import Engine, generate
from mmllm.inference.optimize import load_model
from mmllm.inference.request import GenerationConfig, Handle, Prompt
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


def image_prompt(model: MultimodalLLM, seed: int, *words: int) -> Prompt:
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Prompt((4, *[model.config.image_token_id] * model.config.num_image_tokens, *words), pixels)


def submit(engine: Engine, prompt: Prompt, config: GenerationConfig, **callbacks) -> Handle:
    return engine.submit(Handle(prompt, config, **callbacks))


def run(engine: Engine, *handles: Handle) -> list:
    while engine.step():
        pass
    return [handle.answer for handle in handles]


def alone(model: MultimodalLLM, prompt: Prompt, config: GenerationConfig):
    engine = Engine(model, 1)
    return run(engine, submit(engine, prompt, config))[0]


def ragged_requests(model: MultimodalLLM) -> list[tuple[Prompt, GenerationConfig]]:
    """64 prompts of all lengths, every third with an image; every fourth is sampled, the others greedy."""
    rng = random.Random(0)
    requests = []
    for i in range(64):
        words = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 60))]
        prompt = image_prompt(model, i, *words) if i % 3 == 0 else text_prompt(*words)
        sampled = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": i} if i % 4 == 3 else {}
        requests.append((prompt, GenerationConfig(max_new_tokens=rng.randrange(1, 8), **sampled)))
    return requests


def loaded(folder, kind: str) -> MultimodalLLM:
    """A model with torch's matrix products, with int8 layers as under adapters, or prepared for answering."""
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
    engine = Engine(model, 16)
    together = run(engine, *[submit(engine, *request) for request in requests])
    assert [answer.ids for answer in together] == [alone(model, *request).ids for request in requests]


def test_a_later_request_joins_the_running_ones_and_may_finish_before_them(model):
    engine = Engine(model, 2)
    long = submit(engine, text_prompt(5, 6), GenerationConfig(max_new_tokens=40, min_new_tokens=40))
    for _ in range(5):
        engine.step()
    short = submit(engine, text_prompt(9), SHORT)
    while not short.is_done:
        engine.step()
    assert not long.is_done and engine.busy == 1
    run(engine)
    assert long.answer.ids == alone(model, long.prompt, long.config).ids
    assert engine.busy == 0


def test_requests_beyond_the_slots_wait_in_the_order_they_came(model):
    engine, started = Engine(model, 2), []
    for i in range(6):
        submit(engine, text_prompt(5, i), SHORT, on_start=lambda i=i: started.append(i))
    engine.step()
    assert (engine.busy, len(engine.waiting), started) == (2, 4, [0, 1])
    run(engine)
    assert started == [0, 1, 2, 3, 4, 5]


def test_a_cancelled_request_frees_its_slot_within_one_step(model):
    engine = Engine(model, 1)
    running, waiting, next_one = (submit(engine, text_prompt(5, i), ENDLESS) for i in range(3))
    for _ in range(4):
        engine.step()
    running.cancel()
    waiting.cancel()
    engine.step()
    assert running.answer.finish_reason == waiting.answer.finish_reason == "cancelled"
    assert (
        len(running.answer.ids) == 4 and waiting.answer.ids == ()
    )  # the end of the prompt gave one, three steps three
    assert [request.handle for request in engine.active] == [next_one]


@contextmanager
def nan_embedding(model, token: int):
    """Makes the embedding of one token NaN."""
    embedding = model.language_model.model.embed_tokens
    weight = embedding.weight.detach().clone()
    weight[token] = math.nan
    model.language_model.model.embed_tokens = torch.nn.Embedding.from_pretrained(weight)
    try:
        yield
    finally:
        model.language_model.model.embed_tokens = embedding


def test_a_slot_that_held_nan_serves_the_next_request(model):
    """In a static step a row attends, under a mask, over positions behind its end: NaN there would reach it."""
    wanted = alone(model, text_prompt(7), SHORT)
    engine = Engine(model, 1, use_static_step=True)
    with nan_embedding(model, 300):
        handle = submit(engine, text_prompt(5, 6, 8, 9, 300), SHORT)
        run(engine)
    with pytest.raises(GenerationError, match="not finite at token 0"):
        handle.result()
    after = submit(engine, text_prompt(7), SHORT)
    run(engine)
    assert after.answer == wanted


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_request_that_becomes_non_finite_fails_alone(model, num_beams):
    config = GenerationConfig(max_new_tokens=6, min_new_tokens=6, num_beams=num_beams)
    prompts = [text_prompt(5, 6), text_prompt(7)]
    undisturbed = Engine(model, num_beams)
    (wanted,) = run(undisturbed, submit(undisturbed, prompts[1], config))
    engine = Engine(model, 2 * num_beams)
    handles = [submit(engine, prompt, config) for prompt in prompts]
    for _ in range(3):
        engine.step()
    with torch.inference_mode():
        engine.runner.cache.values[0, engine.active[0].slots] = math.nan
    run(engine)
    with pytest.raises(GenerationError, match=r"not finite at token \d"):
        handles[0].result()
    assert handles[1].answer == wanted
    assert engine.busy == 0


def test_an_error_in_prefill_is_that_request_s_error(model):
    engine = Engine(model, 2)
    good = submit(engine, text_prompt(5), SHORT)
    bad = submit(engine, Prompt((5, 6), torch.zeros(1, 3, 32, 32)), SHORT)
    run(engine)
    with pytest.raises(ValueError, match="0 image places in the text for 1 images"):
        bad.result()
    assert good.answer == alone(model, good.prompt, SHORT) and engine.busy == 0


def test_fail_ends_every_request_with_the_error(model):
    engine, done = Engine(model, 1), []
    for i in range(3):
        submit(engine, text_prompt(i), ENDLESS, on_done=lambda handle: done.append(handle.error))
    engine.step()
    error = RuntimeError("the device is gone")
    engine.fail(error)
    assert done == [error] * 3 and not engine.has_work and engine.busy == 0


def test_beams_take_slots_beside_other_requests(model):
    beams = GenerationConfig(max_new_tokens=9, num_beams=3, num_return_sequences=3)
    requests = [(text_prompt(7, 30), beams), (text_prompt(5), SHORT), (text_prompt(9, 8, 7), beams)]
    engine = Engine(model, 4)
    together = run(engine, *[submit(engine, *request) for request in requests])
    single = Engine(model, 3)
    assert together == [run(single, submit(single, *request))[0] for request in requests]


def test_more_beams_than_slots_are_refused(model):
    with pytest.raises(UserError, match="num_beams is 5, but this engine has 4 slots"):
        submit(Engine(model, 4), text_prompt(5), GenerationConfig(num_beams=5))


def test_a_cancelled_beam_search_returns_the_best_beam_so_far(model):
    engine = Engine(model, 3)
    handle = submit(engine, text_prompt(7, 30), GenerationConfig(max_new_tokens=50, min_new_tokens=50, num_beams=3))
    for _ in range(3):
        engine.step()
    handle.cancel()
    engine.step()
    assert (handle.answer.finish_reason, len(handle.answer.ids), engine.busy) == ("cancelled", 3, 0)


def test_an_answer_ends_before_its_stop_string_and_emits_no_part_of_it(model):
    prompt, config = text_prompt(7, 30, 12, 99), GenerationConfig(max_new_tokens=30, temperature=1.0, seed=2)
    text = alone(model, prompt, config).text
    stop = text[len(text) // 2 :][:2]
    stopping = GenerationConfig(max_new_tokens=30, temperature=1.0, seed=2, stop=(stop,))
    engine, pieces = Engine(model, 1), []
    handle = submit(engine, prompt, stopping, on_text=pieces.append)
    run(engine)
    assert handle.answer.text == "".join(pieces) == text[: text.index(stop)]
    assert handle.answer.finish_reason == "stop"


def test_tokens_and_text_are_emitted_step_by_step(model):
    engine, tokens, pieces = Engine(model, 1), [], []
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12)
    handle = submit(engine, text_prompt(7, 30), config, on_token=tokens.append, on_text=pieces.append)
    engine.step()
    assert len(tokens) == 1  # the end of the prompt gives it
    engine.step()
    assert len(tokens) == 2
    run(engine)
    assert tuple(tokens) == handle.answer.ids and "".join(pieces) == handle.answer.text


def test_requests_that_wait_with_the_same_prompt_read_it_once_and_are_answered_as_if_alone(model):
    engine, prompt = Engine(model, 5), image_prompt(model, 5, 7, 8)
    configs = [GenerationConfig(max_new_tokens=6 + 200 * seed, temperature=1.0, seed=seed) for seed in range(3)]
    configs.insert(1, GenerationConfig(max_new_tokens=6, num_beams=2))
    found = run(engine, *(submit(engine, prompt, config) for config in configs))
    assert engine.counters.prompt_tokens == len(prompt.ids)
    assert len({answer.ids for answer in found}) == 4
    for config, answer in zip(configs, found, strict=True):
        other = Engine(model, config.num_beams)
        assert run(other, submit(other, prompt, config)) == [answer]


def test_requests_with_one_prompt_are_answered_when_the_one_that_reads_it_is_cancelled(model):
    engine, prompt = Engine(model, 3, step_s=1e-9), text_prompt(*range(5, 205))
    first, *others = [submit(engine, prompt, SHORT) for _ in range(3)]
    engine.step()
    first.cancel()
    run(engine)
    assert [handle.answer for handle in others] == [alone(model, prompt, SHORT)] * 2
    assert first.answer.finish_reason == "cancelled" and engine.counters.prompt_tokens == 64 + 200


def test_the_cache_grows_for_a_long_prompt_while_others_run(model):
    engine = Engine(model, 2)
    short = submit(engine, text_prompt(5), GenerationConfig(max_new_tokens=20, min_new_tokens=20))
    engine.step()
    long = submit(engine, text_prompt(*[8] * 300), SHORT)
    run(engine)
    assert short.answer == alone(model, short.prompt, short.config)
    assert long.answer == alone(model, long.prompt, long.config)


def test_many_prompts_are_answered_in_order_and_taken_as_slots_become_free(model):
    taken = []

    def prompts():
        for i in range(20):
            taken.append(i)
            yield text_prompt(5, i)

    answers = generate(model, prompts(), SHORT, slots=4)
    first = next(answers)
    assert len(taken) < 20
    assert [first, *answers] == [alone(model, text_prompt(5, i), SHORT) for i in range(20)]


def test_a_static_step_gives_the_same_answers(model):
    requests = ragged_requests(model)[:12]
    engine = Engine(model, 4, max_length=512, use_static_step=True)
    together = run(engine, *[submit(engine, *request) for request in requests])
    assert [answer.ids for answer in together] == [alone(model, *request).ids for request in requests]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cuda_graphs_give_the_answers_of_one_by_one(folder, dtype):
    model = load_model(folder, device=torch.device("cuda"), precision=dtype)
    requests = ragged_requests(model)
    engine = Engine(model, 16, max_length=512)
    assert engine.runner.static_step.ours is not None
    together = run(engine, *[submit(engine, *request) for request in requests])
    single = Engine(model, 16, max_length=512)
    assert together == [run(single, submit(single, *request))[0] for request in requests]


def test_logprobs_are_those_of_the_whole_text_read_at_once(model):
    config = GenerationConfig(max_new_tokens=8, logprobs=True)
    requests = [(image_prompt(model, 0, 5, 6), config), (text_prompt(7, 8), SHORT), (text_prompt(9, 10, 11), config)]
    requests[2] = (requests[2][0], GenerationConfig(max_new_tokens=8, logprobs=True, temperature=0.7, top_k=5))
    engine = Engine(model, 3)
    answers = run(engine, *(submit(engine, prompt, one) for prompt, one in requests))
    assert answers[1].logprobs == () and answers[1].confidence is None
    for (prompt, _), answer in zip(requests[::2], answers[::2], strict=True):
        ids = torch.tensor([[*prompt.ids, *answer.ids]])
        log_p_TV = model.logits(ids, prompt.pixels)[0].log_softmax(-1)
        wanted = [log_p_TV[len(prompt.ids) - 1 + i, token].item() for i, token in enumerate(answer.ids)]
        assert answer.logprobs[: len(wanted)] == pytest.approx(wanted, abs=1e-4)
        assert len(answer.logprobs) == len(answer.ids) + (answer.finish_reason == "stop")
