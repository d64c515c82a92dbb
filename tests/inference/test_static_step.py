"""The step of fixed shape gives the logits of the ordinary step, also where a CUDA graph replays it.

The graph here is one of the same contract on the CPU: it records the operators of a capture, and a replay runs them again
on the same tensors. So a position or a token that a capture had fixed would give the logits of an earlier step, and a wait
for the device inside a capture is an error, as on a GPU.
"""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmllm.config.schema import LoraConfig
from mmllm.inference.engine import Engine
from mmllm.inference.request import GenerationConfig, Handle, Prompt
from mmllm.inference.static_step import StaticStep, step_of
from mmllm.kernels import gpu
from mmllm.layers.lora import add_lora_
from mmllm.layers.quantized import quantize_
from mmllm.models.kv_cache import KVCache, PerSlot
from mmllm.models.multimodal import MultimodalLLM
from official import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultimodalLLM:
    return MultimodalLLM.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


class OnCuda(torch.Tensor):
    """A tensor that is taken for one of a GPU."""

    is_cuda = True


class Graph(TorchDispatchMode):
    replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a capture waits for the device"
        made = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, made))
        return made

    def replay(self) -> None:
        Graph.replays += 1
        for function, arguments, options, made in self.calls:
            again = function(*arguments, **options)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capture(graph: Graph):
    with graph:
        yield


@pytest.fixture(params=["plain", "graph"])
def as_graph(request, monkeypatch):
    """Turns a static step into one that replays graphs, or leaves it."""
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Graph, "replays", 0)

    def turn(step: StaticStep) -> None:
        if request.param == "graph":
            step.inputs_2S = step.inputs_2S.as_subclass(OnCuda)

    yield turn
    assert (Graph.replays > 0) == (request.param == "graph")


@torch.inference_mode()
def test_logits_are_those_of_the_ordinary_step_on_both_sides_of_every_bucket_edge(model, as_graph):
    language_model, length = model.language_model, 768
    ids = torch.randint(0, 500, (3, length), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(model.config.text, 3, length, device=CPU, dtype=torch.float32) for _ in range(2)]
    step = StaticStep(language_model, caches[1], 3)
    as_graph(step)

    def read(cache: KVCache, rows: list[int], ids_BT: torch.Tensor, starts: list[int]) -> torch.Tensor:
        positions_BT = torch.tensor(starts)[:, None] + torch.arange(ids_BT.shape[1])
        x_BTD = language_model(language_model.embed(ids_BT), positions_BT, cache=PerSlot(cache, rows, starts))
        return language_model.logits(x_BTD[:, -1])

    for cache in caches:
        read(cache, [0, 1, 2], ids[:, :252], [0, 0, 0])
        read(cache, [0], ids[:1, 252:508], [252])
    for number in range(8):  # slot 0 crosses 512, slot 2 crosses 256, slot 1 takes part now and then
        rows = [0, 2, *([1] if number % 3 == 0 else [])]
        starts = {0: 508 + number, 1: 252 + number // 3, 2: 252 + number}
        tokens = [int(ids[row, starts[row]]) for row in rows]
        wanted = read(caches[0], rows, torch.tensor(tokens)[:, None], [starts[row] for row in rows])
        got = step(rows, tokens, [starts[row] for row in rows])
        assert (got - wanted).abs().max() < 1e-4, starts
    last = length - 1  # where slots without a request write
    for cache in caches:
        read(cache, [2], ids[2:, 260:last], [260])
    wanted = read(caches[0], [2], ids[2:, last:], [last])
    assert (step([2], [int(ids[2, last])], [last]) - wanted).abs().max() < 1e-4


def answers(model: MultimodalLLM, slots: int, is_static: bool, as_graph=None) -> list:
    """A request that is cancelled, short ones in the slot that it leaves, and one for which the cache grows."""
    engine = Engine(model, slots, use_static_step=is_static)
    if as_graph:
        as_graph(engine.runner.static_step)

    def submit(length: int, tokens: int, **more) -> Handle:
        ids = tuple(20 + (7 * i + length) % 100 for i in range(length))
        config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, logprobs=True)
        return engine.submit(Handle(Prompt(ids, torch.zeros(0, 3, 32, 32)), config, **more))

    said = []
    cancelled = submit(240, 16, on_token=lambda token: said.append(token) or (len(said) == 5 and cancelled.cancel()))
    handles = [cancelled, submit(250, 9), submit(3, 6), submit(10, 4), submit(500, 20), submit(2, 5)]
    while engine.step():
        pass
    assert engine.runner.cache.length == 768 and cancelled.answer.finish_reason == "cancelled"
    return [handle.answer for handle in handles]


def test_requests_that_are_cancelled_outgrow_the_cache_or_reuse_a_slot_get_the_answer_they_get_alone(model, as_graph):
    wanted, got = answers(model, 1, is_static=False), answers(model, 2, True, as_graph)
    assert [answer.ids for answer in got] == [answer.ids for answer in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_model_that_our_kernels_do_not_know_takes_torchs_operators_and_one_line_says_so(model, monkeypatch, capsys):
    plain, adapted, quantized = (copy.deepcopy(model.language_model) for _ in range(3))
    add_lora_(adapted, LoraConfig(r=2))
    quantize_(quantized)
    assert step_of(plain, torch.bfloat16) is not None
    assert step_of(plain, torch.float16) is None
    assert step_of(adapted, torch.bfloat16) is None
    assert step_of(quantized, torch.bfloat16) is None
    monkeypatch.setattr(gpu, "native", lambda device: True)
    step = StaticStep(adapted, KVCache(model.config.text, 1, 16, device=CPU, dtype=torch.float32), 1)
    assert step.ours is None
    assert capsys.readouterr().err == "kernels: torch's own for this model, whose layers or dtype ours do not know\n"
