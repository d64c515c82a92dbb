"""The same work by `transformers` and `peft`, as their own documentation does it.

A peer gets what costs its user one argument: bfloat16 for frozen weights, the fused optimizer, its fastest attention. A
comparison is worth little unless the other side is at its best.

mmllm needs neither; they are imported when they are measured.
"""

import importlib.util
import time
from collections.abc import Callable

import torch

from benchmarks.random_model import fill_, image, prompt_ids
from benchmarks.runner import Work, speeds
from mmllm.config.schema import LoraConfig
from mmllm.data.batches import Batch
from mmllm.models.config import MultimodalConfig
from mmllm.runtime.device import autocast, choose_device
from mmllm.runtime.memory import peak_memory


def has_transformers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def training_step(
    architecture: MultimodalConfig,
    batch: Batch,
    trained: tuple[str, ...],
    lora: LoraConfig | None,
    device: str,
    *,
    bf16: bool,
    rate: float,
) -> Callable[[], float]:
    """One optimizer step of LlavaForConditionalGeneration, with adapters by peft where `lora` is given.

    Frozen weights are bfloat16, trained ones float32 under autocast, as Trainer with `bf16=True` has them.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    place = choose_device(device)
    settings = {name: value for name, value in architecture.to_dict().items() if name != "architectures"}
    with torch.device(place), no_init_weights():
        model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    model.tie_weights()
    fill_(model)
    inner, trains_all = model.model, "language_model" in trained and lora is None
    inner.vision_tower.requires_grad_(False)
    inner.language_model.requires_grad_(trains_all)  # and with it the tied head
    if bf16:
        inner.vision_tower.bfloat16()
        if not trains_all:
            inner.language_model.bfloat16()
    model.train()
    if "language_model" in trained and lora is not None:
        model = with_adapters(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batch = batch.to(place)

    def step() -> float:
        with autocast(place, bf16):
            loss = model(
                input_ids=batch.ids_BT,
                attention_mask=torch.ones_like(batch.ids_BT),
                pixel_values=batch.pixels_N3SS,
                labels=batch.labels_BT,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def with_adapters(model: torch.nn.Module, lora: LoraConfig) -> torch.nn.Module:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    modules = "|".join(lora.target_modules)
    about = PeftConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=rf".*language_model\..*\.({modules})",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, about)


# Generation -----------------------------------------------------------------------------------------------------------


def answers(spec: dict) -> tuple[dict, Work]:
    """`generate` of LlavaForConditionalGeneration on our directory, with attention by torch; `compiled`: a cache of fixed
    size and its own compilation of the decoding step."""
    from transformers import LlavaForConditionalGeneration
    from transformers.generation import BaseStreamer, CompileConfig

    class Clock(BaseStreamer):
        def __init__(self):
            self.times: list[float] = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            """Nothing is left to write."""

    begin = time.perf_counter()
    device = choose_device(spec["device"])
    model = LlavaForConditionalGeneration.from_pretrained(spec["model"], dtype=getattr(torch, spec["precision"]))
    model = model.to(device).eval()
    load_s = time.perf_counter() - begin
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if spec["compiled"]:
        compilation = CompileConfig(fullgraph=False)
        compilation._compile_all_devices = True  # its own switch: without it, only GPUs compile
        settings |= {"cache_implementation": "static", "compile_config": compilation}

    def turn(asked: dict) -> dict:
        rows = range(asked["rows"])
        ids = torch.tensor([prompt_ids(spec, row) for row in rows], device=device)
        pixels = torch.cat([image(spec, row) for row in rows])
        clock, begin = Clock(), time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(device, model.dtype),
            max_new_tokens=asked["new_tokens"],
            streamer=clock,
            **settings,
        )
        total = time.perf_counter() - begin
        token_times = [(row, at) for at in clock.times[1:] for row in rows]  # the first one is the prompt
        return speeds(token_times, begin, total, asked["rows"]) | {"peak_bytes": peak_memory(device)}

    language_bytes = sum(p.nbytes for p in model.model.language_model.parameters())
    return {"load_s": load_s, "weight_bytes": language_bytes}, turn
