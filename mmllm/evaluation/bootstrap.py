"""How far a score may be from that of other images of the same kind: bootstrap intervals."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

RESAMPLES = 1000


def intervals(
    rows: np.ndarray, groups: Sequence[Hashable], score: Callable[[np.ndarray], dict[str, float]], seed: int = 0
) -> dict[str, list[float]]:
    """The middle 95 % of each score over resampled sets, as [low, high]. `rows` (tasks, numbers) are what `score` takes
    the sum of.

    Groups are drawn with replacement, not tasks: the questions about one image are not independent of each other.
    Document frequencies of CIDEr stay those of the whole set.
    """
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(number), rows.shape[1]))
    np.add.at(sums, [number[group] for group in groups], rows)
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums)) for _ in range(RESAMPLES)]
    found = [score(counts @ sums) for counts in draws]
    return {name: np.percentile([scores[name] for scores in found], [2.5, 97.5]).round(6).tolist() for name in found[0]}
