"""A small residual network that learns to see first, and that the vision tower learns from.

A few thousand images teach convolutions, which look at neighbours and treat all places alike, more than they teach a
transformer. The tower therefore also predicts the network's features of each patch and its words:
https://arxiv.org/abs/2207.10026. The network itself is that of https://arxiv.org/abs/1512.03385, small.

B images, N patches, C channels, V vocabulary.
"""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.pretrain.images import Captions
from examples.pretrain.training import blended, optimise, random_share, word_shares, words_loss
from mmllm.runtime.device import autocast


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.skip = nn.Identity()
        if stride > 1:
            pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.skip = nn.Sequential(nn.AvgPool2d(stride), pointwise, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Guide(nn.Module):
    """Features of each patch (B, N, C) and logits of words (B, V); the patch size is a power of two, 4 or more."""

    def __init__(self, patch_size: int, features: int, vocab_size: int, width: int = 64):
        super().__init__()
        self.features = features
        layers = [nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()]
        channels = width // 2
        for _ in range(patch_size.bit_length() - 2):
            layers += [Block(channels, 2 * channels, 2), Block(2 * channels, 2 * channels, 1)]
            channels *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, features, 1, bias=False), nn.BatchNorm2d(features))
        self.dropout, self.words = nn.Dropout(0.2), nn.Linear(features, vocab_size)
        nn.init.constant_(self.words.bias, -5.0)  # most captions hold few of the words
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        x_BCHW = self.layers(pixels_B3SS.contiguous(memory_format=torch.channels_last))
        logits_BV = self.words(self.dropout(F.relu(x_BCHW).mean((2, 3))))
        return x_BCHW.flatten(2).transpose(1, 2), logits_BV.float()


def pretrain_guide(
    guide: Guide,
    next_batch: Callable[[int], tuple[Tensor, Captions]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    bf16: bool = False,
    seed: int = 0,
) -> None:
    """Trains `guide` in place to predict the words of images blended in pairs, then freezes it."""
    device, rng = next(guide.parameters()).device, random.Random(seed)

    def step_loss(step: int) -> tuple[Tensor, float]:
        pixels_B3SS, captions = next_batch(step)
        share = random_share(rng)
        target_BV = blended(word_shares(captions, guide.words.out_features), share).to(device)
        with autocast(device, bf16):
            _, logits_BV = guide(blended(pixels_B3SS.to(device), share))
        loss = words_loss(logits_BV, target_BV)
        return loss, loss.item()

    optimise(list(guide.named_parameters()), step_loss, steps, learning_rate, weight_decay, "guide", "loss")
    guide.eval().requires_grad_(False)
