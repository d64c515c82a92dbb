"""A stateless order of samples, and a split into training and validation samples by it.

Both are pure functions of a seed: a run resumes from one integer, on any number of processes and with any version of numpy.
"""

from pathlib import Path

import numpy as np

from mmllm.data.samples import Sample


def sample_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation that depends on nothing but its arguments.

    The indices are sorted by random numbers of splitmix64 (https://prng.di.unimi.it/splitmix64.c). numpy's own
    permutations may change from one version to the next, and a resumed run would see other samples.
    """
    start = splitmix64(splitmix64(np.array([seed], np.uint64) * GOLDEN) + np.array([epoch], np.uint64) * GOLDEN)
    keys = splitmix64(start + np.arange(1, num_samples + 1, dtype=np.uint64) * GOLDEN)
    return np.argsort(keys, kind="stable").tolist()


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split_by_image(samples: list[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and about `fraction` of all (at least one) to validate; no image is in both.

    Samples of the same image, also through a third sample that shows both images, are on the same side.
    """
    parent: dict[Path, Path] = {}

    def root(image: Path) -> Path:
        while image in parent:
            image = parent[image]
        return image

    for sample in samples:
        for image in sample.images[1:]:
            one, other = root(sample.images[0]), root(image)
            if one != other:
                parent[other] = one
    groups = [root(sample.images[0]) if sample.images else index for index, sample in enumerate(samples)]
    distinct = list(dict.fromkeys(groups))
    size = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    chosen = {distinct[index] for index in sample_order(len(distinct), seed, 0)[:size]}
    train = [sample for sample, group in zip(samples, groups, strict=True) if group not in chosen]
    return train, [sample for sample, group in zip(samples, groups, strict=True) if group in chosen]
