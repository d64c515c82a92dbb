"""Other forms of a trained model: adapters added to the weights, and the language model alone."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmllm.data.chat import user
from mmllm.data.processor_files import save_processor
from mmllm.errors import CheckpointError
from mmllm.layers.lora import adapters, merge_lora_
from mmllm.runtime.files import write_json
from mmllm.storage.atomic import atomic_directory

PROMPTS = ("Describe this image.", "What is in the middle of it, and what is beside it?")


@torch.no_grad()
def merge_adapters_(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Adds the adapters to the weights; returns a line on what that changed at the positions of two prompts.

    The sums are stored in `dtype`, by default float32: bfloat16 keeps 8 bits of each, and an adapter is a small change.
    CheckpointError where float32 weights would answer otherwise than before.
    """
    before = prompt_logits(model)
    for layer in adapters(model.language_model).values():
        layer.weight.data = layer.weight.data.float()
    merge_lora_(model.language_model)
    model.form = replace(model.form, lora=None)
    if dtype:
        model.to(dtype)
    after = prompt_logits(model)
    error = float((before - after).abs().max() / before.std())
    same = int((before.argmax(-1) == after.argmax(-1)).sum())
    if not dtype and not error < 1e-2:
        raise CheckpointError(f"merging changes the logits by {error:.2g} of their deviation; the weights are damaged")
    return f"adapters merged: logits within {error:.1g} of their deviation, {same} of {len(after)} best tokens the same"


def prompt_logits(model: nn.Module) -> Tensor:
    """Logits (T, V) at all positions of PROMPTS, computed in float32 about an image of noise."""
    side = model.config.vision.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.device)
    kept = {name: value.dtype for name, value in model.named_parameters()}
    model.float()
    ids = [torch.tensor([model.processor.encode_prompt([user(text, 1)])], device=model.device) for text in PROMPTS]
    logits = torch.cat([model.logits(ids_1T, pixels)[0] for ids_1T in ids])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kept[name])
    return logits


def save_language_model(model: nn.Module, folder: str | Path, *, replace: bool = False) -> None:
    """Writes the language model alone, without adapters, as transformers' AutoModelForCausalLM reads it."""
    text = model.language_model
    left_out = {"lm_head.weight"} if model.config.text.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in text.state_dict().items() if name not in left_out}
    with atomic_directory(folder, replace=replace) as temporary:
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        save_processor(model.processor, temporary)
        for name in ("preprocessor_config.json", "processor_config.json"):
            (temporary / name).unlink()
        write_json(temporary / "config.json", model.config.text.to_dict())
