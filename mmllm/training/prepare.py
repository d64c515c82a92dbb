"""What a loaded model becomes before it is trained, as the configuration says: rounded, with adapters, frozen, recomputing.

The surprising fact: the order is forced. Adapters sit beside weights that are rounded already, nothing can be frozen that
is not there yet, and what is compiled or spread over processes must be finished.
Next: trainer.py.
"""

from dataclasses import replace

from torch import nn

from mmllm.config.schema import ExperimentConfig
from mmllm.errors import ConfigError
from mmllm.layers.lora import adapters, add_lora_, merge_lora_, target_layers
from mmllm.layers.quantized import quantize_
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import print_rank0
from mmllm.training.out_of_memory import is_trained, trained_parts
from mmllm.training.surgery import checkpoint_blocks_, compile_blocks_, exact_in_bfloat16, train_only_


def prepare(model: MultimodalLLM, config: ExperimentConfig) -> None:
    """The surgery on a loaded model, in the only order that works:

    quantize_ -> add_lora_ -> train_only_ -> checkpoint_blocks_ -> compile_blocks_ -> shard_.
    Each stage narrows `train_only_` to its own. The last is experiment.py's, who knows the processes.
    """
    apply_rounding_(model, config)
    apply_lora_(model, config)
    # few rows, which autograd adds to the whole gradient of the head; on a GPU their order would be left to chance
    is_tied = model.config.text.tie_word_embeddings
    model.language_model.model.embed_tokens.sparse = is_tied and model.device.type == "cpu"
    train_only_(model, {part for stage in config.stages() for part in trained_parts(stage)})
    if config.training.gradient_checkpointing:
        checkpoint_blocks_(model.language_model.model.layers)
        if is_trained(model.vision_tower):
            checkpoint_blocks_(model.vision_tower.vision_model.encoder.layers)
    if config.training.compile:
        compile_blocks_(model.language_model.model.layers)


def apply_rounding_(model: MultimodalLLM, config: ExperimentConfig) -> None:
    """Make the language model int8 or int4 where the configuration asks for it."""
    if model.form.is_packed:
        raise ConfigError("model.pretrained holds int8 weights for answering alone; train from what it was made of")
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
    """Adapters as the configuration says: new ones, those that the model came with, or none."""
    wanted = config.model.lora_config if config.model.use_lora else None
    if model.form.lora and wanted:
        same_layers = set(adapters(model.language_model)) == set(target_layers(model.language_model, wanted))
        if not same_layers or replace(wanted, target_modules=()) != replace(model.form.lora, target_modules=()):
            raise ConfigError(f"model.lora_config is {wanted}, but the model came with {model.form.lora}; use the same")
    if model.form.lora and not wanted:
        print_rank0("the model came with adapters and model.use_lora is false: they are added to its weights")
        merge_lora_(model.language_model)
        model.form = replace(model.form, lora=None)
    elif wanted and not model.form.lora:
        add_lora_(model.language_model, wanted, config.seed)
        model.form = replace(model.form, lora=wanted)


def frozen_weights(model: MultimodalLLM) -> list[nn.Parameter]:
    """The matrices of the towers that this stage need not hold in more than bfloat16."""
    linear = [layer for part in (model.vision_tower, model.language_model) for layer in part.modules()]
    linear = [layer for layer in linear if isinstance(layer, nn.Linear)]
    return exact_in_bfloat16([*linear, model.language_model.model.embed_tokens])
