"""A small CLIP and a small Qwen2 of the drawn world, made as the published ones were: see examples/pretrain.

CLIP sees each scene beside three that differ from it in one attribute. Without them it learns to tell its images apart
and never looks at the shape.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.pretrain.folders import build_tokenizer, write_clip, write_qwen
from examples.pretrain.training import initialise_, pretrain_clip, pretrain_qwen
from examples.shapes.world import (
    PATCH,
    SIDE,
    Scene,
    any_scene,
    caption,
    conversation,
    draw,
    one_attribute_changed,
    questions,
)
from mmllm.data.batches import collate
from mmllm.data.chat import ChatProcessor, Encoded, assistant, user
from mmllm.data.image import ImageProcessor
from mmllm.data.records import CAPTION_PROMPT
from mmllm.data.tokenizer import Tokenizer as ModelTokenizer
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.qwen import Qwen2
from mmllm.runtime.console import print_rank0

RECIPE = {
    "clip_steps": 300,
    "clip_groups": 16,
    "clip_rate": 1.5e-3,
    "text_steps": 400,
    "text_batch": 16,
    "text_rate": 2e-3,
}
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
    projection_dim=128,
)


def make_backbones(out: Path) -> None:
    """Trains a CLIP and a Qwen2 of this world and writes them to `out`/clip and `out`/qwen, in the official format."""
    rng = random.Random(0)
    scenes = [any_scene(rng) for _ in range(4000)]
    texts = [text for scene in scenes for q in questions(scene) for text in (caption(scene), q.text, q.answer)]
    template = [CAPTION_PROMPT, "system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    tokenizer = build_tokenizer([*texts, *template], 450)
    make_clip(out / "clip", tokenizer, rng)
    make_qwen(out / "qwen", tokenizer, scenes, rng)


def make_clip(folder: Path, tokenizer: Tokenizer, rng: random.Random) -> None:
    images = ImageProcessor(SIDE)
    tower = CLIPVisionTower(VISION, with_projection=True)
    initialise_(tower, seed=0)

    def groups(step: int) -> tuple[Tensor, list[list[list[int]]]]:
        """Scenes, each with three of one attribute changed: what must be told apart."""
        batch = []
        for _ in range(RECIPE["clip_groups"]):
            group = [any_scene(rng)]
            while len(group) < 4:
                if (other := one_attribute_changed(group[0], rng)) not in group:
                    group.append(other)
            batch += group
        pixels = torch.stack([images(draw(scene)) for scene in batch])
        return pixels, [[tokenizer.encode(caption(scene)).ids] for scene in batch]

    print_rank0("a small CLIP, from images with captions")
    steps, rate = RECIPE["clip_steps"], RECIPE["clip_rate"]
    pretrain_clip(tower, groups, tokenizer.get_vocab_size(), steps=steps, learning_rate=rate)
    write_clip(folder, tower, images)


def make_qwen(folder: Path, tokenizer: Tokenizer, scenes: list[Scene], rng: random.Random) -> None:
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e4,
        max_position_embeddings=512,
    )
    lm = Qwen2(config)
    initialise_(lm, seed=0)
    write_qwen(folder, lm, tokenizer)
    processor = ChatProcessor(ModelTokenizer(folder), ImageProcessor(SIDE), VISION.num_patches)

    def rows(step: int) -> tuple[Tensor, Tensor]:
        rows = [described(rng.choice(scenes), processor, rng) for _ in range(RECIPE["text_batch"])]
        batch = collate(rows, [], processor.tokenizer.pad_id, SIDE)
        return batch.ids_BT, batch.labels_BT

    print_rank0("a small Qwen2, from text alone")
    pretrain_qwen(lm, rows, steps=RECIPE["text_steps"], learning_rate=RECIPE["text_rate"])
    write_qwen(folder, lm, tokenizer)


def described(scene: Scene, processor: ChatProcessor, rng: random.Random) -> Encoded:
    """A conversation about a description in place of the image."""
    (first, answer), *others = conversation(scene, rng)
    if first == CAPTION_PROMPT:
        return processor.encode([user(first), assistant(answer)])
    messages = [user(f"{caption(scene)}\n{first}"), assistant(answer)]
    for question, answer in others:
        messages += [user(question), assistant(answer)]
    return processor.encode(messages)
