"""Embeddings made of captions, in place of images that nobody has.

A language model learns most of captioning without images: all captions of an image but one become an embedding, with
some noise, and that one is the target. Later a new projector translates the embeddings of a real vision tower. Counting
words is enough for it: latent semantic analysis, tf-idf of the words on its main axes.

https://en.wikipedia.org/wiki/Latent_semantic_analysis; captions in place of images, with noise: CapDec,
https://arxiv.org/abs/2211.00575. N images, W words, F numbers of an embedding.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmllm.errors import DataError
from mmllm.evaluation.ptb import words

RARE = 5  # a word in fewer images than this says too little
NOISE = 0.5


class CaptionSpace:
    """`space(captions)` returns an embedding (F,). Fitted to the captions of many images; its numbers have variance 1 in
    the mean."""

    def __init__(self, captions: Sequence[Sequence[str]], num_features: int):
        counts = [self._words(texts) for texts in captions]
        images_with = Counter(word for count in counts for word in count)
        known = sorted(word for word, images in images_with.items() if images >= RARE)
        if min(len(known), len(captions) - 1) < num_features:
            raise DataError(
                f"{len(captions)} images with {len(known)} words that {RARE} of them share make no embedding of "
                f"{num_features} numbers; bring more captions or ask for fewer numbers"
            )
        self.row = {word: i for i, word in enumerate(known)}
        self.rarity_W = np.array([math.log(len(captions) / images_with[word]) for word in known])
        x_NW = np.stack([self._tf_idf(count) for count in counts])
        self.mean_W = x_NW.mean(0)
        covariance_WW = (x_NW - self.mean_W).T @ (x_NW - self.mean_W) / len(captions)
        variances_W, axes_WW = np.linalg.eigh(covariance_WW)  # ascending
        variances_F = variances_W[::-1][:num_features]
        self.axes_WF = axes_WW[:, ::-1][:, :num_features] / math.sqrt(variances_F.mean())

    def __call__(self, captions: Sequence[str]) -> Tensor:
        x_F = (self._tf_idf(self._words(captions)) - self.mean_W) @ self.axes_WF
        return torch.from_numpy(x_F).float()

    @staticmethod
    def _words(captions: Sequence[str]) -> Counter:
        return Counter(word for text in captions for word in words(text).split())

    def _tf_idf(self, count: Counter) -> np.ndarray:
        x_W = np.zeros(len(self.row))
        for word, times in count.items():
            if word in self.row:
                x_W[self.row[word]] = (1 + math.log(times)) * self.rarity_W[self.row[word]]
        return x_W / max(np.linalg.norm(x_W), 1e-9)


def noisy(embedding_F: Tensor, seed: int, deviation: float = NOISE) -> Tensor:
    """The embedding with noise, by default of a quarter of its variance: what a projector makes of an image is not exact."""
    rng = torch.Generator().manual_seed(seed)
    return embedding_F + deviation * torch.randn(embedding_F.shape, generator=rng)


def each_by_the_others(captions: Sequence[str]) -> list[tuple[list[str], str]]:
    """Each caption of an image as a target, and before it the others, which describe it."""
    others = [[*captions[:i], *captions[i + 1 :]] for i in range(len(captions))]
    return list(zip(others, captions, strict=True)) if len(captions) > 1 else []
