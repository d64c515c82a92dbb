"""CIDEr-D of single captions. What the COCO tool and every published table call CIDEr is CIDEr-D.

Both weigh the n-grams of a caption by tf-idf and compare it with each reference; CIDEr-D also clips the counts and
penalizes a difference in length, so that repeating rare words gains nothing.

    https://arxiv.org/abs/1411.5726    https://github.com/vrama91/cider/blob/master/pyciderevalcap/ciderD/ciderD_scorer.py
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

MAX_N = 4
SIGMA = 6.0  # of the penalty on the difference in length, in words


class Vector(NamedTuple):
    """The tf-idf weights of a text, their lengths for each n, and the number of its bigrams (its length, officially)."""

    weights: dict[tuple[str, ...], float]
    norms: list[float]
    bigrams: int

    def unit(self) -> dict[tuple[str, ...], float]:
        """The weights, normalised to length 1 for each n."""
        return {gram: weight / self.norms[len(gram) - 1] for gram, weight in self.weights.items() if weight}


class CiderD:
    """Scores captions by document frequencies of `references`, the texts of each image: those that are evaluated, as the
    COCO tool does, or those of the training set for a reward. All texts are as `ptb.words` makes them."""

    def __init__(self, references: Iterable[Sequence[str]]):
        self.images_with: Counter[tuple[str, ...]] = Counter()
        images = 0
        for texts in references:
            self.images_with.update(set(chain.from_iterable(map(ngrams, texts))))
            images += 1
        self.log_images = math.log(images)

    def scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The score of each prediction, from 0 to 10; several predictions may have the same references."""
        return [
            self.score(self.vector(text), [self.vector(reference) for reference in texts])
            for text, texts in zip(predictions, references, strict=True)
        ]

    def vector(self, text: str) -> Vector:
        weights, squares, bigrams = {}, [0.0] * MAX_N, 0
        for gram, count in Counter(ngrams(text)).items():
            weights[gram] = weight = count * (self.log_images - math.log(max(1, self.images_with[gram])))
            squares[len(gram) - 1] += weight * weight
            bigrams += count if len(gram) == 2 else 0
        return Vector(weights, [math.sqrt(square) for square in squares], bigrams)

    def score(self, prediction: Vector, references: Sequence[Vector]) -> float:
        return 10 * sum(similarity(prediction, reference) for reference in references) / len(references)


def similarity(prediction: Vector, reference: Vector) -> float:
    """The mean over n of the clipped cosine, times the penalty on the difference in length."""
    products = [0.0] * MAX_N
    for gram, weight in prediction.weights.items():
        if other := reference.weights.get(gram):
            products[len(gram) - 1] += min(weight, other) * other
    cosines = (p / (a * b) for p, a, b in zip(products, prediction.norms, reference.norms, strict=True) if p)
    penalty = math.exp(-((prediction.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
    return sum(cosines) / MAX_N * penalty


def ngrams(text: str) -> list[tuple[str, ...]]:
    parts = text.split()
    return [tuple(parts[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(parts) - n + 1)]
