"""CIDEr-D, against the scorer of pycocoevalcap."""

import random

import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from mmllm.evaluation.cider import CiderD

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "the", "red", "mat", "in", "park"]


def sentences(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 12))) for _ in range(count)]


def official(predictions, references, corpus) -> list[float]:
    """The scores of pycocoevalcap, with the document frequencies of a `corpus` of as many images."""
    frequencies, scorer = CiderScorer(), CiderScorer()
    for texts in corpus:
        frequencies += ("", texts)
    frequencies.compute_doc_freq()
    for text, texts in zip(predictions, references, strict=True):
        scorer += (text, texts)
    scorer.document_frequency = frequencies.document_frequency
    return scorer.compute_cider()


@pytest.mark.parametrize("seed", range(5))
def test_every_caption_scores_as_the_official_code_scores_it_with_any_document_frequencies(seed):
    rng = random.Random(seed)
    corpus, references = ([sentences(rng, rng.randint(1, 5)) for _ in range(40)] for _ in range(2))
    predictions = sentences(rng, 40)
    found = CiderD(corpus).scores(predictions, references)
    assert found == pytest.approx(official(predictions, references, corpus), abs=1e-12)
    assert max(found) > 0.5


def test_a_caption_that_repeats_a_rare_word_gains_nothing():
    corpus = [["a red dog", "the dog"], ["a cat", "the cat runs"], ["a mat", "a park"]]
    once, often = CiderD(corpus).scores(["a red dog", "red red red red red red dog"], [corpus[0]] * 2)
    assert once > 2 * often


def test_the_same_caption_scores_ten():
    corpus = [["a red dog sits on the mat"], ["the cat runs in a park today"]]
    assert CiderD(corpus).scores(["a red dog sits on the mat"], [corpus[0]]) == pytest.approx([10.0])
