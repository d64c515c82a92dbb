"""Both backbones from the captions of one's own images."""

import argparse
import random
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.pretrain.folders import build_tokenizer, write_clip, write_qwen
from examples.pretrain.guide import Guide, pretrain_guide
from examples.pretrain.images import CaptionedImages
from examples.pretrain.training import initialise_, pretrain_clip, pretrain_qwen
from mmllm.data.batches import collate
from mmllm.data.chat import MARK, ChatProcessor, assistant, user
from mmllm.data.image import ImageProcessor
from mmllm.data.samples import Sample, load_samples
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import UserError
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.qwen import Qwen2
from mmllm.runtime.console import print_rank0
from mmllm.runtime.device import choose_device


def make_backbones(options: argparse.Namespace) -> None:
    """Trains the two on `options.data` and writes them to `options.out`."""
    samples = [sample for sample in load_samples(options.data, options.image_dir) if len(sample.images) == 1]
    if len({sample.images for sample in samples}) < options.clip_batch:
        raise UserError(f"{options.data}: fewer images than --clip-batch {options.clip_batch}; lower it")
    out, device, rng = Path(options.out), choose_device(options.device), random.Random(options.seed)
    pairs = sorted({(text, question_of(sample)) for sample in samples for text in sample.references})
    texts, questions = [text for text, _ in pairs], sorted({question for _, question in pairs})
    tokenizer = build_tokenizer([*texts, "system user assistant", *questions], options.vocab_size)
    images = ImageProcessor(options.image_size)
    captioned = CaptionedImages(
        samples, lambda text: tokenizer.encode(text.lower()).ids, images, options.guide_steps > 0
    )
    print_rank0(f"{len(captioned.pixels)} images, {len(texts)} texts, {tokenizer.get_vocab_size()} tokens")

    tower = CLIPVisionTower(vision_config(options), with_projection=True).to(device)
    initialise_(tower, options.seed)
    # With few tokens the fused attention of bfloat16 on a CPU takes half of the time of a step.
    unfused = sdpa_kernel(SDPBackend.MATH) if options.bf16 and device.type == "cpu" else nullcontext()
    with unfused:
        guide = make_guide(options, captioned, tokenizer.get_vocab_size()) if options.guide_steps else None
        matched = pretrain_clip(
            tower,
            lambda step: captioned.batch(options.clip_batch, rng),
            tokenizer.get_vocab_size(),
            steps=options.clip_steps,
            learning_rate=1e-3,
            text_layers=0,
            word_loss=options.word_loss,
            guide=guide,
            bf16=options.bf16,
            seed=options.seed,
        )
    write_clip(out / "clip", tower, images)

    lm = Qwen2(text_config(options, tokenizer.get_vocab_size())).to(device)
    initialise_(lm, options.seed)
    write_qwen(out / "qwen", lm, tokenizer)
    processor = ChatProcessor(Tokenizer(out / "qwen"), images, tower.config.num_patches)
    rows = [processor.encode([user(question), assistant(text)]) for text, question in pairs]

    def next_rows(step: int) -> tuple[Tensor, Tensor]:
        batch = collate(rng.sample(rows, min(64, len(rows))), [], processor.tokenizer.pad_id, images.size)
        return batch.ids_BT, batch.labels_BT

    loss = pretrain_qwen(lm, next_rows, steps=options.qwen_steps, learning_rate=1e-3, bf16=options.bf16)
    write_qwen(out / "qwen", lm, tokenizer)
    print_rank0(
        f"{out}/clip matches {matched:.0%} of a batch of {options.clip_batch}; {out}/qwen has a loss of {loss:.2f} a token"
    )
    print_rank0(f"next: python train.py CONFIG model.clip={out}/clip model.qwen={out}/qwen")


def make_guide(options: argparse.Namespace, captioned: CaptionedImages, vocab_size: int) -> Guide:
    """A network that learned the words of the images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        guide = Guide(options.patch_size, options.vision_width, vocab_size).to(choose_device(options.device))
        rng = random.Random(options.seed)
        pretrain_guide(
            guide,
            lambda step: captioned.batch(options.clip_batch, rng),
            steps=options.guide_steps,
            learning_rate=2e-3,
            bf16=options.bf16,
            seed=options.seed,
        )
    return guide


def question_of(sample: Sample) -> str:
    """What the references of `sample` answer, without the place of the image."""
    return sample.messages[-2].text.replace(MARK, "").strip()


def vision_config(options: argparse.Namespace) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=options.vision_width,
        intermediate_size=4 * options.vision_width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_width // 64,
        image_size=options.image_size,
        patch_size=options.patch_size,
        projection_dim=options.vision_width,
    )


def text_config(options: argparse.Namespace, vocab_size: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=options.text_width,
        intermediate_size=3 * options.text_width,
        num_hidden_layers=options.text_layers,
        num_attention_heads=options.text_width // 32,
        num_key_value_heads=options.text_width // 64,
        head_dim=32,
        rope_theta=1e4,
        max_position_embeddings=1024,
    )
