"""The engine answers many requests at once: each has a slot of the KV cache, and every step gives each one token.

When a request is finished, the next one takes its slot while the others continue (continuous batching,
https://www.usenix.org/conference/osdi22/presentation/yu); a batch that waits for its slowest row would waste most of
its time. `Engine.step` is the decode loop: read on in waiting prompts, decode one token per row, choose, accept.

An answer does not depend on the requests beside it, nor on what the store has of its prompt: attention never mixes rows
(kv_cache.py), and rows share a matrix product only where that does not change their bits (model_runner.py).

One thread drives the engine with `step`; `submit` and `Handle.cancel` may be called from any thread.

B rows of a step, V vocabulary.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import torch
from torch import Tensor

from mmllm.errors import GenerationError, UserError
from mmllm.inference.beam_search import BeamSearch
from mmllm.inference.counters import Counters
from mmllm.inference.model_runner import ModelRunner, Piece
from mmllm.inference.prefix_store import PrefixStore
from mmllm.inference.prompt_reader import PromptReader, next_pieces
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.inference.sampling import NOT_FINITE, SamplerState, choose, likeliest, non_finite_error, token_logprobs
from mmllm.inference.static_step import BUCKET
from mmllm.inference.text_stream import AnswerText
from mmllm.models.multimodal import MultimodalLLM

SLOTS = {"cpu": 8, "cuda": 64, "mps": 4}  # default number of requests side by side


@dataclass(eq=False)
class ActiveRequest:
    """A request in its slots: one, or one per beam. `sampler` or `search` chooses its tokens."""

    handle: Handle
    slots: list[int]
    text: AnswerText
    reader: PromptReader | None = None  # requests with the same prompt share one; it fills the first one's slot
    position: int = 0  # where the next token goes in the cache
    sampler: SamplerState | None = None
    search: BeamSearch | None = None
    ids: list[int] = field(default_factory=list)  # the answer so far
    logprobs: list[float] = field(default_factory=list)  # of each chosen token, where they are wanted
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # chosen, not yet in the cache, one per slot; none while reading


class Engine:
    """Answers requests in `slots` slots (None: SLOTS). The cache begins with room for `max_length` tokens and grows.

    A step reads only so much of waiting prompts that it takes about `step_s` seconds, as the answers under way stand still
    meanwhile. `store_bytes` bounds what is kept of prompts for later ones (prefix_store.py); then the weights must not
    change. `is_exact` False lets rows share any matrix product: faster on a CPU without our kernels, but near ties may then
    depend on other requests. `use_static_step` None means on CUDA; a sharded model must not use it, because its collectives
    do not fit into a CUDA graph.
    """

    def __init__(
        self,
        model: MultimodalLLM,
        slots: int | None = None,
        *,
        max_length: int = BUCKET,
        step_s: float = math.inf,
        store_bytes: int = 0,
        is_exact: bool = True,
        use_static_step: bool | None = None,
    ):
        self.model, self.slots, self.step_s = model, slots or SLOTS[model.device.type], step_s
        self.tokenizer = model.processor.tokenizer
        is_static = model.device.type == "cuda" if use_static_step is None else use_static_step
        self.runner = ModelRunner(model, self.slots, max_length, is_exact, is_static)
        self.store, self.counters = PrefixStore(store_bytes), Counters()
        self.waiting: deque[Handle] = deque()
        self.active: list[ActiveRequest] = []
        self.free, self.numbers = list(range(self.slots)), count()

    @property
    def busy(self) -> int:
        return self.slots - len(self.free)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.active)

    def submit(self, handle: Handle) -> Handle:
        """Appends a request to the queue and returns it. UserError if it can never be answered here."""
        prompt, config = handle.prompt, handle.config
        room = self.model.config.text.max_position_embeddings
        if len(prompt.ids) + config.max_new_tokens > room:
            raise UserError(
                f"the prompt has {len(prompt.ids)} tokens and max_new_tokens is {config.max_new_tokens}, but the model "
                f"has {room} positions; shorten one of them"
            )
        if config.num_beams > self.slots:
            raise UserError(f"num_beams is {config.num_beams}, but this engine has {self.slots} slots; give it more")
        self.waiting.append(handle)
        return handle

    # The decode loop --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Drops cancelled requests, gives waiting ones slots, reads on in prompts and decodes a token for every other row.

        Returns whether work is left. The error of one request goes to its handle; what is raised here concerns all of
        them: call `fail`.
        """
        begin = time.perf_counter()
        self._drop_cancelled()
        while self.waiting and len(self.free) >= self.waiting[0].config.num_beams:
            self._activate(self.waiting.popleft())
        decoding = [request for request in self.active if request.tokens]
        rows = sum(len(request.slots) for request in decoding)
        readers = dict.fromkeys(request.reader for request in self.active if not request.tokens)
        budget, is_shortest_first = self.counters.budget(self.step_s, rows), self.counters.steps % 2 == 1
        reading, cost = next_pieces([*readers], budget, is_shortest_first, self._fail_prompt)
        apart = [(decoding, []), *(([], [each]) for each in reading)]
        for each in [(decoding, reading)] if self.runner.is_row_exact else apart:
            if any(each):
                self._run_pass(*each)
        self.counters.add(time.perf_counter() - begin, rows, sum(len(piece.x_TD) for _, piece in reading), cost)
        return self.has_work

    def _run_pass(self, decoding: list[ActiveRequest], reading: list[tuple[PromptReader, Piece]]) -> None:
        """Puts the last tokens of `decoding` and the pieces of prompts into the cache, and chooses what comes next."""
        slots = [slot for request in decoding for slot in request.slots]
        tokens = [token for request in decoding for token in request.tokens]
        positions = [request.position for request in decoding for _ in request.slots]
        try:
            logits_BV = self.runner.run(slots, tokens, positions, [piece for _, piece in reading])
        except torch.OutOfMemoryError as error:
            if decoding or len(reading) > 1:
                raise
            self._fail_prompt(reading[0][0], error)
            return
        for request in decoding:
            request.position += 1
        self._choose(decoding, logits_BV[: len(slots)])
        of_prompts = iter(logits_BV[len(slots) :].split(1))
        for reader, piece in reading:
            reader.advance(piece)
            if piece.is_last:
                self._begin_answers(reader, next(of_prompts))

    def _begin_answers(self, reader: PromptReader, logits_1V: Tensor) -> None:
        """Gives all requests of a prompt that has been read their first token."""
        requests = self._waiting_for(reader)
        others = [slot for request in requests for slot in request.slots if slot != reader.slot]
        self.runner.cache.copy_([reader.slot] * len(others), others, reader.position)
        for request in requests:
            request.position, request.handle.reused_tokens = reader.position, reader.reused
        self.counters.reused_tokens += reader.reused
        self._choose(requests, logits_1V.expand(len(others) + 1, -1))

    def _waiting_for(self, reader: PromptReader) -> list[ActiveRequest]:
        """The requests that wait for a reader."""
        return [request for request in self.active if request.reader is reader and not request.tokens]

    def _choose(self, requests: list[ActiveRequest], logits_BV: Tensor) -> None:
        """Chooses the next token of every row. Requests that sample come first, one row each, then those with beams."""
        sampled = [request for request in requests if request.search is None]
        if sampled:
            samplers = [request.sampler for request in sampled]
            tokens = choose(logits_BV[: len(sampled)], samplers, list(self.tokenizer.stop_ids))
            if any(request.handle.config.logprobs for request in sampled):
                for request, value in zip(sampled, token_logprobs(logits_BV[: len(sampled)], tokens), strict=True):
                    request.logprobs.append(value)
            if count := max(request.handle.config.top_logprobs for request in sampled):
                for request, best in zip(sampled, likeliest(logits_BV[: len(sampled)], count), strict=True):
                    request.top_logprobs.append(tuple(best[: request.handle.config.top_logprobs]))
            for request, token in zip(sampled, tokens, strict=True):
                self._accept_token(request, token)
        row = len(sampled)
        for request in requests[len(sampled) :]:
            self._advance_beams(request, logits_BV[row : row + len(request.slots)])
            row += len(request.slots)

    def _accept_token(self, request: ActiveRequest, token: int) -> None:
        """Adds a chosen token to its answer, or ends the answer."""
        handle = request.handle
        if token == NOT_FINITE:
            self._fail_request(request, non_finite_error(len(request.ids)))
        elif token in self.tokenizer.stop_ids:
            self._finish(request, "stop", token)
        else:
            request.ids.append(token)
            request.tokens = [token]
            if handle.on_token:
                handle.on_token(token)
            handle.emit_text(request.text.feed(token))
            if request.text.is_stopped:
                self._finish(request, "stop")
            elif len(request.ids) == handle.config.max_new_tokens:
                self._finish(request, "length")

    def _advance_beams(self, request: ActiveRequest, logits_BV: Tensor) -> None:
        """Continues the best beams, or ends the search. A beam that continues another one takes over its cache."""
        try:
            step = request.search.advance(logits_BV)
        except GenerationError as error:
            self._fail_request(request, error)
            return
        if step is None:
            self._finish(request, request.search.finished[0].finish_reason)
            return
        rows, request.tokens = step
        pairs = zip((request.slots[row] for row in rows), request.slots, strict=True)
        moved = [(source, target) for source, target in pairs if source != target]
        self.runner.cache.copy_([source for source, _ in moved], [target for _, target in moved], request.position)

    # Requests come and go ---------------------------------------------------------------------------------------------

    def _activate(self, handle: Handle) -> None:
        """Gives a request its slots."""
        config, prompt = handle.config, handle.prompt
        slots, self.free = self.free[: config.num_beams], self.free[config.num_beams :]
        text = AnswerText(self.tokenizer, config.stop, is_streamed=handle.on_text is not None)
        request = ActiveRequest(handle, slots, text)
        vocab_size, device = self.model.config.text.vocab_size, self.model.device
        if config.num_beams == 1:
            request.sampler = SamplerState(config, prompt.ids, vocab_size, device)
        else:
            request.search = BeamSearch(config, prompt.ids, self.tokenizer, vocab_size, device)
        self.active.append(request)
        self.active.sort(key=lambda request: request.search is not None)  # the order that _choose expects
        if handle.on_start:
            handle.on_start()
        try:
            self.runner.make_room(len(prompt.ids) + config.max_new_tokens)
            same = [each for each in self.active if each.handle.prompt is prompt and not each.tokens and each.reader]
            request.reader = same[0].reader if same else self._reader(prompt, slots[0])
        except (ValueError, torch.OutOfMemoryError) as error:
            self._fail_request(request, error)

    def _reader(self, prompt: Prompt, slot: int) -> PromptReader:
        return PromptReader(self.runner, self.store, prompt, slot, next(self.numbers))

    def _drop_cancelled(self) -> None:
        for request in [request for request in self.active if request.handle.is_cancelled]:
            if request.search is not None:
                request.search.cancel()
            self._finish(request, "cancelled")
        for handle in [handle for handle in list(self.waiting) if handle.is_cancelled]:  # other threads may append
            self.waiting.remove(handle)
            handle.finish(Generated((), "", "cancelled", len(handle.prompt.ids)))

    def _finish(self, request: ActiveRequest, reason: str, end_id: int | None = None) -> None:
        handle, hypotheses = request.handle, ()
        if request.search is not None:
            hypotheses = tuple(request.search.finished[: handle.config.num_return_sequences])
            request.ids = list(hypotheses[0].ids)
            for token in request.ids if handle.on_token else ():
                handle.on_token(token)
        elif self.runner.is_row_exact and request.tokens and reason != "cancelled":
            keys = request.reader.keys_of((*handle.prompt.ids, *request.ids))
            request.reader.keep(keys, request.slots[0], len(handle.prompt.ids), request.position)
        handle.emit_text(request.text.close(request.ids))
        logprobs = tuple(request.logprobs) if handle.config.logprobs else ()
        top_logprobs, num_prompt = tuple(request.top_logprobs), len(handle.prompt.ids)
        ids, text = tuple(request.ids), request.text.text
        answer = Generated(ids, text, reason, num_prompt, hypotheses, logprobs, top_logprobs, end_id)
        self._release(request, answer)

    def _fail_request(self, request: ActiveRequest, error: BaseException) -> None:
        """Ends one request with its error. Slots and store are cleared: NaN in them would reach the next request."""
        self.runner.cache.clear_(request.slots)
        self.store.clear()
        self._release(request, error=error)

    def _fail_prompt(self, reader: PromptReader, error: BaseException) -> None:
        for request in self._waiting_for(reader):
            self._fail_request(request, error)

    def fail(self, error: BaseException) -> None:
        """Ends every request with `error`."""
        for request in list(self.active):
            self._release(request, error=error)
        while self.waiting:
            self.waiting.popleft().finish(error=error)

    def _release(
        self, request: ActiveRequest, answer: Generated | None = None, error: BaseException | None = None
    ) -> None:
        self.active.remove(request)
        self.free = sorted(self.free + request.slots)
        reader = request.reader
        others = self._waiting_for(reader) if reader is not None and reader.unread else []
        if others and reader.slot in request.slots:  # it ends first: they need a reader of their own
            reader = self._reader(others[0].handle.prompt, others[0].slots[0])
            for each in others:
                each.reader = reader
        request.handle.finish(answer, error)

    def run(self, handles: list[Handle], is_cancelled: Callable[[], bool] = bool) -> None:
        """Steps until all of `handles` are done, or `is_cancelled()`, asked after every step, cancels them."""
        while not all(handle.is_done for handle in handles):
            self.step()
            if is_cancelled():
                for handle in handles:
                    handle.cancel()


def generate(
    model: MultimodalLLM,
    prompts: Iterable[Prompt],
    config: GenerationConfig,
    *,
    slots: int | None = None,
    store_bytes: int = 0,
    is_exact: bool = True,
    use_static_step: bool | None = None,
    is_cancelled: Callable[[], bool] = bool,
) -> Iterator[Generated]:
    """Yields one answer per prompt, in order, by an engine that lives as long as the call.

    Prompts are taken as slots become free, and a few ahead. `is_cancelled()` is asked after every step and ends all
    answers. Raises UserError for a prompt that leaves no room for its answer, GenerationError where logits are not finite.
    """
    prompts = iter(prompts)
    first = list(islice(prompts, slots or SLOTS[model.device.type]))
    slots = max(len(first), config.num_beams)
    longest = max((len(prompt.ids) for prompt in first), default=0) + config.max_new_tokens
    engine = Engine(
        model, slots, max_length=longest, store_bytes=store_bytes, is_exact=is_exact, use_static_step=use_static_step
    )
    handles = deque(engine.submit(Handle(prompt, config)) for prompt in first)
    while handles:
        engine.step()
        if is_cancelled():
            for handle in handles:
                handle.cancel()
        while handles and handles[0].is_done:
            yield handles.popleft().result()
        handles += [engine.submit(Handle(prompt, config)) for prompt in islice(prompts, slots - len(engine.waiting))]
