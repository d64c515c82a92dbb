"""Answers to many prompts with an engine that lives as long as the call: what evaluation and validation use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from mmllm.inference.engine import SLOTS, Engine
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.models.multimodal import MultimodalLLM


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
    """Yields one answer per prompt, in order. Prompts are taken as slots become free, and a few ahead.

    `is_cancelled()` is asked after every step and ends all answers. Raises UserError for a prompt that leaves no room for
    its answer, GenerationError where logits are not finite.
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
