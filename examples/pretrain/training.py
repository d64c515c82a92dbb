"""Small backbones from scratch, trained as the published ones were: CLIP on images with captions, Qwen2 on text alone.

For worlds without published weights: the drawn one of `make demo`, and a few thousand photographs. On so few the
contrastive loss alone stands still for a long time. A tower that also predicts, from its patches, the words of all
captions of an image leaves that plateau: how many of five people said "dog" is far less noisy than what one of them said.

B images, T caption tokens, D hidden size, P projection size, V vocabulary. Contrastive loss:
https://arxiv.org/abs/2103.00020; word prediction: https://arxiv.org/abs/1511.02251.
"""

import math
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from examples.pretrain.images import Captions
from mmllm.data.chat import IGNORED
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.qwen import Qwen2
from mmllm.runtime.console import print_rank0
from mmllm.runtime.device import autocast
from mmllm.training.step import adamw, parameter_groups, set_learning_rates_

BETAS = (0.9, 0.98)
TEXT_LENGTH = 256  # tokens of an image's captions that the text tower reads
REPORT_EVERY = 100  # steps
BLEND = 0.4  # both parameters of the beta distribution of the shares of blended images
GUIDE_LOSS = 5.0  # weight of the cosine distance to the guide's features
GUIDE_WORDS = 0.5  # how much of the words to predict is the guide's guess


@torch.no_grad()
def initialise_(model: CLIPVisionTower | Qwen2, seed: int) -> None:
    """Random weights from which small models learn fast: positions of the size of patches, and attention
    that starts selective."""
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
    """Vectors of captions, for the contrastive loss alone: a few layers, then the mean of the tokens."""

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


class Matching(nn.Module):
    """The loss of a vision tower that learns to match images with captions, with the layers that only training needs.

    `word_loss` weighs the second task: predicting, from the mean of the patches, the share of the captions that hold
    each token. With a `guide` (guide.py) the tower learns its features and words too. Each image is then blended with
    another, whose captions are as right as its share, and the tower sees half of the patches, the guide all:
    https://arxiv.org/abs/1710.09412, https://arxiv.org/abs/2212.00794.
    """

    def __init__(
        self,
        tower: CLIPVisionTower,
        vocab_size: int,
        *,
        text_layers: int,
        word_loss: float,
        guide: nn.Module | None = None,
        seed: int = 0,
    ):
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.word_loss, self.guide, self.rng = tower, word_loss, guide, random.Random(seed)
        self.text = TextTower(vocab_size, width, text_layers, tower.config.projection_dim)
        self.words = nn.Linear(width, vocab_size)
        nn.init.constant_(self.words.bias, -5.0)  # most captions hold few of the words
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's initial temperature
        if guide:
            self.guess = nn.Linear(width, guide.features)

    def forward(self, pixels_B3SS: Tensor, captions: Captions) -> tuple[Tensor, Tensor]:
        """The loss, and whether each image's own caption is its nearest (B,)."""
        device, tower = pixels_B3SS.device, self.tower
        share = random_share(self.rng) if self.guide else 1.0
        pixels_B3SS = blended(pixels_B3SS, share)
        texts = [torch.tensor([token for ids in of_one for token in ids][:TEXT_LENGTH]) for of_one in captions]
        ids_BT = pad_sequence(texts, batch_first=True).to(device)
        is_token_BT = pad_sequence([torch.ones(len(ids)) for ids in texts], batch_first=True).bool().to(device)
        x_BTD = tower.vision_model.hidden_state(pixels_B3SS, 0)
        if self.guide:
            kept_BN = half_of_the_patches(len(x_BTD), x_BTD.shape[1] - 1, self.rng).to(device)
            x_BTD = torch.cat([x_BTD[:, :1], rows_of(x_BTD[:, 1:], kept_BN)], 1)
        for layer in tower.vision_model.encoder.layers[:-1]:
            x_BTD = layer(x_BTD)
        last_BD = tower.vision_model.encoder.layers[-1](x_BTD)[:, 0]
        image_BP = F.normalize(tower.visual_projection(tower.vision_model.post_layernorm(last_BD)).float(), dim=-1)
        text_BP = F.normalize(self.text(ids_BT, is_token_BT).float(), dim=-1)
        scores_BB = self.scale.exp().clamp(max=100) * image_BP @ text_BP.T
        own_B = torch.arange(len(scores_BB), device=device)
        loss = contrastive_loss(scores_BB, own_B)
        if share < 1:
            loss = share * loss + (1 - share) * contrastive_loss(scores_BB, own_B.flip(0))
        guide_BV = None
        if self.guide:
            guide_BNC, guide_BV = self.guide(pixels_B3SS)
            loss = loss + GUIDE_LOSS * distance(self.guess(x_BTD[:, 1:]), rows_of(guide_BNC, kept_BN))
        if self.word_loss:
            target_BV = blended(word_shares(captions, self.words.out_features), share).to(device)
            if guide_BV is not None:
                target_BV = target_BV.lerp(guide_BV.sigmoid(), GUIDE_WORDS)
            loss = loss + self.word_loss * words_loss(self.words(x_BTD[:, 1:].mean(1)), target_BV)
        return loss, scores_BB.argmax(1) == own_B


def random_share(rng: random.Random) -> float:
    """The share of the first image in a blend of two, a half or more."""
    share = rng.betavariate(BLEND, BLEND)
    return max(share, 1 - share)


def blended(x_B: Tensor, share: float) -> Tensor:
    """Each image, or what is to be found in it, with the one at the other end of the batch."""
    return share * x_B + (1 - share) * x_B.flip(0) if share < 1 else x_B


def half_of_the_patches(num_images: int, num_patches: int, rng: random.Random) -> Tensor:
    """The numbers of other random patches for each image (B, N)."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.rand(num_images, num_patches, generator=generator).argsort(1)[:, : num_patches // 2]


def rows_of(x_BTD: Tensor, kept_BN: Tensor) -> Tensor:
    return x_BTD.gather(1, kept_BN[:, :, None].expand(-1, -1, x_BTD.shape[2]))


def distance(guess_BNC: Tensor, target_BNC: Tensor) -> Tensor:
    """The mean cosine distance of features, each of the targets centred and scaled."""
    target_BNC = F.layer_norm(target_BNC.float(), target_BNC.shape[-1:])
    return 1 - F.cosine_similarity(guess_BNC.float(), target_BNC, dim=-1).mean()


def contrastive_loss(scores_BB: Tensor, own_B: Tensor) -> Tensor:
    """Of images among captions and of captions among images, in the mean; `own_B` are the right ones."""
    return (F.cross_entropy(scores_BB, own_B) + F.cross_entropy(scores_BB.T, own_B)) / 2


def word_shares(captions: Captions, vocab_size: int) -> Tensor:
    """For each image the share of its captions that hold each token (B, V)."""
    share_BV = torch.zeros(len(captions), vocab_size)
    for row, of_one in enumerate(captions):
        for ids in of_one:
            share_BV[row, list(set(ids))] += 1 / len(of_one)
    return share_BV


def words_loss(logits_BV: Tensor, target_BV: Tensor) -> Tensor:
    """Summed over the words, in the mean of the images."""
    return F.binary_cross_entropy_with_logits(logits_BV.float(), target_BV, reduction="sum") / len(target_BV)


def pretrain_clip(
    tower: CLIPVisionTower,
    next_batch: Callable[[int], tuple[Tensor, Captions]],
    vocab_size: int,
    *,
    steps: int,
    learning_rate: float,
    text_layers: int = 2,
    word_loss: float = 0.0,
    weight_decay: float = 0.05,
    guide: nn.Module | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> float:
    """Trains `tower` (with its projection) in place; returns the share of images whose own caption was the nearest of
    their batch, over the last tenth of the steps. A `guide` stays as it is.

    `next_batch(step)` gives pixels (B, 3, S, S) and the captions, which are read as one text of TEXT_LENGTH tokens at most.
    """
    device = next(tower.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Matching(tower, vocab_size, text_layers=text_layers, word_loss=word_loss, guide=guide, seed=seed).to(
            device
        )

    def step_loss(step: int) -> tuple[Tensor, float]:
        pixels_B3SS, captions = next_batch(step)
        with autocast(device, bf16):
            loss, is_matched_B = model(pixels_B3SS.to(device), captions)
        return loss, is_matched_B.float().mean().item()

    named = sorted(model.named_parameters(), key=lambda pair: pair[0] == "scale")  # last: the demo's bits depend on it
    return optimise(named, step_loss, steps, learning_rate, weight_decay, "clip", "matched")


def pretrain_qwen(
    lm: Qwen2,
    next_batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.02,
    bf16: bool = False,
) -> float:
    """Trains `lm` in place on text; returns the mean loss of the last tenth of the steps, in nats per target token.

    `next_batch(step)` gives ids and labels (B, T), padded on the right, IGNORED where no target is.
    """
    device = next(lm.parameters()).device

    def step_loss(step: int) -> tuple[Tensor, float]:
        ids_BT, labels_BT = (x.to(device) for x in next_batch(step))
        is_target = labels_BT[:, 1:] != IGNORED
        with autocast(device, bf16):
            x_BTD = lm(lm.embed(ids_BT))
            loss = F.cross_entropy(lm.logits(x_BTD[:, :-1][is_target]), labels_BT[:, 1:][is_target])
        return loss, loss.item()

    return optimise(list(lm.named_parameters()), step_loss, steps, learning_rate, weight_decay, "text", "loss")


def optimise(
    named: list[tuple[str, nn.Parameter]],
    step_loss: Callable[[int], tuple[Tensor, float]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    what: str,
    measure: str,
) -> float:
    """AdamW with clipping and the usual schedule (5 % warm-up, cosine). `step_loss(step)` gives the loss and the number
    to report; returns the mean of that number over the last tenth of the steps."""
    optimizer = adamw(parameter_groups(named, {"": learning_rate}, weight_decay), *BETAS)
    parameters, found, start = [parameter for _, parameter in named], [], time.perf_counter()
    for step in range(steps):
        loss, value = step_loss(step)
        set_learning_rates_(optimizer, step, max(1, steps // 20), steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append(value)
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            recent, seconds = found[-REPORT_EVERY:], time.perf_counter() - start
            print_rank0(f"{what} {step + 1}/{steps} | {measure} {sum(recent) / len(recent):.3f} | {seconds:.0f} s")
    last = found[-max(1, steps // 10) :]
    return sum(last) / len(last)
