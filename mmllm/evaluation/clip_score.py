"""CLIPScore: how well a caption fits its image, by a CLIP with both towers; it needs no references.

https://arxiv.org/abs/2104.08718    https://github.com/jmhessel/clipscore
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from mmllm.data.image import ImageProcessor
from mmllm.errors import UserError
from mmllm.runtime.console import progress
from mmllm.runtime.device import choose_device

PREFIX, WEIGHT, BATCH = "A photo depicts ", 2.5, 64  # those of the official code


@torch.inference_mode()
def clip_scores(source: str, images: list[Path], captions: list[str], device: str = "auto") -> Iterator[float]:
    """The score of each caption, from 0 to 2.5. `source`: a folder or hub name with CLIP's text tower and tokenizer."""
    try:
        from transformers import AutoTokenizer, CLIPModel  # here alone: answering and training need no text tower
    except ImportError as error:
        raise UserError("CLIPScore needs transformers: pip install transformers, or leave --clip-score out") from error
    try:
        model, tokenizer = CLIPModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: no CLIP with its text tower and tokenizer ({str(error).splitlines()[0]})"
        ) from error
    model.to(where := choose_device(device))
    read = ImageProcessor(model.config.vision_config.image_size)
    pairs = iter(progress(zip(images, captions, strict=True), len(images), "CLIPScore"))
    while batch := list(islice(pairs, BATCH)):
        texts = tokenizer(
            [PREFIX + text for _, text in batch], padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        pixels_B3SS = torch.stack([read(path) for path, _ in batch])
        found = model(pixel_values=pixels_B3SS.to(where), **{name: ids.to(where) for name, ids in texts.items()})
        cosines_B = F.cosine_similarity(found.image_embeds, found.text_embeds)
        yield from (WEIGHT * cosines_B.clamp(min=0)).tolist()
