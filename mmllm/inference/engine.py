"""The engine answers many requests at once: each has a slot of the KV cache, and every step gives each one token.

When a request is finished, the next one takes its slot while the others continue (continuous batching,
https://www.usenix.org/conference/osdi22/presentation/yu); a batch that waits for its slowest row would waste most of
its time. `Engine.step` is the decode loop: prefill what is waiting, decode one token per row, choose, accept.

An answer does not depend on the requests beside it: each prompt is prefilled alone, attention never mixes rows
(kv_cache.py), and rows share a matrix product only where that does not change their bits (model_runner.py).

One thread drives the engine with `step`; `submit` and `Handle.cancel` may be called from any thread.

B rows of a step, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from mmllm.errors import GenerationError, RunError, UserError
from mmllm.inference.beam_search import BeamSearch
from mmllm.inference.model_runner import ModelRunner
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.inference.sampling import NOT_FINITE, SamplerState, choose, likeliest, non_finite_error, token_logprobs
from mmllm.inference.static_step import BUCKET
from mmllm.inference.text_stream import AnswerText
from mmllm.models.multimodal import MultimodalLLM

SLOTS = {"cpu": 4, "cuda": 64, "mps": 4}  # default number of requests side by side


@dataclass(eq=False)
class ActiveRequest:
    """A request in its slots: one, or one per beam. `sampler` or `search` chooses its tokens."""

    handle: Handle
    slots: list[int]
    position: int  # where the next token goes in the cache
    text: AnswerText
    sampler: SamplerState | None = None
    search: BeamSearch | None = None
    ids: list[int] = field(default_factory=list)  # the answer so far
    logprobs: list[float] = field(default_factory=list)  # of each chosen token, where they are wanted
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # chosen but not yet in the cache, one per slot


def has_beams(request: ActiveRequest) -> bool:
    return request.search is not None


class Engine:
    """Answers requests in `slots` slots (None: SLOTS). The cache begins with room for `max_length` tokens and grows.

    `is_exact` False lets rows share any matrix product: faster on a CPU without our kernels, but near ties may then
    depend on other requests. `is_compiled` compiles the step (a minute, once per machine). `use_static_step` None means
    on CUDA; a sharded model must not use it, because its collectives do not fit into a CUDA graph.
    """

    def __init__(
        self,
        model: MultimodalLLM,
        slots: int | None = None,
        *,
        max_length: int = BUCKET,
        prefills_per_step: int = 1,
        is_exact: bool = True,
        is_compiled: bool = False,
        use_static_step: bool | None = None,
    ):
        self.model, self.slots, self.prefills_per_step = model, slots or SLOTS[model.device.type], prefills_per_step
        self.tokenizer = model.processor.tokenizer
        is_static = is_compiled or (model.device.type == "cuda" if use_static_step is None else use_static_step)
        self.runner = ModelRunner(model, self.slots, max_length, is_exact, is_compiled, is_static)
        self.waiting: deque[Handle] = deque()
        self.active: list[ActiveRequest] = []
        self.free = list(range(self.slots))

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
        """Drops cancelled requests, prefills waiting ones and decodes one token for every active row.

        Returns whether work is left. The error of one request goes to its handle; what is raised here concerns all of
        them: call `fail`.
        """
        self._drop_cancelled()
        for _ in range(self.prefills_per_step):
            if not self._admit():
                break
        if self.active:
            self._choose(list(self.active), self._decode())
        return self.has_work

    def _admit(self) -> bool:
        """Gives the next waiting request its slots and its first token, and those that wait behind it with the same prompt
        (the same object): it is read once for all. False: none is waiting, or slots are missing."""
        if not self._fits_next():
            return False
        prompt = self.waiting[0].prompt
        request = self._activate(self.waiting.popleft())
        try:
            logits_1V = self.runner.prefill(request.slots[0], prompt, request.handle.config.max_new_tokens)
        except (UserError, RunError, ValueError, torch.OutOfMemoryError) as error:
            self._fail_request(request, error)
            return True
        requests = [request]
        while self._fits_next() and self.waiting[0].prompt is prompt:
            requests.append(self._activate(self.waiting.popleft()))
        first, *others = [slot for request in requests for slot in request.slots]
        self.runner.make_room(len(prompt.ids) + max(request.handle.config.max_new_tokens for request in requests))
        self.runner.cache.copy_([first] * len(others), others, len(prompt.ids))
        requests.sort(key=has_beams)
        self._choose(requests, logits_1V.expand(len(others) + 1, -1))
        return True

    def _fits_next(self) -> bool:
        """Whether a request is waiting and there are slots for it."""
        return bool(self.waiting) and len(self.free) >= self.waiting[0].config.num_beams

    def _decode(self) -> Tensor:
        """Puts the last token of every active row into the cache. Logits (B, V) of the next ones."""
        slots = [slot for request in self.active for slot in request.slots]
        tokens = [token for request in self.active for token in request.tokens]
        positions = [request.position for request in self.active for _ in request.slots]
        for request in self.active:
            request.position += 1
        return self.runner.decode(slots, tokens, positions)

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
            self._finish(request, "stop")
        else:
            request.ids.append(token)
            request.tokens = [token]
            if handle.on_token:
                handle.on_token(token)
            self._emit_text(handle, request.text.feed(token))
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

    def _activate(self, handle: Handle) -> ActiveRequest:
        config, prompt_ids = handle.config, handle.prompt.ids
        slots, self.free = self.free[: config.num_beams], self.free[config.num_beams :]
        text = AnswerText(self.tokenizer, config.stop, is_streamed=handle.on_text is not None)
        request = ActiveRequest(handle, slots, len(prompt_ids), text)
        vocab_size, device = self.model.config.text.vocab_size, self.model.device
        if config.num_beams == 1:
            request.sampler = SamplerState(config, prompt_ids, vocab_size, device)
        else:
            request.search = BeamSearch(config, prompt_ids, self.tokenizer, vocab_size, device)
        self.active.append(request)
        self.active.sort(key=has_beams)  # the order that _choose expects
        if handle.on_start:
            handle.on_start()
        return request

    def _drop_cancelled(self) -> None:
        for request in [request for request in self.active if request.handle.is_cancelled]:
            if request.search is not None:
                request.search.cancel()
            self._finish(request, "cancelled")
        for handle in [handle for handle in list(self.waiting) if handle.is_cancelled]:  # other threads may append
            self.waiting.remove(handle)
            handle.finish(Generated((), "", "cancelled", len(handle.prompt.ids)))

    def _finish(self, request: ActiveRequest, reason: str) -> None:
        handle, hypotheses = request.handle, ()
        if request.search is not None:
            hypotheses = tuple(request.search.finished[: handle.config.num_return_sequences])
            request.ids = list(hypotheses[0].ids)
            for token in request.ids if handle.on_token else ():
                handle.on_token(token)
        self._emit_text(handle, request.text.close(request.ids))
        logprobs = tuple(request.logprobs) if handle.config.logprobs else ()
        top_logprobs, num_prompt = tuple(request.top_logprobs), len(handle.prompt.ids)
        ids, text = tuple(request.ids), request.text.text
        answer = Generated(ids, text, reason, num_prompt, hypotheses, logprobs, top_logprobs)
        self._release(request, answer)

    def _emit_text(self, handle: Handle, piece: str) -> None:
        if piece and handle.on_text:
            handle.on_text(piece)

    def _fail_request(self, request: ActiveRequest, error: BaseException) -> None:
        """Ends one request with its error. Its slots are cleared: under a mask, NaN would reach the next request."""
        self.runner.cache.clear_(request.slots)
        self._release(request, error=error)

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
    engine = Engine(
        model,
        slots,
        max_length=max((len(prompt.ids) for prompt in first), default=0) + config.max_new_tokens,
        prefills_per_step=slots,
        is_exact=is_exact,
        use_static_step=use_static_step,
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
