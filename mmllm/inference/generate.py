"""From prompts to answers in one call: an engine that lives as long as the call.

Next: pipeline.py.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from mmllm.inference.engine import SLOTS, Engine
from mmllm.inference.request import Generated, Handle, Prompt
from mmllm.inference.sampling import GenerationConfig
from mmllm.models.multimodal import MultimodalLLM


def generate(
    model: MultimodalLLM,
    prompts: list[Prompt],
    config: GenerationConfig,
    *,
    slots: int | None = None,
    is_exact: bool = True,
    is_fixed: bool | None = None,
    on_token: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Generated]:
    """One answer per prompt, in order.

    `on_token(row, id)` hears of every token as it comes (at the end under beam search); `cancelled()` is asked after
    every step. Raises UserError when a prompt leaves no room, GenerationError when logits are not finite.
    """
    engine = Engine(
        model,
        slots or max(config.num_beams, min(len(prompts), SLOTS[model.device.type])),
        max_length=max((len(prompt.ids) for prompt in prompts), default=0) + config.max_new_tokens,
        is_exact=is_exact,
        is_fixed=is_fixed,
    )
    handles = [
        engine.submit(prompt, config, on_token=on_token and (lambda token, row=row: on_token(row, token)))
        for row, prompt in enumerate(prompts)
    ]
    drive(engine, handles, cancelled)
    return [handle.result() for handle in handles]


def generate_each(
    model: MultimodalLLM, prompts: Iterable[Prompt], config: GenerationConfig, *, slots: int, is_exact: bool = True
) -> Iterator[Generated]:
    """The answers of many prompts, in order; `prompts` are taken as slots become free, and a few ahead."""
    engine = Engine(model, max(slots, config.num_beams), prefills_per_step=slots, is_exact=is_exact)
    handles: deque[Handle] = deque()
    source = iter(prompts)
    is_over = False
    while handles or not is_over:
        while not is_over and len(engine.waiting) < engine.slots:
            prompt = next(source, None)
            if prompt is None:
                is_over = True
            else:
                handles.append(engine.submit(prompt, config))
        engine.step()
        while handles and handles[0].is_done:
            yield handles.popleft().result()


def drive(engine: Engine, handles: list[Handle], cancelled: Callable[[], bool] | None = None) -> None:
    """Steps until all of `handles` are done; when `cancelled()` says so they are given up."""
    while not all(handle.is_done for handle in handles):
        engine.step()
        if cancelled is not None and cancelled():
            for handle in handles:
                handle.cancel()
