"""What the store keeps changes no bit of an answer, and long prompts are read without stopping the others."""

import math
import random

import pytest
import torch

from mmllm.errors import GenerationError
from mmllm.inference.counters import FIRST_TOKENS, MAX_TOKENS, MIN_TOKENS, Counters
from mmllm.inference.engine import Engine
from mmllm.inference.optimize import load_model
from mmllm.inference.prefix_store import PrefixStore, block_keys
from mmllm.inference.request import GenerationConfig, Handle, Prompt
from mmllm.layers.lora import LoraConfig, adapters, add_lora_
from mmllm.layers.quantized import quantize_
from mmllm.models.multimodal import MultimodalLLM
from official import write_model

CONFIG = GenerationConfig(max_new_tokens=6, min_new_tokens=6, logprobs=True)
LARGE = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fast(folder) -> MultimodalLLM:
    return load_model(folder, precision="int8")


def loaded(folder, kind: str) -> MultimodalLLM:
    """A model in a precision, or with adapters on int8 weights, which stay beside them."""
    if kind != "adapters":
        return load_model(folder, precision=kind)
    model = MultimodalLLM.from_pretrained(folder)
    quantize_(model.language_model)
    add_lora_(model.language_model, LoraConfig(r=2))
    rng = torch.Generator().manual_seed(2)
    for layer in adapters(model.language_model).values():
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=rng)
    return model.eval()


def pixels(*seeds: int) -> torch.Tensor:
    images = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(images) if images else torch.zeros(0, 3, 32, 32)


def words(rng: random.Random, number: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 250) for _ in range(number))


def step_through(engine: Engine) -> None:
    while engine.step():
        assert engine.store.bytes == sum(tensor.nbytes for tensor in engine.store.tensors.values())
        assert engine.store.bytes <= engine.store.limit_bytes


def chats(model: MultimodalLLM, store_bytes: int, slots: int = 3) -> tuple[list, Engine]:
    """Three rounds of five conversations side by side, some about one image, some about the same one, one about two;
    beside them a request that is cancelled. All answers with the probabilities of their tokens."""
    rng, image = random.Random(0), (model.config.image_token_id,) * model.config.num_image_tokens
    system = words(rng, 70)
    texts = [[*system, *place, *words(rng, 9)] for place in (image, image, (), image, image)]
    shown = [[1], [1], [], [2], [3]]
    engine, answers = Engine(model, slots, step_s=1e-9, store_bytes=store_bytes), []
    for turn in range(3):
        handles = [Handle(Prompt(tuple(ids), pixels(*seeds)), CONFIG) for ids, seeds in zip(texts, shown, strict=True)]
        cancelled = Handle(Prompt((*texts[0], *words(rng, 40)), pixels(1)), CONFIG)
        for handle in (*handles[:2], cancelled, *handles[2:]):
            engine.submit(handle)
        for _ in range(2 + 20 * turn):
            engine.step()
        cancelled.cancel()
        step_through(engine)
        answers += [handle.result() for handle in handles]
        for i, handle in enumerate(handles):
            texts[i] += [*handle.result().ids, *(image if (i, turn) == (3, 0) else ()), *words(rng, 11)]
        if turn == 0:
            shown[3] = [2, 1]
    return answers, engine


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4", "bfloat16", "float32", "adapters"])
def test_answers_have_the_same_bits_with_a_store_without_one_and_with_one_that_is_too_small(folder, kind):
    model = loaded(folder, kind)
    wanted, engine = chats(model, 0)
    assert not engine.store.tensors
    kept, engine = chats(model, LARGE)
    assert kept == wanted
    assert engine.store.hits > 20
    crowded, engine = chats(model, engine.store.bytes // 4)
    assert crowded == wanted and 0 < engine.store.bytes <= engine.store.limit_bytes


def test_each_of_two_models_answers_with_what_it_computed_itself(folder, fast):
    other = loaded(folder, "adapters")
    assert chats(fast, LARGE)[0] != chats(other, LARGE)[0]
    assert chats(other, LARGE)[0] == chats(other, 0)[0]


def test_a_prompt_read_in_pieces_of_any_length_gives_the_bits_of_the_whole(fast):
    prompt = Prompt((*words(random.Random(1), 40), *(fast.config.image_token_id,) * 16, *range(5, 80)), pixels(1))
    answers = []
    for step_s in (float("inf"), 1e-9, 0.002):
        engine = Engine(fast, 1, step_s=step_s)
        handle = engine.submit(Handle(prompt, CONFIG))
        engine.run([handle])
        answers.append(handle.result())
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_answers_go_on_with_every_step_while_a_long_prompt_is_read(folder, kind):
    model = loaded(folder, kind)
    engine, steps = Engine(model, 3, step_s=1e-9), []
    endless = GenerationConfig(max_new_tokens=200, min_new_tokens=200)
    streams = [
        engine.submit(Handle(Prompt((*range(5, 17), i), pixels()), endless, on_token=steps.append)) for i in (1, 2)
    ]
    engine.step()
    engine.step()
    long = engine.submit(Handle(Prompt(words(random.Random(2), 500), pixels()), CONFIG))
    read, piece = engine.counters.prompt_tokens, MIN_TOKENS if engine.runner.is_row_exact else engine.runner.block
    for i in range(1, 4):
        steps.clear()
        engine.step()
        assert len(steps) == 2 and engine.counters.prompt_tokens - read == i * piece
    engine.run([long])
    assert not any(stream.is_done for stream in streams)


def test_a_static_step_does_not_write_into_prompts_that_are_being_read(folder):
    model = loaded(folder, "float32")
    prompts = [Prompt((5, 6), pixels()), Prompt(words(random.Random(2), 300), pixels())]
    answers = []
    for is_static in (False, True):
        engine = Engine(model, 3, max_length=512, step_s=1e-9, store_bytes=LARGE, use_static_step=is_static)
        handles = [engine.submit(Handle(prompt, GenerationConfig(max_new_tokens=12))) for prompt in prompts]
        engine.run(handles)
        answers.append([handle.result().ids for handle in handles])
    assert answers[0] == answers[1]


def test_a_slow_step_makes_the_next_ones_short_and_fast_ones_make_them_long_again():
    counters = Counters()
    assert (counters.budget(math.inf, 4), counters.budget(0.15, 4)) == (MAX_TOKENS, FIRST_TOKENS)
    counters.add(0.1, decoded=4, read=46, cost=46)  # 2 ms a token
    assert counters.budget(0.15, 4) == 71
    counters.add(0.5, decoded=4, read=46, cost=46)  # 10 ms a token
    assert counters.budget(0.15, 4) == 11
    budgets = []
    for _ in range(30):
        counters.add(0.1, decoded=4, read=46, cost=46)
        budgets.append(counters.budget(0.15, 4))
    assert budgets[0] == 12 and budgets == sorted(budgets) and budgets[-1] == 71
    counters.add(5.0, decoded=1, read=1, cost=1)  # too few tokens to tell
    assert counters.budget(0.15, 4) == 71
    counters.add(5.0, decoded=4, read=8, cost=8)
    assert counters.budget(0.15, 4) == MIN_TOKENS


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(fast):
    engine = Engine(fast, 2, step_s=1e-9)
    long = engine.submit(Handle(Prompt(words(random.Random(2), 800), pixels()), CONFIG))
    engine.step()
    short = engine.submit(Handle(Prompt((5, 6, 7), pixels()), CONFIG))
    engine.run([short])
    assert not long.is_done and engine.counters.prompt_tokens < 100


def test_the_next_turn_reads_only_its_own_words(fast):
    engine, rng = Engine(fast, 2, store_bytes=LARGE), random.Random(3)
    first = Prompt((*words(rng, 30), *(fast.config.image_token_id,) * 16, *words(rng, 20)), pixels(1))
    handle = engine.submit(Handle(first, CONFIG))
    engine.run([handle])
    assert (handle.reused_tokens, engine.counters.prompt_tokens) == (0, 66)
    second = Prompt((*first.ids, *handle.result().ids, *words(rng, 20)), pixels(1))
    handle = engine.submit(Handle(second, CONFIG))
    engine.run([handle])
    assert handle.reused_tokens == 64  # of 72 tokens, the last one of which is not in the cache, whole blocks of 16
    assert engine.counters.prompt_tokens == 66 + len(second.ids) - 64


def test_questions_about_one_image_that_wait_together_encode_it_once(fast, monkeypatch):
    encoded = []
    encode = fast.encode_images
    monkeypatch.setattr(fast, "encode_images", lambda pixels_N3SS: encoded.append(1) or encode(pixels_N3SS))
    engine, image = Engine(fast, 4, store_bytes=LARGE), (fast.config.image_token_id,) * 16
    handles = [Handle(Prompt((*range(5, 37), *image, 50 + i, 51), pixels(1)), CONFIG) for i in range(4)]
    engine.run([engine.submit(handle) for handle in handles])
    assert encoded == [1]
    assert [handle.reused_tokens for handle in handles] == [0, 48, 48, 48]


def test_a_failed_request_leaves_nothing_in_the_store(fast):
    engine, prompt = Engine(fast, 1, store_bytes=LARGE), Prompt((*range(5, 40), 7), pixels())
    answers = []
    for spoilt in (True, False):
        handle = engine.submit(Handle(prompt, CONFIG))
        engine.step()
        if spoilt:
            with torch.inference_mode():
                engine.runner.cache.values[0, 0] = float("nan")
        engine.run([handle])
        answers.append(handle)
    with pytest.raises(GenerationError, match="not finite"):
        answers[0].result()
    assert answers[1].reused_tokens == 0 and answers[1].result().ids


def test_the_least_recently_used_goes_first_and_an_end_before_its_beginning():
    store = PrefixStore(4 * 40)
    for key in (b"a", b"b", b"c", b"other"):
        store.put(key, torch.zeros(10))
    store.touch([b"a", b"b", b"c"])
    store.put(b"d", torch.zeros(10))
    store.put(b"e", torch.zeros(10))
    assert list(store.tensors) == [b"b", b"a", b"d", b"e"]
    store.put(b"too large", torch.zeros(41))
    assert store.bytes == 160 and b"too large" not in store
    assert store.get(b"a") is not None and store.get(b"c") is None
    assert (store.hits, store.misses) == (1, 1)


def test_blocks_are_told_apart_by_all_tokens_and_images_before_their_end():
    ids = (1, 9, 9, 2, 3, 4, 9, 5, 6)
    keys = block_keys(ids, 3, 9, [b"A", b"A", b"B"])
    assert len(keys) == len(set(keys)) == 3
    for other_ids, images, same in (
        ((*ids[:5], 7, *ids[6:]), [b"A", b"A", b"B"], 1),  # another token in the second block
        (ids, [b"A", b"A", b"C"], 2),
        (ids, [b"A", b"B", b"B"], 0),
    ):
        other = block_keys(other_ids, 3, 9, images)
        assert [a == b for a, b in zip(keys, other, strict=True)] == [i < same for i in range(3)]
    assert block_keys(ids[:8], 3, 9, [b"A", b"A", b"B"]) == keys[:2]


def test_an_image_may_push_the_beginning_of_its_own_prompt_out_of_the_store(fast):
    image, rng = (fast.config.image_token_id,) * fast.config.num_image_tokens, random.Random(3)
    begin = words(rng, 64)
    engine = Engine(fast, 2, store_bytes=LARGE)
    engine.run([engine.submit(Handle(Prompt((*begin, *words(rng, 3)), pixels()), CONFIG))])
    engine.store.limit_bytes = engine.store.bytes  # full
    prompt = Prompt((*begin, *image, *words(rng, 5)), pixels(1))
    handle = engine.submit(Handle(prompt, CONFIG))
    engine.run([handle])
    alone = Engine(fast, 2)
    expected = alone.submit(Handle(prompt, CONFIG))
    alone.run([expected])
    assert handle.result() == expected.result()
