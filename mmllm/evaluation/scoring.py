"""Scores of captions (BLEU, ROUGE-L, CIDEr, METEOR) and of answers (VQA accuracy), equal to the official ones.

The surprising fact: how a caption is cut into words moves CIDEr by a sixth, so `ptb.words` comes before everything, and
CIDEr weighs words by how few of *these* pictures they belong to, so scores of different sets cannot be compared and
that of a single picture is always 0. pycocoevalcap does the counting. METEOR, a Java program, is there where Java is.

VQA: https://visualqa.org/evaluation.html, https://github.com/GT-Vision-Lab/VQA. Next: evaluate.py.
"""

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mmllm.errors import RunError, UserError
from mmllm.evaluation.ptb import words


class MultimodalEvaluator:
    """Scores predictions against references, on a scale from 0 to 1 (CIDEr may pass 1; tables often print x 100).

        results = MultimodalEvaluator().evaluate_captioning(["A cat"], [["A cat sits", "A cat on a sill"]])
        print(f"BLEU-4: {results['bleu_4']:.4f}")

    `meteor` None means: where Java is. Asking for it where Java is not raises UserError at once.
    """

    def __init__(self, meteor: bool | None = None):
        has_java = shutil.which("java") is not None
        if meteor and not has_java:
            raise UserError("METEOR is a Java program and there is no `java` here; install Java, or do without METEOR")
        self.meteor = has_java if meteor is None else meteor

    def evaluate_captioning(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """bleu_1 ... bleu_4, rouge_l, cider and perhaps meteor of one prediction a picture; UserError names a bad one."""
        # Here and not above: VQA accuracy needs neither numpy nor pycocoevalcap.
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        check_pairs(predictions, references, "references")
        candidate = {i: [words(text)] for i, text in enumerate(predictions)}
        truth = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
        if not any(text for texts in truth.values() for text in texts):
            raise UserError("no reference holds a word")
        scores = {f"bleu_{n}": s for n, s in enumerate(Bleu(4).compute_score(truth, candidate, verbose=0)[0], 1)}
        scores["rouge_l"] = Rouge().compute_score(truth, candidate)[0]
        scores["cider"] = Cider().compute_score(truth, candidate)[0]
        if self.meteor:
            scores["meteor"] = meteor([texts[0] for texts in candidate.values()], list(truth.values()))
        return {name: float(score) for name, score in scores.items()}

    def evaluate_vqa(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        """Mean accuracy by the official rule, and with both sides always normalised (as EvalAI and mmf do).

        They differ where all people agree: the official code then compares the raw texts, and "Yes." against ten times
        "yes" counts nothing.
        """
        check_pairs(predictions, answers, "answers")
        for i, texts in enumerate(answers):
            if len(texts) < 4:
                raise UserError(
                    f"answers[{i}] holds {len(texts)}; VQA accuracy needs what several people (ten in VQAv2) answered"
                )
        pairs = list(zip(predictions, answers, strict=True))
        return {
            "vqa_accuracy": sum(vqa_accuracy(*pair) for pair in pairs) / len(pairs),
            "vqa_accuracy_normalised": sum(vqa_accuracy_normalised(*pair) for pair in pairs) / len(pairs),
        }


def check_pairs(predictions: Sequence[str], truths: Sequence[Sequence[str]], name: str) -> None:
    for argument, label in ((predictions, "predictions"), (truths, name)):
        if isinstance(argument, str) or not isinstance(argument, Sequence):
            raise UserError(f"{label} must be a list, one entry a picture, not {type(argument).__name__}")
    if len(predictions) != len(truths):
        raise UserError(f"{len(predictions)} predictions, but {name} for {len(truths)}; each needs the other")
    if not predictions:
        raise UserError("there are no predictions to score")
    for i, (prediction, texts) in enumerate(zip(predictions, truths, strict=True)):
        if not isinstance(prediction, str):
            raise UserError(f"predictions[{i}] must be a text, not {type(prediction).__name__}")
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise UserError(f'{name}[{i}] must be a list of texts, such as ["a cat", "the cat"]')
        if not texts:
            raise UserError(f"{name}[{i}] is empty; each prediction needs at least one")


def meteor(candidates: list[str], references: list[list[str]]) -> float:
    """METEOR 1.5 of texts already cut into words, by the program that pycocoevalcap brings."""
    jar = Path(find_spec("pycocoevalcap.meteor.meteor").origin).with_name("meteor-1.5.jar")
    command = ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", cwd=jar.parent
    ) as java:

        def ask(*parts: str) -> str:
            java.stdin.write(" ||| ".join(parts) + "\n")
            java.stdin.flush()
            return java.stdout.readline().strip()

        try:
            counts = [ask("SCORE", *texts, text) for text, texts in zip(candidates, references, strict=True)]
            ask("EVAL", *counts)  # answers with a line a candidate, and the whole last
            lines = [java.stdout.readline() for _ in candidates]
            return float(lines[-1])
        except (OSError, ValueError) as error:
            raise RunError(f"METEOR's Java program failed; try `{' '.join(command)}`, or do without METEOR") from error


def best_constant_caption(references: Sequence[Sequence[str]], finalists: int = 20) -> str:
    """The caption among `references` that has the highest CIDEr when it is said of every picture.

    A model that does not beat it has not looked. The exact score of every caption would take an hour for 5,000 of
    them, so all are ranked by a stand-in, their similarity to the mean reference, and only the best are scored.
    """
    from pycocoevalcap.cider.cider import Cider

    truth = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    text_of = {words(text): text for texts in references for text in texts}
    counts = {text: ngrams(text) for text in text_of}
    pictures_with = Counter(gram for texts in truth.values() for gram in set().union(*(counts[text] for text in texts)))
    weights = {text: weighted(counts[text], pictures_with, len(truth)) for text in counts}
    mean = Counter()
    for texts in truth.values():
        for text in texts:
            for gram, weight in weights[text].items():
                mean[gram] += weight / len(texts)

    def likeness(text: str) -> float:
        return sum(weight * mean[gram] for gram, weight in weights[text].items())

    def cider(text: str) -> float:
        return Cider().compute_score(truth, dict.fromkeys(truth, [text]))[0]

    return text_of[max(sorted(weights, key=likeness)[-finalists:], key=cider)]


def ngrams(text: str) -> Counter:
    parts = text.split()
    return Counter(tuple(parts[i : i + n]) for n in range(1, 5) for i in range(len(parts) - n + 1))


def weighted(counts: Counter, pictures_with: Counter, num_pictures: int) -> dict[tuple, float]:
    """tf-idf of the n-grams of a text; those of each n have length 1 together."""
    weights = {gram: count * math.log(num_pictures / pictures_with[gram]) for gram, count in counts.items()}
    square = Counter()
    for gram, weight in weights.items():
        square[len(gram)] += weight**2
    return {gram: weight / math.sqrt(square[len(gram)]) for gram, weight in weights.items() if weight}


# ---- VQA

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
DIGITS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# A contraction written without one of its apostrophes gets it back; one entry of the official table is the wrong way.
MENDED = {text[:i] + text[i + 1 :]: text for text in CONTRACTIONS.split() for i in range(len(text)) if text[i] == "'"}
MENDED["somebody'd"] = "somebodyd"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of one answer: over all ways to leave one person out, the mean of min(1, as many agree / 3)."""
    prediction, answers = plain(prediction), [plain(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    return agreement(prediction, answers)


def vqa_accuracy_normalised(prediction: str, answers: Sequence[str]) -> float:
    """The same with normalised texts, also where all people agree."""
    return agreement(normalise_answer(prediction), [normalise_answer(answer) for answer in answers])


def is_answer(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` is one of the right answers, but for case, punctuation, articles and number words."""
    return normalise_answer(prediction) in map(normalise_answer, references)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    same = answers.count(prediction)
    others = [same - (answer == prediction) for answer in answers]
    return sum(min(1, count / 3) for count in others) / len(answers)


def plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """An answer as EvalAI and mmf compare it: commas and question marks go first, 's is a word of its own."""
    return normalise(plain(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def normalise(text: str) -> str:
    """An answer as the official code compares it: no punctuation, no articles, digits for number words."""
    has_thousands = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in PUNCTUATION:
        is_loose = mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if is_loose or has_thousands else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)  # 32: the official code passes a flag where the count belongs
    kept = [DIGITS.get(word, word) for word in bare.lower().split()]
    return " ".join(MENDED.get(word, word) for word in kept if word not in ("a", "an", "the"))
