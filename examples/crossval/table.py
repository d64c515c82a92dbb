"""The table of image embeddings, the captions of its images, and captions copied from the nearest images.

N images, F numbers of an embedding.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmllm.data.order import sample_order
from mmllm.data.samples import load_samples
from mmllm.errors import DataError
from mmllm.evaluation.cider import CiderD
from mmllm.evaluation.ptb import words

Captions = dict[str, tuple[str, ...]]  # by image name

NEIGHBORS = 10


def read_features(path: str | Path) -> dict[str, Tensor]:
    """Embeddings (F,) in float32 by image name, of a .safetensors file with a tensor for each image, or of an .npz file
    with `names` (N,) and `embeddings` (N, F)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such table of embeddings")
    if path.suffix == ".npz":
        with np.load(path) as content:
            if not {"names", "embeddings"} <= set(content):
                raise DataError(f"{path}: holds {', '.join(content)}; `names` and `embeddings` are needed")
            rows_NF = torch.from_numpy(content["embeddings"]).float()
            features = dict(zip(map(str, content["names"]), rows_NF, strict=True))
    else:
        try:
            features = {name: tensor.float().flatten() for name, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise DataError(f"{path}: cannot be read as safetensors ({error}); tables are that or .npz") from error
    lengths = {len(row) for row in features.values()}
    if len(lengths) != 1:
        raise DataError(
            f"{path}: embeddings of {sorted(lengths)} numbers; all must have as many, and there must be some"
        )
    return features


def read_captions(path: str | Path) -> Captions:
    """The captions by the file name of their image, from a data file in any supported format, as the words that scores
    count: capitals and full stops are as people happened to write them, and cost a small model much."""
    samples = [sample for sample in load_samples(path) if len(sample.images) == 1]
    found = {sample.images[0].name: sample.references for sample in samples}
    plain = {name: tuple(text for text in map(words, texts) if text) for name, texts in found.items()}
    return {name: texts for name, texts in plain.items() if texts}


def deal(names: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    """`names` in mixed order, dealt like cards into `folds` parts."""
    order = sample_order(len(names), seed, 0)
    return [[names[i] for i in order[fold::folds]] for fold in range(folds)]


def standardised(features: dict[str, Tensor], training: Sequence[str]) -> dict[str, Tensor]:
    """The embeddings with mean 0 and deviation 1 in each number over the `training` images: those of CLIP have unit
    length, and a new projector would take long to tell them apart."""
    rows_NF = torch.stack([features[name] for name in training])
    mean_F, deviation_F = rows_NF.mean(0), rows_NF.std(0).clamp(min=1e-6)
    return {name: (row_F - mean_F) / deviation_F for name, row_F in features.items()}


def nearest(query_F: Tensor, others: dict[str, Tensor], count: int) -> list[str]:
    """The names of the `count` embeddings with the highest cosine to `query_F`, the best first."""
    names = list(others)
    cosines_N = F.cosine_similarity(query_F[None], torch.stack(list(others.values())))
    return [names[i] for i in cosines_N.argsort(descending=True, stable=True)[:count].tolist()]


def consensus(texts: Sequence[str], scorer: CiderD) -> str:
    """The one of `texts` that is most like all of them, in CIDEr's n-grams and weights."""
    vectors = [scorer.vector(words(text)).unit() for text in texts]
    together = Counter()
    for vector in vectors:
        for gram, weight in vector.items():
            together[gram] += weight
    likeness = [sum(weight * together[gram] for gram, weight in vector.items()) for vector in vectors]
    return texts[max(range(len(texts)), key=likeness.__getitem__)]


def copied(
    features: dict[str, Tensor], captions: Captions, tested: list[str], training: list[str]
) -> dict[str, list[str]]:
    """The neighbors' captions for each `tested` image: their consensus, and the first of the nearest."""
    known = {name: features[name] for name in training}
    scorer = CiderD([words(text) for text in captions[name]] for name in training)
    firsts, agreed = [], []
    for name in tested:
        near = nearest(features[name], known, NEIGHBORS)
        firsts.append(captions[near[0]][0])
        agreed.append(consensus([text for other in near for text in captions[other]], scorer))
    return {f"{NEIGHBORS} neighbors": agreed, "nearest": firsts}
