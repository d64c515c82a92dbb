"""The public evaluator of captions and answers. It needs no torch."""

import shutil
from collections.abc import Sequence

from mmllm.errors import RunError, UserError
from mmllm.evaluation.captions import caption_scores, java_fault, meteor, spice
from mmllm.evaluation.vqa import PEOPLE, vqa_accuracy, vqa_accuracy_normalised
from mmllm.runtime.console import stderr_rank0


class MultimodalEvaluator:
    """Scores predictions against references, from 0 to 1 (CIDEr can exceed 1; tables often print x 100).

        results = MultimodalEvaluator().evaluate_captioning(["A cat"], [["A cat sits", "A cat on a sill"]])
        print(f"BLEU-4: {results['bleu_4']:.4f}")

    `meteor` None: METEOR too where Java works. True: UserError where it does not. Where Java is there but broken, or METEOR
    fails later, a line on stderr says so and METEOR is left out: the other scores are not lost. `spice` True: SPICE in the
    same way; it is slow, so never without being asked for.
    """

    def __init__(self, meteor: bool | None = None, spice: bool = False):
        java = shutil.which("java")
        fault = java_fault(java) if spice or meteor is not False else ""
        if fault and (meteor or spice):
            name = "METEOR" if meteor else "SPICE"
            raise UserError(f"{name} is a Java program and {fault}; install Java, or leave {name} out")
        if fault and java:
            stderr_rank0(f"METEOR is left out: {fault}")
        self.meteor, self.spice = meteor is not False and not fault, spice

    def evaluate_captioning(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """bleu_1 ... bleu_4, rouge_l, cider and perhaps meteor and spice of one prediction per image."""
        check_pairs(predictions, references, "references")
        return caption_scores(predictions, references) | self.java_scores(predictions, references)

    def java_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """meteor and spice, as far as they are wanted and their programs work."""
        scores = {}
        for is_wanted, name, measure in ((self.meteor, "meteor", meteor), (self.spice, "spice", spice)):
            if is_wanted:
                try:
                    scores[name] = measure(predictions, references)
                except RunError as error:
                    stderr_rank0(f"{name.upper()} is left out: {error}")
        return scores

    def evaluate_vqa(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        """Mean accuracy by the official rule, and with both sides always normalised (as EvalAI and mmf do).

        They differ where all people agree: the official code then compares the raw texts, so "Yes." does not match ten
        times "yes".
        """
        check_pairs(predictions, answers, "answers")
        for i, texts in enumerate(answers):
            if len(texts) < PEOPLE:
                raise UserError(
                    f"answers[{i}] holds {len(texts)}; VQA accuracy needs the answers of several people (ten in VQAv2)"
                )
        pairs = list(zip(predictions, answers, strict=True))
        return {
            "vqa_accuracy": sum(vqa_accuracy(*pair) for pair in pairs) / len(pairs),
            "vqa_accuracy_normalised": sum(vqa_accuracy_normalised(*pair) for pair in pairs) / len(pairs),
        }


def check_pairs(predictions: Sequence[str], references: Sequence[Sequence[str]], name: str) -> None:
    """UserError unless each prediction is a text and has a list of at least one text."""
    for argument, label in ((predictions, "predictions"), (references, name)):
        if isinstance(argument, str) or not isinstance(argument, Sequence):
            raise UserError(f"{label} must be a list, one entry per image, not {type(argument).__name__}")
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions, but {name} for {len(references)}; each needs the other")
    if not predictions:
        raise UserError("there are no predictions to score")
    for i, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise UserError(f"predictions[{i}] must be a text, not {type(prediction).__name__}")
        is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not is_list or not all(isinstance(text, str) for text in texts):
            raise UserError(f'{name}[{i}] must be a list of texts, such as ["a cat", "the cat"]')
        if not texts:
            raise UserError(f"{name}[{i}] is empty; each prediction needs at least one")
