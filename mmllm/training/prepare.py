"""What a loaded model becomes before it is trained: quantized, with adapters, partly frozen, recomputed, compiled.

The order is forced: adapters sit beside weights that are already quantized, only parameters that exist can be frozen, and
what is compiled or sharded must be finished. A block's `forward` is replaced on the instance, the block is not wrapped:
no parameter changes its name, and a checkpoint written with recomputation loads without it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.config.schema import ExperimentConfig, StageConfig
from mmllm.errors import ConfigError
from mmllm.layers.lora import adapter_names, adapters, add_lora_, merge_lora_, target_layers
from mmllm.layers.quantized import count_parameters, quantize_
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import print_rank0
from mmllm.runtime.machine import refuse_without_compiler
from mmllm.runtime.memory import blocks_apart

PART_OF = {  # the words of the configuration: the model's own names
    "projector": "multi_modal_projector",
    "language_model": "language_model",
    "vision_tower": "vision_tower",
}


def trained_parts(stage: StageConfig) -> list[str]:
    """The model's names of the parts that a stage trains."""
    return [PART_OF[part] for part in stage.train]


def prepare(model: MultimodalLLM, config: ExperimentConfig) -> None:
    """quantize_ -> add_lora_ -> train_only_ -> checkpoint_blocks_ -> compile_blocks_, as the configuration says.

    `shard_` comes after it, and each stage narrows `train_only_` to its own parts.
    """
    apply_rounding_(model, config)
    apply_lora_(model, config)
    # Autograd adds few rows to the gradient of the tied head. On a GPU the order of the sum would not be deterministic.
    is_tied = model.config.text.tie_word_embeddings
    model.language_model.model.embed_tokens.sparse = is_tied and model.device.type == "cpu"
    train_only_(model, {part for stage in config.stages() if stage.epochs for part in trained_parts(stage)})
    if config.training.gradient_checkpointing:
        checkpoint_blocks_(model.language_model.model.layers)
        if count_parameters(model.vision_tower, only_trainable=True):
            checkpoint_blocks_(model.vision_tower.vision_model.encoder.layers)
    if config.training.compile:
        compile_blocks_(model.language_model.model.layers)


def apply_rounding_(model: MultimodalLLM, config: ExperimentConfig) -> None:
    """Quantize the language model to int8 or int4 where the configuration asks for it."""
    if packed := model.form.packed:
        raise ConfigError(
            f"model.pretrained holds {packed} weights to answer with; train from the model they came from"
        )
    settings = {"int8": "model.load_in_8bit", "int4": "model.load_in_4bit"}
    wanted = next((kind for kind, name in settings.items() if config.get(name)), None)
    if model.form.rounding and model.form.rounding != wanted:
        raise ConfigError(
            f"the model came with an {model.form.rounding} base; set {settings[model.form.rounding]}=true"
        )
    if wanted and not model.form.rounding:
        if model.form.lora:
            raise ConfigError(f"the model came with adapters beside a float base; set {settings[wanted]}=false")
        quantize_(model.language_model, wanted)
        model.form = replace(model.form, rounding=wanted)


def apply_lora_(model: MultimodalLLM, config: ExperimentConfig) -> None:
    """Give the model the adapters that the configuration asks for: new ones, those it came with, or none."""
    wanted = config.model.lora_config if config.model.use_lora else None
    if model.form.lora and wanted:
        same_layers = set(adapters(model.language_model)) == set(target_layers(model.language_model, wanted))
        found = model.form.lora.model_copy(update={"target_modules": wanted.target_modules})
        if not same_layers or wanted != found:
            raise ConfigError(f"model.lora_config is {wanted}, but the model came with {model.form.lora}; use the same")
    if model.form.lora and not wanted:
        print_rank0("the model came with adapters and model.use_lora is false: they are added to its weights")
        merge_lora_(model.language_model)
        model.form = replace(model.form, lora=None)
    elif wanted and not model.form.lora:
        add_lora_(model.language_model, wanted, config.seed)
        model.form = replace(model.form, lora=wanted)


def train_only_(model: nn.Module, parts: Iterable[str]) -> None:
    """Make the children called `parts` trainable; freeze the others and keep them in evaluation mode.

    In a child with adapters, only the adapters are trained.
    """
    parts = set(parts)
    unknown = parts - dict(model.named_children()).keys()
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))} in a {type(model).__name__}")
    for name, child in model.named_children():
        of_adapters = adapter_names(child)
        for key, parameter in child.named_parameters():
            parameter.requires_grad_(name in parts and (key in of_adapters or not of_adapters))
        child.train(name in parts)


def checkpoint_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of each block for the backward pass, which runs the block again (1.2 to 1.35 x the time)."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Compile each block, for use where autograd records; all lengths share one compilation.

    Validation and captions have other shapes and another graph, and run the plain block. With dropout, the random numbers
    differ from those of the plain block.
    """
    refuse_without_compiler("training.compile")
    for block in blocks:
        plain = block.forward
        block.forward = partial(_compiled_or_plain, torch.compile(plain, dynamic=True), plain)


def _compiled_or_plain(compiled: Callable[..., Tensor], plain: Callable[..., Tensor], *arguments: object) -> Tensor:
    return compiled(*arguments) if torch.is_grad_enabled() else plain(*arguments)


# Frozen weights in half of their memory


@torch.no_grad()
def frozen_weights(model: MultimodalLLM) -> list[nn.Parameter]:
    """The frozen matrices of the towers whose values are exact in bfloat16, as those of Qwen2.5 are.

    Autocast rounds them to bfloat16 in every product anyway, so holding them as bfloat16 changes no bit of a step.
    Shards stay as they are.
    """
    modules = [*model.vision_tower.modules(), *model.language_model.modules()]
    layers = [layer for layer in modules if isinstance(layer, nn.Linear)] + [model.language_model.model.embed_tokens]
    weights = {id(p): p for layer in layers if type(p := layer.weight) is nn.Parameter and not p.requires_grad}
    return [p for p in weights.values() if p.dtype == torch.float32 and _is_exact_in_bfloat16(p)]


def _is_exact_in_bfloat16(p: Tensor) -> bool:
    """Compared in pieces: copies of a whole embedding would be the peak of a stage's memory."""
    return all(torch.equal(rows.bfloat16().float(), rows) for rows in p.split(4096))


@contextmanager
def held_as(weights: list[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Hold `weights`, which have one dtype, as `dtype` inside the block; an error leaves them so."""
    before = weights[0].dtype if weights else dtype
    cast_(weights, dtype)
    yield
    cast_(weights, before)


def cast_(weights: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Convert `weights` to `dtype`, one at a time.

    Each is there twice for a moment, so the largest is converted while the others are small: first where they grow, last
    where they shrink.
    """
    weights = sorted(weights, key=torch.Tensor.numel)
    with blocks_apart():
        for weight in weights if dtype.itemsize == 2 else reversed(weights):
            weight.data = weight.data.to(dtype)
