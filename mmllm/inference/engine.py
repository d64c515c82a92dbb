"""The engine: many requests side by side in slots, each at its own position, joining and leaving between steps.

The surprising fact: a batch that waits for its slowest row wastes most of itself. Here a row that is done gives its slot
to the next request at once (continuous batching, https://www.usenix.org/conference/osdi22/presentation/yu), and a
question that comes in is under way after one step, whatever the others are doing.

An answer does not depend on who else is asking (`is_exact`): a prompt is read by itself, attention never mixes rows
(cache.py), and on a CPU rows share a matrix product only where it gives each row the bits that it would give it alone;
torch's own do not, so their rows take turns. On a GPU every step has the same shape, however many slots are taken.

One thread drives it: `submit` and `Handle.cancel` may be called from others, `step` from one. No event loop in here.

B rows of a step, T prompt tokens, D hidden size, V vocabulary. Next: generate.py, pipeline.py, worker.py.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmllm.errors import GenerationError, RunError, UserError
from mmllm.inference.beam_search import BeamSearch
from mmllm.inference.request import Generated, Handle, Hypothesis, Prefix, Prompt
from mmllm.inference.sampling import GenerationConfig, Row, choose, not_finite
from mmllm.inference.static_step import FixedStep
from mmllm.inference.text_stream import AnswerText, whole_text
from mmllm.layers.lora import has_adapter
from mmllm.layers.packed import Packed
from mmllm.layers.quantized import FrozenLinear
from mmllm.models.kv_cache import KVCache, PerSlot
from mmllm.models.multimodal import MultimodalLLM

GROWTH = 256  # tokens by which the cache grows; GPUs want masks of a multiple of 8
SLOTS = {"cpu": 4, "cuda": 64, "mps": 4}  # requests side by side where nobody says how many


def rounded(length: int) -> int:
    return -(-length // GROWTH) * GROWTH


@dataclass(eq=False)
class Live:
    """A request in its slots: one, or one a beam. `position` is where the next token goes."""

    handle: Handle
    slots: list[int]
    text: AnswerText | None
    search: BeamSearch | None
    row: Row | None
    position: int
    ids: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # chosen but not read yet, one a slot


class Engine:
    """Answers requests in `slots` slots. `is_exact` False lets rows share any product: faster on a CPU without our
    kernels, and near ties may fall otherwise in company. `is_compiled` compiles the step (a minute, once a machine).
    `is_fixed` False keeps it out of a CUDA graph, which cannot hold what the layers of a spread model do besides."""

    def __init__(
        self,
        model: MultimodalLLM,
        slots: int | None = None,
        *,
        max_length: int = GROWTH,
        prefills_per_step: int = 1,
        is_exact: bool = True,
        is_compiled: bool = False,
        is_fixed: bool | None = None,
    ):
        self.model, self.slots = model, slots or SLOTS[model.device.type]
        self.tokenizer, self.vocab_size = model.processor.tokenizer, model.config.text.vocab_size
        self.prefills_per_step = prefills_per_step
        self.rows_take_turns = is_exact and model.device.type == "cpu" and has_plain_products(model.language_model)
        with torch.inference_mode():
            self.cache = KVCache(
                model.config.text, self.slots, rounded(max_length), device=model.device, dtype=model.dtype
            )
        is_fixed = is_compiled or (model.device.type == "cuda" if is_fixed is None else is_fixed)
        self.fixed = FixedStep(model.language_model, self.cache, self.slots, is_compiled) if is_fixed else None
        self.waiting: deque[Handle] = deque()
        self.live: list[Live] = []
        self.free = list(range(self.slots))

    @property
    def busy(self) -> int:
        return self.slots - len(self.free)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.live)

    def submit(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        *,
        on_start: Callable[[], None] | None = None,
        on_token: Callable[[int], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        on_done: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Puts a request at the end of the queue. UserError for what could never be answered here."""
        self.check(prompt, config)
        handle = Handle(prompt, config, on_start, on_token, on_text, on_done)
        self.waiting.append(handle)
        return handle

    def check(self, prompt: Prompt, config: GenerationConfig) -> None:
        room = self.model.config.text.max_position_embeddings
        if len(prompt.ids) + config.max_new_tokens > room:
            raise UserError(
                f"the prompt has {len(prompt.ids)} tokens and max_new_tokens is {config.max_new_tokens}, but the model "
                f"has {room} positions; shorten one of them"
            )
        if config.num_beams > self.slots:
            raise UserError(f"num_beams is {config.num_beams}, but this engine has {self.slots} slots; give it more")

    @torch.inference_mode()
    def read(self, ids: tuple[int, ...], pixels_N3SS: Tensor) -> Prefix:
        """The beginning of prompts, read once, for `Prompt.prefix`. Call it in the thread that drives the engine."""
        cache = KVCache(self.model.config.text, 1, len(ids), device=self.model.device, dtype=self.model.dtype)
        self._read(cache, 0, 0, ids, pixels_N3SS)
        return Prefix(ids, len(pixels_N3SS), *cache.read(0, len(ids)))

    @torch.inference_mode()
    def step(self) -> bool:
        """Lets the cancelled go, reads the prompts of those whose turn it is, and makes one token for every live row.

        Whether anything is left to do. What is wrong with one request is that request's error; what is raised here
        concerns all of them: then `fail` them.
        """
        self._drop_cancelled()
        for _ in range(self.prefills_per_step):
            if not self._admit():
                break
        if self.live:
            self._decode(list(self.live))
        return self.has_work

    def fail(self, error: BaseException) -> None:
        """Every request ends with `error`."""
        for live in list(self.live):
            self._leave(live, error=error)
        while self.waiting:
            self.waiting.popleft().finish(error=error)

    def _drop_cancelled(self) -> None:
        for live in [live for live in self.live if live.handle.is_cancelled]:
            if live.search is not None:
                live.search.give_up()
            self._end(live, "cancelled")
        for handle in [handle for handle in list(self.waiting) if handle.is_cancelled]:  # others may be adding to it
            self.waiting.remove(handle)
            handle.finish(Generated((), "", "cancelled", len(handle.prompt.ids)))

    def _admit(self) -> bool:
        """Gives the next request its slots and reads its prompt; whether there was one, and room for it."""
        if not self.waiting or len(self.free) < self.waiting[0].config.num_beams:
            return False
        handle = self.waiting.popleft()
        config, prompt = handle.config, handle.prompt
        slots = [self.free.pop(0) for _ in range(config.num_beams)]
        text = AnswerText(self.tokenizer, config.stop) if config.stop or handle.on_text else None
        row = search = None
        if config.num_beams == 1:
            row = Row(config, prompt.ids, self.vocab_size, self.model.device)
        else:
            stop_ids = self.tokenizer.stop_ids
            search = BeamSearch(config, prompt.ids, stop_ids, self.vocab_size, self.model.device)
        live = Live(handle, slots, text, search, row, len(prompt.ids))
        self.live.append(live)
        if handle.on_start:
            handle.on_start()
        try:
            logits_1V = self._prefill(prompt, config, slots[0])
        except (UserError, RunError, ValueError, torch.OutOfMemoryError) as error:
            self._leave_clean(live, error)
            return True
        self.cache.copy_([slots[0]] * (len(slots) - 1), slots[1:], live.position)
        self._choose([live], logits_1V)
        return True

    def _prefill(self, prompt: Prompt, config: GenerationConfig, slot: int) -> Tensor:
        """Reads a prompt into a slot; the logits of its first new token, (1, V)."""
        needed = len(prompt.ids) + config.max_new_tokens
        if needed > self.cache.length:
            self.cache.grow_(rounded(needed))
        prefix, start, pixels_N3SS = prompt.prefix, 0, prompt.pixels
        if prefix is not None and prefix.begins(prompt.ids):
            self.cache.write(slot, prefix.keys_LGTK, prefix.values_LGTK)
            start, pixels_N3SS = len(prefix.ids), prompt.pixels[prefix.num_images :]
        return self._read(self.cache, slot, start, prompt.ids[start:], pixels_N3SS)

    def _read(self, cache: KVCache, slot: int, start: int, ids: tuple[int, ...], pixels_N3SS: Tensor) -> Tensor:
        language_model, device = self.model.language_model, self.model.device
        x_1TD = self.model.embed(torch.tensor([ids], device=device), pixels_N3SS)
        positions_1T = torch.arange(start, start + len(ids), device=device)[None]
        last = torch.tensor([0], device=device), torch.tensor([len(ids) - 1], device=device)
        x_1D = language_model(x_1TD, positions_1T, cache=PerSlot(cache, [slot], [start]), keep=last)
        return language_model.logits(x_1D)

    def _decode(self, lives: list[Live]) -> None:
        """Reads the token that every live row chose last, and chooses the next."""
        slots = [slot for live in lives for slot in live.slots]
        tokens = [token for live in lives for token in live.tokens]
        starts = [live.position for live in lives for _ in live.slots]
        for live in lives:
            live.position += 1
        if self.fixed is not None:
            logits_BV = self.fixed(slots, tokens, starts)
        elif self.rows_take_turns:
            each = zip(slots, tokens, starts, strict=True)
            logits_BV = torch.cat([self._next([slot], [token], [start]) for slot, token, start in each])
        else:
            logits_BV = self._next(slots, tokens, starts)
        self._choose(lives, logits_BV)

    def _next(self, slots: list[int], tokens: list[int], starts: list[int]) -> Tensor:
        """Logits (B, V) of what follows `tokens`, which go to the positions `starts` of `slots`."""
        language_model, device = self.model.language_model, self.model.device
        x_B1D = language_model.embed(torch.tensor(tokens, device=device)[:, None])
        positions_B1 = torch.tensor(starts, device=device)[:, None]
        x_B1D = language_model(x_B1D, positions_B1, cache=PerSlot(self.cache, slots, starts))
        return language_model.logits(x_B1D[:, 0])

    def _choose(self, lives: list[Live], logits_BV: Tensor) -> None:
        """Takes the next token of every row out of its logits; they lie in the order of the rows."""
        counts = [1 if live.search is None else len(live.search.live) for live in lives]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        single = [i for i, live in enumerate(lives) if live.search is None]
        if single:
            rows_BV = logits_BV[[starts[i] for i in single]] if len(single) < len(lives) else logits_BV
            tokens = choose(rows_BV, [lives[i].row for i in single], list(self.tokenizer.stop_ids))
            for i, token in zip(single, tokens, strict=True):
                self._hear(lives[i], token)
        for live, start, count in zip(lives, starts, counts, strict=True):
            if live.search is not None:
                self._search(live, logits_BV[start : start + count])

    def _hear(self, live: Live, token: int) -> None:
        """A row has chosen `token`."""
        handle = live.handle
        if token < 0:
            self._leave_clean(live, not_finite(len(live.ids)))
        elif token in self.tokenizer.stop_ids:
            self._end(live, "stop")
        else:
            live.ids.append(token)
            live.tokens = [token]
            if handle.on_token:
                handle.on_token(token)
            if live.text is not None:
                self._tell(handle, live.text.feed(token))
            if live.text is not None and live.text.is_stopped:
                self._end(live, "stop")
            elif len(live.ids) == handle.config.max_new_tokens:
                self._end(live, "length")

    def _search(self, live: Live, logits_BV: Tensor) -> None:
        """A request's beams go on, or end."""
        try:
            step = live.search.advance(logits_BV)
        except GenerationError as error:
            self._leave_clean(live, error)
            return
        if step is None:
            self._end(live, live.search.finished[0][3])
            return
        rows, live.tokens = step
        moved = [(live.slots[row], slot) for row, slot in zip(rows, live.slots, strict=True) if live.slots[row] != slot]
        if moved:
            sources, targets = zip(*moved, strict=True)
            self.cache.copy_(list(sources), list(targets), live.position)

    def _end(self, live: Live, reason: str) -> None:
        handle = live.handle
        hypotheses = ()
        if live.search is not None:
            found = live.search.finished[: handle.config.num_return_sequences]
            hypotheses = tuple(
                Hypothesis(ids, whole_text(self.tokenizer, list(ids)), why, logprob, score)
                for score, logprob, ids, why in found
            )
            live.ids = list(hypotheses[0].ids)
            for token in live.ids:
                if handle.on_token:
                    handle.on_token(token)
        if live.text is None:
            text = whole_text(self.tokenizer, live.ids)
        else:
            self._tell(handle, live.text.close(live.ids))
            text = live.text.text
        answer = Generated(tuple(live.ids), text, reason, len(handle.prompt.ids), hypotheses)
        self._leave(live, answer)

    def _tell(self, handle: Handle, piece: str) -> None:
        if piece and handle.on_text:
            handle.on_text(piece)

    def _leave_clean(self, live: Live, error: BaseException) -> None:
        """A request that failed by itself: nothing of it stays behind for the next one in its slots."""
        self.cache.clear_(live.slots)
        self._leave(live, error=error)

    def _leave(self, live: Live, answer: Generated | None = None, error: BaseException | None = None) -> None:
        self.live.remove(live)
        self.free = sorted(self.free + live.slots)
        live.handle.finish(answer, error)


def has_plain_products(module: nn.Module) -> bool:
    """Whether some layer is one of torch's matrix products, whose last bits depend on the number of rows."""
    return any(
        isinstance(layer, nn.Linear | FrozenLinear)
        or (isinstance(layer, Packed) and (layer.mixes_rows or has_adapter(layer)))
        for layer in module.modules()
    )
