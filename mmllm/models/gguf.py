"""A model directory as two GGUF files for llama.cpp and ollama: the language model, and the image encoder (mmproj).

llama.cpp runs them as a LLaVA 1.5 model with Qwen2.5's template. It does three things otherwise than this code; what they
cost is in docs/weights.md. It pads an image to a square where CLIP crops one, it computes the projector's GELU by the
tanh approximation, and it has no `<|vision_start|>` around an image: the chat template that is written here adds it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tensor names are those of the package `gguf`.
"""

import json
from importlib import import_module
from pathlib import Path

from torch import Tensor, nn

from mmllm.data.processor_files import chat_template
from mmllm.errors import CheckpointError, UserError
from mmllm.layers.lora import adapters

NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
MODELFILE = """\
FROM ./model.gguf
FROM ./mmproj.gguf
TEMPLATE \"\"\"<|im_start|>system
{{ if .System }}{{ .System }}{{ else }}SYSTEM{{ end }}<|im_end|>
<|im_start|>user
{{ .Prompt }}<|im_end|>
<|im_start|>assistant
{{ .Response }}<|im_end|>\"\"\"
PARAMETER stop <|im_end|>
PARAMETER temperature 0
"""


def write_gguf(model: nn.Module, folder: Path, kind: str) -> None:
    """Writes model.gguf, mmproj.gguf and Modelfile for a float model without adapters; `kind` is the GGUF type of the language
    model's matrices (F32, F16, BF16, Q8_0 or Q4_0); vectors are float32.

    CheckpointError for a model that llama.cpp has no graph for.
    """
    config = model.config
    found = config.vision.model_type if config.features == "patch" else "pooled features"
    if found != "clip_vision_model" or config.text.model_type != "qwen2":
        raise CheckpointError(
            f"a model of {found} and {config.text.model_type} has no GGUF form; only CLIP's patches with Qwen2.5"
        )
    if model.form.packed or model.form.rounding or adapters(model):
        raise CheckpointError("only a float model without adapters has a GGUF form; merge the adapters first")
    write_language_model(model, folder / "model.gguf", kind)
    write_image_encoder(model, folder / "mmproj.gguf", "F32" if kind == "F32" else "F16")
    (folder / "Modelfile").write_text(MODELFILE.replace("SYSTEM", model.processor.system), encoding="utf-8")


def write_language_model(model: nn.Module, file: Path, kind: str) -> None:
    gguf, text = package(), model.config.text
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_name(file.stem)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_file_type(file_type(kind))
    add_vocabulary(writer, model.processor.tokenizer, text.vocab_size)
    marked = (
        "message.content | replace('<__media', '<|vision_start|><__media') | replace('__>', '__><|vision_end|>\\n')"
    )
    writer.add_chat_template(
        chat_template(model.processor.system).replace("{{- message.content }}", f"{{{{- {marked} }}}}")
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, text.num_hidden_layers)
    left_out = {"lm_head.weight"} if text.tie_word_embeddings else set()
    for name, value in model.language_model.state_dict().items():
        if name not in left_out:
            add_tensor(writer, names.get_name(name, (".weight", ".bias")), value, kind)
    write(writer)


def write_image_encoder(model: nn.Module, file: Path, kind: str) -> None:
    gguf, vision, images = package(), model.config.vision, model.processor.image_processor
    writer = gguf.GGUFWriter(str(file), "clip")
    writer.add_name(file.stem)
    writer.add_file_type(file_type(kind))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.config.text.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)  # llama.cpp itself stops before the last one
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")  # otherwise quick_gelu
    writer.add_vision_image_mean(list(images.mean))
    writer.add_vision_image_std(list(images.std))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    for name, value in model.vision_tower.state_dict().items():
        if "post_layernorm" not in name:  # where it is there, llama.cpp applies it to the patches too
            add_tensor(writer, names.get_name(f"vision_tower.{name}", (".weight", ".bias")), value, kind)
    for name, value in model.multi_modal_projector.state_dict().items():
        add_tensor(writer, name.replace("linear_1", "mm.0").replace("linear_2", "mm.2"), value, kind)
    write(writer)


def add_vocabulary(writer, tokenizer, rows: int) -> None:
    """The tokens of `tokenizer`, padded to the `rows` of the embedding."""
    content = json.loads(tokenizer.content)
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    words = {number: word for word, number in content["model"]["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([CONTROL if i in special else NORMAL if i in words else UNUSED for i in range(rows)])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.id("<|im_end|>"))
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_bos_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)


def add_tensor(writer, name: str, value: Tensor, kind: str) -> None:
    gguf = package()
    array = value.detach().float().cpu().numpy()
    is_matrix = array.ndim > 1 and "position" not in name
    if is_matrix and kind not in ("F32", "F16"):
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    else:
        writer.add_tensor(name, array.astype("float16") if is_matrix and kind == "F16" else array)


def write(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_type(kind: str) -> int:
    return package().LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]


def package():
    try:
        return import_module("gguf")
    except ImportError as error:
        raise UserError("GGUF files are written by the package gguf: pip install gguf") from error
