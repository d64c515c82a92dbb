"""Model directories: read one, join two published models, write one.

    config.json          sizes; in patch mode those of transformers' `LlavaForConditionalGeneration`
    mmllm.json           system prompt and form of the weights
    model.safetensors    the weights without adapters; also LLaVA's, names included, unless they are packed
    adapter_*            LoRA adapters and the projector in PEFT's format, where there are adapters
    and the files of the processor: tokenizer.json, preprocessor_config.json, chat_template.jinja, ...

`MultimodalLLM` has these functions as methods; the class to build is an argument, so that no import is circular.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmllm.config.schema import LoraConfig
from mmllm.data.chat import DEFAULT_SYSTEM, ChatProcessor
from mmllm.data.processor_files import load_processor, save_processor
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import CheckpointError
from mmllm.layers import lora
from mmllm.layers.packed import empty_, to_device_layout_
from mmllm.layers.quantized import ROUNDINGS, quantize_
from mmllm.models.config import MultimodalConfig
from mmllm.models.projector import Projector
from mmllm.models.published import language_tensors, llava_tensors, read_vision, resized, text_config
from mmllm.runtime.files import read_json, typed, write_json
from mmllm.storage.atomic import atomic_directory
from mmllm.storage.hub import locate
from mmllm.storage.weights import load_strict_, read_tensors, refuse_integers, write_safetensors

Device = str | torch.device
Model = TypeVar("Model", bound=nn.Module)
PACKED = {"int8": "packed", "int4": "packed-int4"}  # what mmllm.json calls them
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@dataclass(frozen=True)
class ModelForm:
    """What the linear layers of a built model have become."""

    lora: LoraConfig | None = None  # adapters beside the language model's layers
    rounding: str | None = None  # "int8" or "int4": the frozen weights under the adapters (layers/quantized.py)
    packed: str | None = None  # the precision of both towers, for inference only (layers/packed.py)
    precision: str | None = None  # set by inference.optimize.load_model; such a model is not saved


@dataclass(frozen=True)
class ModelInfo:
    """What config.json and mmllm.json of a model directory say."""

    config: MultimodalConfig
    system_prompt: str
    packed: str | None  # "int8" or "int4", to answer only
    rounding: str | None
    has_adapters: bool


@dataclass(frozen=True)
class _SavedForm:
    """What mmllm.json holds."""

    format_version: int
    system_prompt: str = DEFAULT_SYSTEM
    surgery: tuple[str, ...] = ()


def read_info(folder: str | Path) -> ModelInfo:
    folder = Path(folder)
    file, config = folder / "mmllm.json", folder / "config.json"
    is_ours = file.exists() or not config.exists()  # else a LLaVA of other makers
    ours = typed(_SavedForm, read_json(file), file) if is_ours else _SavedForm(1)
    surgery = ours.surgery
    if ours.format_version != 1 or not set(surgery) <= {*ROUNDINGS, *PACKED.values(), "lora"}:
        raise CheckpointError(f"{file}: written by a newer mmllm; update this one")
    if ("lora" in surgery) != (folder / lora.CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: mmllm.json and {lora.CONFIG_FILE} disagree on whether there are adapters")
    return ModelInfo(
        config=MultimodalConfig.from_dict(read_json(config), config),
        system_prompt=ours.system_prompt,
        packed=next((kind for kind, name in PACKED.items() if name in surgery), None),
        rounding=next((kind for kind in surgery if kind in ROUNDINGS), None),
        has_adapters="lora" in surgery,
    )


def from_pretrained(
    cls: type[Model], source: str | Path, *, device: Device = "cpu", dtype: torch.dtype | None = torch.float32
) -> Model:
    """The model of a directory that `save_pretrained` wrote, of a LLaVA folder, or of a hub repository with such files.

    `dtype` None keeps the dtype of every tensor and, on the CPU, maps it from its file.
    CheckpointError names what is missing, unexpected, or of another shape.
    """
    folder = locate(source)
    info = read_info(folder)
    processor = load_processor(folder, info.config.num_image_tokens, info.system_prompt)
    model = without_memory(cls, info.config)
    if info.packed:
        load_packed_(model, folder, info.packed, device, dtype)
    elif info.rounding:
        load_quantized_(model, folder, info.rounding, device, dtype)
    else:
        load_float_(model, folder, device, dtype)
    adapters = lora.load_adapter_(model, folder) if info.has_adapters else None
    model.form = ModelForm(adapters, info.rounding, info.packed)
    return with_processor(model, processor, folder)


def load_float_(
    model: nn.Module, folder: Path, device: Device, dtype: torch.dtype | None, uncast: str | None = None
) -> None:
    """Float weights; names that begin with `uncast` keep the dtype of the file."""
    tensors = llava_tensors(folder)
    refuse_integers(tensors, folder)
    for name, value in tensors.items():
        tensors[name] = value.to(device, None if uncast and name.startswith(uncast) else dtype)
    if model.config.text.tie_word_embeddings:
        tensors.setdefault(HEAD, tensors.get(EMBEDDING, torch.empty(0)))
    load_strict_(model, tensors, folder)
    model.language_model.tie_weights()


def load_quantized_(model: nn.Module, folder: Path, rounding: str, device: Device, dtype: torch.dtype | None) -> None:
    """Float weights whose linear layers become int8 or int4 again; rounded before any cast, so that no bit changes."""
    load_float_(model, folder, device, dtype, uncast="language_model.")
    quantize_(model.language_model, rounding)
    for parameter in model.language_model.parameters():
        parameter.data = parameter.data.to(device, dtype or torch.float32)


def load_packed_(model: nn.Module, folder: Path, packed: str, device: Device, dtype: torch.dtype | None) -> None:
    """int8 or int4 weights in the kernels' layout; `dtype` is that of the other parameters."""
    empty_(model, packed)
    load_strict_(model, {name: value.to(device) for name, value in read_tensors(folder).items()}, folder)
    to_device_layout_(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)


def from_towers(
    cls: type[Model],
    clip: str | Path,
    qwen: str | Path,
    *,
    features: str = "patch",
    image_size: int | None = None,
    image_fit: str | None = None,
    system: str = DEFAULT_SYSTEM,
    seed: int = 0,
    device: Device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """Two published models, each a folder, a hub name or OpenAI's file, and a new projector drawn with `seed`.

    `image_size` None: that of the vision tower; with another one its positions are interpolated. `image_fit`: the `fit` of
    the image processor, if not that of the tower.
    """
    vision, qwen_folder = read_vision(clip), locate(qwen)
    vision = resized(vision, image_size) if image_size else vision
    text = text_config(qwen_folder)
    tokenizer = Tokenizer(qwen_folder)
    images = replace(vision.images, fit=image_fit or vision.images.fit)
    config = MultimodalConfig(vision.config, text, features, tokenizer.image_id)
    model = without_memory(cls, config)
    for tower, tensors, where in (
        (model.vision_tower, vision.tensors, clip),
        (model.language_model, language_tensors(qwen_folder, text), qwen_folder),
    ):
        if features == "patch":
            tensors.pop("visual_projection.weight", None)
        refuse_integers(tensors, where)
        load_strict_(tower, {name: value.to(device, dtype) for name, value in tensors.items()}, where)
    model.language_model.tie_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(config.feature_shape[1], text.hidden_size)
    model.multi_modal_projector = projector.to(device, dtype)
    return with_processor(model, ChatProcessor(tokenizer, images, config.num_image_tokens, system), qwen_folder)


class WithoutValues(TorchFunctionMode):
    """Modules built inside keep uninitialised values, because values will be loaded.

    On the meta device, too: there the initialisation of an embedding makes torch import its compiler, 1.2 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.constant_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def without_memory(cls: type[Model], config: MultimodalConfig) -> Model:
    with torch.device("meta"), WithoutValues():
        return cls(config)


def with_processor(model: Model, processor: ChatProcessor, folder: Path) -> Model:
    """`model` in evaluation mode with its processor; CheckpointError if they do not fit each other."""
    rows, side = model.config.text.vocab_size, model.config.vision.image_size
    if processor.tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {processor.tokenizer.vocab_size} tokens, but the model has {rows} rows; "
            "they belong to different models"
        )
    if processor.tokenizer.image_id != model.config.image_token_id:
        raise CheckpointError(
            f"{folder}: <|image_pad|> is token {processor.tokenizer.image_id}, but config.json has image_token_index "
            f"{model.config.image_token_id}; they belong to different models"
        )
    if processor.image_processor.size != side:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json makes images of {processor.image_processor.size} pixels, "
            f"but the vision tower takes {side}"
        )
    model.processor = processor
    return model.eval()


def save_pretrained(model: nn.Module, folder: str | Path, *, replace: bool = False) -> None:
    """Writes the model as one directory, complete or not at all; `replace` allows it to replace an old one."""
    with atomic_directory(folder, replace=replace) as temporary:
        for name, tensors in tensor_files(model).items():
            write_safetensors(temporary / name, tensors)
        write_small_files(model, temporary)


def tensor_files(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of the model's directory by file: the base in model.safetensors, adapters in a file of their own."""
    if model.form.precision:
        raise ValueError(f"this model was made ready to answer in {model.form.precision} and cannot be written back")
    left_out = lora.adapter_names(model) | ({HEAD} if model.config.text.tie_word_embeddings else set())
    base = {name: value for name, value in model.state_dict().items() if name not in left_out}
    return {"model.safetensors": base} | ({lora.TENSOR_FILE: lora.adapter_tensors(model)} if model.form.lora else {})


def write_small_files(model: nn.Module, folder: Path) -> None:
    """Writes everything but the tensors: both configurations, the processor's files, the adapters' configuration."""
    form = model.form
    ours = {
        "format_version": 1,
        "features": model.config.features,
        "system_prompt": model.processor.system,
        "surgery": [*filter(None, (PACKED.get(form.packed), form.rounding, "lora" * bool(form.lora)))],
    }
    write_json(folder / "config.json", model.config.to_dict())
    write_json(folder / "mmllm.json", ours)
    if form.lora:
        lora.write_adapter_config(folder, model, form.lora)
    save_processor(model.processor, folder, model.config.vision.select_strategy)
