"""Small backbones on disk, in the official format of CLIP and Qwen2.5, with a tokenizer made like Qwen2.5's."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmllm.data.image import ImageProcessor
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.qwen import Qwen2
from mmllm.runtime.files import write_json
from mmllm.storage.atomic import atomic_directory
from mmllm.storage.weights import write_safetensors

CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)  # Qwen2.5's, in its order
SPLIT = (  # where Qwen2.5 cuts text before it merges bytes
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer that normalises and cuts text as Qwen2.5's does, around the merges of `model`."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_control_tokens_(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, made like Qwen2.5's; its control tokens come last."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    add_control_tokens_(tokenizer)
    return tokenizer


def write_clip(folder: str | Path, tower: CLIPVisionTower, image_processor: ImageProcessor) -> None:
    """Writes an official-format folder of the vision tower with its projection."""
    config = {"architectures": ["CLIPVisionModelWithProjection"], **tower.config.to_dict(), "torch_dtype": "float32"}
    with atomic_directory(folder, replace=True) as temporary:
        write_json(temporary / "config.json", config)
        write_json(temporary / "preprocessor_config.json", image_processor.to_dict())
        write_safetensors(temporary / "model.safetensors", tower.state_dict())


def write_qwen(folder: str | Path, lm: Qwen2, tokenizer: Tokenizer) -> None:
    """Writes an official-format folder of the language model and its tokenizer."""
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    tied = {"lm_head.weight"} if lm.config.tie_word_embeddings else set()
    tensors = {name: value for name, value in lm.state_dict().items() if name not in tied}
    with atomic_directory(folder, replace=True) as temporary:
        write_json(temporary / "config.json", lm.config.to_dict() | {"eos_token_id": end, "torch_dtype": "float32"})
        write_json(temporary / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        write_json(temporary / "tokenizer_config.json", about)
        tokenizer.save(str(temporary / "tokenizer.json"))
        write_safetensors(temporary / "model.safetensors", tensors)
