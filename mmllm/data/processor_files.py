"""The files of a ChatProcessor in a model directory: transformers' processors read them to do the same (LLaVA layout)."""

import json
from pathlib import Path

from mmllm.data.chat import DEFAULT_SYSTEM, ChatProcessor
from mmllm.data.image import ImageProcessor
from mmllm.data.tokenizer import Tokenizer
from mmllm.runtime.files import read_json, write_json

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}

PROCESSOR_CONFIG = {
    "processor_class": "LlavaProcessor",
    "image_token": "<|image_pad|>",
}

# An image that is followed by another part without a newline gets one.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
                {%- if not loop.last and not (loop.nextitem.text is defined and loop.nextitem.text[:1] == '\\n') %}
                    {{- '\\n' }}
                {%- endif %}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def save_processor(processor: ChatProcessor, folder: str | Path, select_strategy: str = "default") -> None:
    """Writes tokenizer.json, chat_template.jinja and four configurations. `select_strategy` is LLaVA's for the tower."""
    folder, tokenizer, images = Path(folder), processor.tokenizer, processor.image_processor
    tokenizer.save(folder)
    stop_ids = [tokenizer.id("<|im_end|>"), tokenizer.pad_id]
    generation = {"do_sample": False, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_id}
    patch_size = images.size // int(processor.num_image_tokens**0.5)  # LlavaProcessor counts an image's places by it
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"model_max_length": 32768})
    write_json(folder / "preprocessor_config.json", images.to_dict())
    about_tower = {
        "num_additional_image_tokens": int(select_strategy == "default"),  # the class token
        "vision_feature_select_strategy": select_strategy,
        "patch_size": patch_size,
    }
    write_json(folder / "processor_config.json", PROCESSOR_CONFIG | about_tower)
    write_json(folder / "generation_config.json", generation)
    (folder / "chat_template.jinja").write_text(chat_template(processor.system))


def chat_template(system: str) -> str:
    """The Jinja template whose text `ChatProcessor` encodes."""
    return CHAT_TEMPLATE.replace("SYSTEM", json.dumps(system))


def load_processor(folder: str | Path, num_image_tokens: int, system: str = DEFAULT_SYSTEM) -> ChatProcessor:
    """The processor of a model directory: its tokenizer and image processor."""
    folder = Path(folder)
    images = load_image_processor(folder)
    return ChatProcessor(Tokenizer(folder), images, num_image_tokens, system)


def load_image_processor(folder: Path) -> ImageProcessor:
    """That of preprocessor_config.json, or of processor_config.json, the only one that transformers 5 writes."""
    file, other = folder / "preprocessor_config.json", folder / "processor_config.json"
    if not file.exists() and other.exists() and "image_processor" in read_json(other):
        file = other
    return ImageProcessor.from_dict(read_json(file), file)
