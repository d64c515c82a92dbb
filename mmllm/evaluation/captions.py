"""Scores of captions (BLEU, ROUGE-L, CIDEr, METEOR), equal to the official ones.

CIDEr weighs words by how few of the evaluated images they belong to: scores of different sets cannot be compared, and
that of a single image is 0. pycocoevalcap counts for BLEU and ROUGE-L, cider.py computes CIDEr.
"""

import math
import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.rouge.rouge import Rouge

from mmllm.errors import RunError, UserError
from mmllm.evaluation.cider import CiderD
from mmllm.evaluation.ptb import words

JAVA_TIMEOUT_S = 60  # to start and, beside a second per caption, for METEOR's work


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """bleu_1 ... bleu_4, rouge_l and cider. UserError if no reference holds a word."""
    return scores_of_sums(caption_rows(predictions, references).sum(axis=0))


def caption_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """For each caption the numbers whose sums make the scores: matched and predicted n-grams (4 + 4), its length and that
    of its reference, ROUGE-L, CIDEr, and 1."""
    candidates, truth = list(map(words, predictions)), [list(map(words, texts)) for texts in references]
    if not any(text for texts in truth for text in texts):
        raise UserError("no reference holds a word")
    bleu, rouge = BleuScorer(n=4), Rouge()
    for pair in zip(candidates, truth, strict=True):
        bleu += pair
    counts = [
        [*row["correct"], *row["guess"], row["testlen"], min((abs(n - row["testlen"]), n) for n in row["reflen"])[1]]
        for row in bleu.ctest
    ]
    overlap = [rouge.calc_score([text], texts) for text, texts in zip(candidates, truth, strict=True)]
    cider = CiderD(truth).scores(candidates, truth)
    return np.column_stack([np.array(counts, float), overlap, cider, np.ones(len(truth))])


def scores_of_sums(sums: np.ndarray) -> dict[str, float]:
    """The scores of a set of captions by the sum of its `caption_rows`."""
    correct, guess, (length, reference_length, rouge, cider, count) = sums[:4], sums[4:8], sums[8:]
    ratio = (length + 1e-15) / (reference_length + 1e-9)  # the small numbers are those of the official code
    scores, product = {}, 1.0
    for n in range(4):
        product *= (correct[n] + 1e-15) / (guess[n] + 1e-9)
        scores[f"bleu_{n + 1}"] = product ** (1 / (n + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)
    return {name: float(score) for name, score in scores.items()} | {
        "rouge_l": float(rouge / count),
        "cider": float(cider / count),
    }


@cache
def java_fault(java: str | None) -> str:
    """Why the program `java`, None if there is none, cannot run METEOR; "" if it can."""
    if java is None:
        return "there is no `java` here"
    try:
        found = subprocess.run([java, "-version"], capture_output=True, timeout=JAVA_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{java} -version` fails ({type(error).__name__})"
    is_java = found.returncode == 0 and b"version" in found.stdout + found.stderr
    return "" if is_java else f"`{java} -version` does not answer with a version"


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5, by the Java program in pycocoevalcap. RunError if it fails or hangs."""
    jar = Path(find_spec("pycocoevalcap.meteor.meteor").origin).with_name("meteor-1.5.jar")
    command = ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    timeout_s = JAVA_TIMEOUT_S + len(predictions)

    def run(*lines: Sequence[str]) -> list[str]:
        asked = "".join(" ||| ".join(parts) + "\n" for parts in lines)
        java = subprocess.run(
            command, input=asked, capture_output=True, encoding="utf-8", cwd=jar.parent, timeout=timeout_s, check=True
        )
        return java.stdout.splitlines()

    pairs = zip(predictions, references, strict=True)
    try:
        statistics = run(*(("SCORE", *map(words, texts), words(text)) for text, texts in pairs))
        return float(run(("EVAL", *statistics))[-1])  # a line per caption, then the score of all
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        raise RunError(f"METEOR's Java program failed; try `{' '.join(command)}`, or leave METEOR out") from error


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SPICE, by the Java program in pycocoevalcap, which downloads its parser (400 MB) once. RunError if it fails."""
    from pycocoevalcap.spice.spice import Spice

    candidate = {i: [words(text)] for i, text in enumerate(predictions)}
    truth = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    try:
        return float(Spice().compute_score(truth, candidate)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RunError(
            f"SPICE's Java program failed ({error}); it was written for Java 8, or leave SPICE out"
        ) from error


def best_constant_caption(references: Sequence[Sequence[str]], finalists: int = 20) -> str:
    """The caption among `references` with the highest CIDEr when it is the prediction for every image.

    A model that does not beat it does not use its images. Scoring each of 5,000 captions would take an hour, so all are
    ranked by their similarity to the mean reference and only the best are scored.
    """
    scorer = CiderD([[words(text) for text in texts] for texts in references])
    text_of = {words(text): text for texts in references for text in texts}
    vectors = {text: scorer.vector(text) for text in text_of}
    truth = [[vectors[words(text)] for text in texts] for texts in references]
    mean = Counter()
    for texts in truth:
        for vector in texts:
            for gram, weight in vector.unit().items():
                mean[gram] += weight / len(texts)

    def similarity(text: str) -> float:
        return sum(weight * mean[gram] for gram, weight in vectors[text].unit().items())

    def cider(text: str) -> float:
        return sum(scorer.score(vectors[text], texts) for texts in truth)

    return text_of[max(sorted(vectors, key=similarity)[-finalists:], key=cider)]
