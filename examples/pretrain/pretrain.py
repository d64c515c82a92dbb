"""Small backbones from scratch, made as the published ones were: CLIP from pictures with captions, Qwen2 from text alone.

For worlds without published weights: the drawn one of `make demo` and experiments on a few thousand photographs. What is
written are folders in the official format, which `convert_weights.py` and transformers read like the real ones.

The surprising fact: on few photographs the contrastive loss stands still for a long time. A tower that must also
foretell the words of all captions of a picture from its patches, which are what the language model will read, leaves
the plateau: how many of five people said "dog" is a far calmer teacher than what one of them happened to say.

B pictures, T caption tokens, D hidden size, V vocabulary. Contrastive loss: https://arxiv.org/abs/2103.00020; word
prediction: https://arxiv.org/abs/1511.02251. Next: toy.py.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmllm.data.batches import collate
from mmllm.data.chat import IGNORED, ChatProcessor, assistant, user
from mmllm.data.image import ImageProcessor, decode
from mmllm.data.samples import CAPTION_PROMPT, Sample, load_samples
from mmllm.data.tokenizer import Tokenizer as ModelTokenizer
from mmllm.errors import UserError, run
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.qwen import Qwen2
from mmllm.runtime.console import print_rank0
from mmllm.runtime.device import autocast, choose_device
from mmllm.storage.atomic import atomic_directory
from mmllm.training.step import adamw, parameter_groups, set_learning_rates_

CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)  # Qwen2.5's, in its order
SPLIT = (  # where Qwen2.5 cuts text before it merges bytes
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRETRAIN_BETAS = (0.9, 0.98)
TEXT_LENGTH = 256  # tokens of a picture's captions that the text tower reads


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, made like Qwen2.5's; its control tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


@torch.no_grad()
def initialise_(model: CLIPVisionTower | Qwen2, seed: int) -> None:
    """Random weights from which small models learn fast: positions as loud as patches, attention that starts selective."""
    rng = torch.Generator().manual_seed(seed)

    def normal_(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=rng) * std)

    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            normal_(parameter, 1.0)
        elif "class_embedding" in name or "embed_tokens" in name:
            normal_(parameter, 0.05)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 0.6
            normal_(parameter, gain / math.sqrt(fan_in))
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)


class TextTower(nn.Module):
    """Captions to vectors, for the contrastive loss alone: a few layers, then the mean of the tokens."""

    def __init__(self, vocab_size: int, width: int, num_layers: int, out_features: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(TEXT_LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False) if num_layers else None
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, out_features, bias=False)

    def forward(self, ids_BT: Tensor, is_token_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT) + self.positions[: ids_BT.shape[1]]
        if self.layers is not None:
            x_BTD = self.layers(x_BTD, src_key_padding_mask=~is_token_BT)
        x_BTD = self.norm(x_BTD) * is_token_BT[:, :, None]
        return self.projection(x_BTD.sum(1) / is_token_BT.sum(1, keepdim=True))


def pretrain_clip(
    tower: CLIPVisionTower,
    next_batch: Callable[[int], tuple[Tensor, list[list[list[int]]]]],
    vocab_size: int,
    *,
    steps: int,
    learning_rate: float,
    text_layers: int = 2,
    word_loss: float = 0.0,
    weight_decay: float = 0.05,
    bf16: bool = False,
    seed: int = 0,
    report_every: int = 100,
) -> float:
    """Trains `tower` (with its projection) in place to match pictures and captions; returns the share of pictures whose
    own caption was the nearest of their batch, averaged over the last tenth of the steps.

    `next_batch(step)` gives pixels (B, 3, S, S) and for each the token ids of its captions, which are read as one text
    of TEXT_LENGTH tokens at most.
    `word_loss` weighs the second task: the share of the captions that hold each token, from the mean of the patches.
    """
    device = next(tower.parameters()).device
    width = tower.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        helpers = nn.ModuleDict(
            {
                "text": TextTower(vocab_size, width, text_layers, tower.config.projection_dim),
                "words": nn.Linear(width, vocab_size),
            }
        ).to(device)
        nn.init.constant_(helpers["words"].bias, -5.0)  # most captions hold few of the words
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))  # CLIP's initial temperature
    named = [*tower.named_parameters(), *helpers.named_parameters(), ("scale", scale)]
    optimizer = adamw(parameter_groups(named, {"": learning_rate}, weight_decay), *PRETRAIN_BETAS)
    parameters = [parameter for _, parameter in named]
    hits, start = [], time.perf_counter()
    for step in range(steps):
        pixels, captions = next_batch(step)
        with autocast(device, bf16):
            texts = [torch.tensor([token for ids in of_one for token in ids][:TEXT_LENGTH]) for of_one in captions]
            ids_BT = pad_sequence(texts, batch_first=True).to(device)
            is_token_BT = pad_sequence([torch.ones(len(ids)) for ids in texts], batch_first=True).bool().to(device)
            x_BTD = tower.vision_model.hidden_state(pixels.to(device), tower.config.num_hidden_layers - 1)
            patches_BD = x_BTD[:, 1:].mean(1)
            last_BD = tower.vision_model.encoder.layers[-1](x_BTD)[:, 0]
            image_BP = F.normalize(tower.visual_projection(tower.vision_model.post_layernorm(last_BD)).float(), dim=-1)
            text_BP = F.normalize(helpers["text"](ids_BT, is_token_BT).float(), dim=-1)
            scores_BB = scale.exp().clamp(max=100) * image_BP @ text_BP.T
            own_B = torch.arange(len(scores_BB), device=device)
            loss = (F.cross_entropy(scores_BB, own_B) + F.cross_entropy(scores_BB.T, own_B)) / 2
            if word_loss:
                share_BV = torch.zeros(len(texts), vocab_size)
                for row, of_one in enumerate(captions):
                    for ids in of_one:
                        share_BV[row, list(set(ids))] += 1 / len(of_one)
                words_BV = helpers["words"](patches_BD).float()
                foretold = F.binary_cross_entropy_with_logits(words_BV, share_BV.to(device), reduction="sum")
                loss = loss + word_loss * foretold / len(texts)
        optimise(loss, optimizer, parameters, step, steps)
        hits.append((scores_BB.argmax(1) == own_B).float().mean().item())
        if (step + 1) % report_every == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            recent = hits[-report_every:]
            print_rank0(
                f"clip {step + 1}/{steps} | loss {loss.item():.3f} | matched {sum(recent) / len(recent):.2f} | {seconds:.0f} s"
            )
    last = hits[-max(1, steps // 10) :]
    return sum(last) / len(last)


def pretrain_qwen(
    lm: Qwen2,
    next_batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.02,
    bf16: bool = False,
    report_every: int = 100,
) -> float:
    """Trains `lm` in place on text; returns the mean loss of the last tenth of the steps, in nats a learnt token.

    `next_batch(step)` gives ids and labels (B, T), padded on the right, IGNORED where nothing is learnt.
    """
    device = next(lm.parameters()).device
    optimizer = adamw(parameter_groups(lm.named_parameters(), {"": learning_rate}, weight_decay), *PRETRAIN_BETAS)
    parameters = list(lm.parameters())
    losses, start = [], time.perf_counter()
    for step in range(steps):
        ids_BT, labels_BT = (x.to(device) for x in next_batch(step))
        is_target = labels_BT[:, 1:] != IGNORED
        with autocast(device, bf16):
            x_BTD = lm(lm.embed(ids_BT))
            loss = F.cross_entropy(lm.logits(x_BTD[:, :-1][is_target]), labels_BT[:, 1:][is_target])
        optimise(loss, optimizer, parameters, step, steps)
        losses.append(loss.item())
        if (step + 1) % report_every == 0 or step + 1 == steps:
            recent = losses[-report_every:]
            print_rank0(
                f"text {step + 1}/{steps} | loss {sum(recent) / len(recent):.3f} | {time.perf_counter() - start:.0f} s"
            )
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def optimise(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int, steps: int
) -> None:
    """One step of AdamW with clipping and the usual schedule (5 % warm-up, cosine)."""
    set_learning_rates_(optimizer, step, max(1, steps // 20), steps)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def write_clip(folder: str | Path, tower: CLIPVisionTower, image_processor: ImageProcessor) -> None:
    """Writes an official-format folder of the vision tower with its projection."""
    config = {
        "architectures": ["CLIPVisionModelWithProjection"],
        **tower.config.to_dict(),
        "torch_dtype": "float32",
    }
    with atomic_directory(folder, replace=True) as temporary:
        write_json(temporary / "config.json", config)
        write_json(temporary / "preprocessor_config.json", image_processor.to_dict())
        save_file(
            {n: v.contiguous() for n, v in tower.state_dict().items()},
            temporary / "model.safetensors",
            {"format": "pt"},
        )


def write_qwen(folder: str | Path, lm: Qwen2, tokenizer: Tokenizer) -> None:
    """Writes an official-format folder of the language model and its tokenizer."""
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    tied = {"lm_head.weight"} if lm.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in lm.state_dict().items() if name not in tied}
    with atomic_directory(folder, replace=True) as temporary:
        write_json(temporary / "config.json", lm.config.to_dict() | {"eos_token_id": end, "torch_dtype": "float32"})
        write_json(temporary / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        }
        write_json(temporary / "tokenizer_config.json", settings)
        tokenizer.save(str(temporary / "tokenizer.json"))
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


# --- both backbones from one's own captions ---------------------------------------------------------------------------


class CaptionedPictures:
    """Pictures in memory as uint8, a little larger than the tower takes them, and the ids of their captions."""

    def __init__(self, samples: list[Sample], encode: Callable[[str], list[int]], image_processor: ImageProcessor):
        captions: dict[Path, list[str]] = {}
        for sample in samples:
            captions.setdefault(sample.images[0], list(sample.references))
        self.size = image_processor.size
        larger = ImageProcessor(self.size * 8 // 7, image_processor.mean, image_processor.std)
        self.pixels = torch.stack([to_uint8(larger.crop(decode(path))) for path in captions])
        self.captions = [[encode(text) for text in texts] for texts in captions.values()]
        said = [{word for text in texts for word in text.lower().split()} for texts in captions.values()]
        self.can_flip = [not {"left", "right"} & words for words in said]
        self.mean = torch.tensor(image_processor.mean)[:, None, None]
        self.std = torch.tensor(image_processor.std)[:, None, None]

    def batch(self, size: int, rng: random.Random) -> tuple[Tensor, list[list[list[int]]]]:
        """A random batch: random crops, half of them mirrored where no caption says left or right, with all captions."""
        crops, captions = [], []
        room = self.pixels.shape[-1] - self.size
        for i in rng.sample(range(len(self.pixels)), size):
            top, left = rng.randint(0, room), rng.randint(0, room)
            crop = self.pixels[i, :, top : top + self.size, left : left + self.size]
            crops.append(crop.flip(-1) if self.can_flip[i] and rng.random() < 0.5 else crop)
            captions.append(self.captions[i])
        return (torch.stack(crops).float() / 255 - self.mean) / self.std, captions


def to_uint8(image) -> Tensor:
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pretrain.pretrain", description="Make both backbones from captions."
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="pictures with captions, in any supported format")
    parser.add_argument("--image-dir", metavar="DIR", help="where the pictures are (default: beside FILE)")
    parser.add_argument("--out", required=True, metavar="DIR", help="writes DIR/clip and DIR/qwen")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--vision-width", type=int, default=192)
    parser.add_argument("--vision-layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=3000)
    parser.add_argument("--text-width", type=int, default=192)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--clip-steps", type=int, default=3600)
    parser.add_argument("--clip-batch", type=int, default=64)
    parser.add_argument("--qwen-steps", type=int, default=600)
    parser.add_argument("--word-loss", type=float, default=0.1, help="weight of word prediction (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    samples = [sample for sample in load_samples(options.data, options.image_dir) if len(sample.images) == 1]
    if len({sample.images for sample in samples}) < options.clip_batch:
        raise UserError(f"{options.data}: fewer pictures than --clip-batch {options.clip_batch}; lower it")
    make_backbones(samples, options)


def make_backbones(samples: list[Sample], options: argparse.Namespace) -> None:
    """Trains the two and writes them to `options.out`."""
    out, device = Path(options.out), choose_device(options.device)
    texts = sorted({text for sample in samples for text in sample.references})
    tokenizer = build_tokenizer([*texts, "system user assistant", CAPTION_PROMPT], options.vocab_size)
    vision = CLIPVisionConfig(
        hidden_size=options.vision_width,
        intermediate_size=4 * options.vision_width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_width // 64,
        image_size=options.image_size,
        patch_size=options.patch_size,
        projection_dim=options.vision_width,
    )
    images = ImageProcessor(options.image_size)
    tower = CLIPVisionTower(vision, with_projection=True).to(device)
    initialise_(tower, options.seed)
    vocab = tokenizer.get_vocab_size()
    pictures = CaptionedPictures(samples, lambda text: tokenizer.encode(text.lower()).ids, images)
    print_rank0(f"{len(pictures.pixels)} pictures, {len(texts)} captions, {vocab} tokens")
    rng = random.Random(options.seed)
    matched = pretrain_clip(
        tower,
        lambda step: pictures.batch(options.clip_batch, rng),
        vocab,
        steps=options.clip_steps,
        learning_rate=1e-3,
        text_layers=0,
        word_loss=options.word_loss,
        bf16=options.bf16,
        seed=options.seed,
    )
    write_clip(out / "clip", tower, images)
    text = Qwen2Config(
        vocab_size=vocab,
        hidden_size=options.text_width,
        intermediate_size=3 * options.text_width,
        num_hidden_layers=options.text_layers,
        num_attention_heads=options.text_width // 32,
        num_key_value_heads=options.text_width // 64,
        head_dim=32,
        rope_theta=1e4,
        max_position_embeddings=1024,
    )
    lm = Qwen2(text).to(device)
    initialise_(lm, options.seed)
    write_qwen(out / "qwen", lm, tokenizer)
    processor = ChatProcessor(ModelTokenizer(out / "qwen"), images, vision.num_patches)
    rows = [processor.encode([user(CAPTION_PROMPT), assistant(caption)]) for caption in texts]

    def next_rows(step: int) -> tuple[Tensor, Tensor]:
        batch = collate(rng.sample(rows, min(64, len(rows))), [], processor.tokenizer.pad_id, images.size)
        return batch.ids_BT, batch.labels_BT

    loss = pretrain_qwen(lm, next_rows, steps=options.qwen_steps, learning_rate=1e-3, bf16=options.bf16)
    write_qwen(out / "qwen", lm, tokenizer)
    print_rank0(
        f"{out}/clip matches {matched:.0%} of a batch of {options.clip_batch}; {out}/qwen has a loss of {loss:.2f} a token"
    )
    print_rank0(f"next: python train.py CONFIG model.clip={out}/clip model.qwen={out}/qwen")


if __name__ == "__main__":
    run(main)
