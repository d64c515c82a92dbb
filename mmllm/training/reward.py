"""Stage 3: the model's own captions, made likelier where they score above the others of their image.

Cross-entropy asks for the next word of a person's caption; what is scored is a whole caption that the model wrote. So
`num_captions` are sampled for each image, and with y_i the i-th of them and p_0 the model before the stage

    r_i = CIDEr-D(y_i) + bleu_weight * BLEU-4(y_i) - kl_weight * (log p(y_i) - log p_0(y_i))
    loss = - sum_i (r_i - mean of the other r_j of the image) * log p(y_i) / tokens of all captions of the step

whose gradient is that of the expected score less `kl_weight` times the Kullback-Leibler divergence from p_0, without
bias. A step is therefore an ordinary one on sampled captions, whose targets have a factor in the loss.

A caption's end counts as one of its words: otherwise "a dog with a" scores as well as a finished caption.

Self-critical training: https://arxiv.org/abs/1612.00563; the other captions as the baseline: https://arxiv.org/abs/2003.09971;
the divergence in the reward: https://arxiv.org/abs/2402.14740; the end: https://arxiv.org/abs/2305.12254. M targets.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmllm.config.schema import RewardConfig, StageConfig
from mmllm.data.batches import Batch, ReadImage, make_batch
from mmllm.data.chat import IGNORED, ChatProcessor, Encoded
from mmllm.data.packing import pack
from mmllm.data.samples import Sample
from mmllm.errors import DataError
from mmllm.evaluation.cider import CiderD
from mmllm.evaluation.ptb import words
from mmllm.evaluation.tasks import Task, tasks_of
from mmllm.inference.engine import Engine
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.device import autocast
from mmllm.runtime.distributed import local
from mmllm.training.adamw8bit import AdamW8bit, empty_moments
from mmllm.training.fsdp import call_once, gathered

SLOTS = 64  # captions that are sampled side by side
END = "<end>"  # the word for the end of a caption

Reward = Callable[[list[Generated], tuple[str, ...]], list[float]]  # captions of an image and its references to scores


@dataclass(frozen=True)
class Question:
    """The prompt for a caption of an image, and the captions that people wrote."""

    prompt: Prompt
    references: tuple[str, ...]


def caption_tasks(sample: Sample) -> list[Task]:
    tasks = tasks_of([sample, *sample.shared])
    return [task for task in tasks if task.is_caption and task.images and task.references]


def read_questions(
    sample: Sample, processor: ChatProcessor, max_length: int | None, read_image: ReadImage
) -> list[Question]:
    """What `BatchLoader` reads of a sample in stage 3."""
    pixels = [read_image(path) for path in sample.images]
    return [
        Question(
            Prompt(tuple(processor.encode_prompt(list(task.messages))), torch.stack(pixels[: len(task.images)])),
            task.references,
        )
        for task in caption_tasks(sample)
    ]


def caption_reward(samples: list[Sample], bleu_weight: float) -> Reward:
    """CIDEr-D + `bleu_weight` * BLEU-4, with the document frequencies of the samples' references."""
    of_samples = [caption_tasks(sample) for sample in samples]
    if without := sum(not tasks for tasks in of_samples):
        raise DataError(
            f"stage 3 trains on captions, and {without} of {len(samples)} training samples have none; make it a run of its "
            "own on captions, with model.pretrained=outputs/NAME/best_model stage1.epochs=0 stage2.epochs=0"
        )
    scorer = CiderD([f"{words(text)} {END}" for text in task.references] for tasks in of_samples for task in tasks)

    def reward(answers: list[Generated], references: tuple[str, ...]) -> list[float]:
        truth = [f"{words(text)} {END}" for text in references]
        captions = [words(answer.text) + f" {END}" * (answer.finish_reason == "stop") for answer in answers]
        vectors = [scorer.vector(text) for text in truth]
        scores = [scorer.score(scorer.vector(caption), vectors) for caption in captions]
        if bleu_weight:
            scores = [s + bleu_weight * b for s, b in zip(scores, bleu_4(captions, truth), strict=True)]
        return scores

    return reward


def bleu_4(captions: list[str], references: list[str]) -> list[float]:
    """BLEU-4 of each caption of an image."""
    from pycocoevalcap.bleu.bleu import Bleu

    truth = dict.fromkeys(range(len(captions)), references)
    return Bleu(4).compute_score(truth, {i: [text] for i, text in enumerate(captions)}, verbose=0)[1][3]


# The model before the stage -------------------------------------------------------------------------------------------


def has_reference(stage: StageConfig) -> bool:
    """Whether a copy of the trained parameters is kept through the stage."""
    return isinstance(stage, RewardConfig) and stage.kl_weight > 0


@torch.no_grad()
def keep_reference_(optimizer: torch.optim.Optimizer) -> None:
    """Keep a copy of all trained parameters beside their moments, where checkpoints find it."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        is_8bit = isinstance(optimizer, AdamW8bit)
        moments = empty_moments(p) if is_8bit else {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments, "reference": p.detach().clone()}


@contextmanager
def as_before(model: MultimodalLLM, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the trained parameters have the values of `keep_reference_`; a collective, as `gathered`."""
    swap_(optimizer)
    with gathered(model):
        yield
    swap_(optimizer)


@torch.no_grad()
def swap_(optimizer: torch.optim.Optimizer) -> None:
    for p, state in optimizer.state.items():
        now = local(p).clone()
        local(p).copy_(local(state["reference"]))
        local(state["reference"]).copy_(now)


# The captions ---------------------------------------------------------------------------------------------------------


class CaptionSampler:
    """Makes the batches of stage 3: the captions that `model` says, each with its factor in the loss."""

    def __init__(
        self,
        model: MultimodalLLM,
        optimizer: torch.optim.Optimizer,
        settings: RewardConfig,
        reward: Reward,
        *,
        max_length: int,
        bf16: bool,
    ):
        self.model, self.optimizer, self.settings, self.reward = model, optimizer, settings, reward
        self.max_length, self.bf16 = max_length, bf16
        call_once(model)

    def batches(self, asked: list[list[Question]]) -> tuple[list[Batch], list[float]]:
        """A batch for each list of questions; and the sum of all scores, that of the divergences, the number of captions.

        A collective. The seeds of the captions are drawn from torch's generator.
        """
        self.model.eval()  # without dropout, the captions are samples of the model that is updated
        with gathered(self.model), autocast(self.model.device, self.bf16):
            said = [self._sample(questions) for questions in asked]
        made = [self._batch(questions, answers) for questions, answers in zip(asked, said, strict=True)]
        before = self._logprobs_before(made) if has_reference(self.settings) else [None] * len(made)
        sums, batches = [0.0, 0.0, 0.0], []
        for questions, answers, batch, before_M in zip(asked, said, made, before, strict=True):
            factors, numbers = self._factors(questions, answers, before_M)
            batches.append(replace(batch, factors_M=torch.tensor(factors)))
            sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        return batches, sums

    def _sample(self, questions: list[Question]) -> list[list[Generated]]:
        """`num_captions` answers to each question."""
        number, limit = self.settings.num_captions, self.settings.max_new_tokens
        slots = min(SLOTS, number * len(questions))
        longest = max(len(question.prompt.ids) for question in questions)
        engine = Engine(self.model, slots, max_length=longest + limit, is_exact=False, use_static_step=False)
        seeds = torch.randint(2**62, (len(questions), number)).tolist()
        handles = [
            engine.submit(Handle(question.prompt, GenerationConfig(limit, temperature=1.0, seed=seed, logprobs=True)))
            for question, of_one in zip(questions, seeds, strict=True)
            for seed in of_one
        ]
        engine.run(handles)
        answers = [handle.result() for handle in handles]
        return [answers[start : start + number] for start in range(0, len(answers), number)]

    def _targets(self, answer: Generated) -> list[int]:
        """The tokens of a caption, up to a placeholder for an image, which the model can say but not read."""
        ids, image_id = list(answer.ids), self.model.config.image_token_id
        if image_id in ids:
            return ids[: ids.index(image_id)]
        return ids if answer.end_id is None else [*ids, answer.end_id]

    def _batch(self, questions: list[Question], said: list[list[Generated]]) -> Batch:
        """The captions of each image in one row or, where `max_length` is too short, a few."""
        processor, rows = self.model.processor, []
        for question, answers in zip(questions, said, strict=True):
            ids, images = list(question.prompt.ids), list(question.prompt.pixels)
            targets = [target for answer in answers if (target := self._targets(answer))] or [[]]
            encoded = [
                Encoded(ids + target, [IGNORED] * len(ids) + target, list(range(len(images)))) for target in targets
            ]
            rows += [(row, images) for row in pack(encoded, processor.tokenizer.image_id, self.max_length)]
        return make_batch(rows, processor)

    @torch.no_grad()
    def _logprobs_before(self, batches: list[Batch]) -> list[Tensor]:
        """The log-probability (M,) of each target of a batch by the model before the stage."""
        found = []
        with as_before(self.model, self.optimizer):
            for batch in batches:
                inputs = list(vars(batch.to(self.model.device)).values())[:-1]
                with autocast(self.model.device, self.bf16):
                    found.append(self.model.target_logprobs(*inputs).cpu())
        return found

    def _factors(
        self, questions: list[Question], said: list[list[Generated]], before_M: Tensor | None
    ) -> tuple[list[float], list[float]]:
        """The factor of each target of a batch, and the sums that `batches` returns."""
        factors, sums, place = [], [0.0, 0.0, 0.0], 0
        for question, answers in zip(questions, said, strict=True):
            scores = self.reward(answers, question.references)
            lengths = [len(self._targets(answer)) for answer in answers]
            divergences = [0.0] * len(answers)
            for i, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
                if before_M is not None:
                    divergences[i] = sum(answer.logprobs[:length]) - before_M[place : place + length].sum().item()
                place += length
            rewards = [s - self.settings.kl_weight * d for s, d in zip(scores, divergences, strict=True)]
            for factor, length in zip(advantages(rewards), lengths, strict=True):
                factors += [factor] * length
            sums = [sums[0] + sum(scores), sums[1] + sum(divergences), sums[2] + len(answers)]
        return factors, sums


def advantages(rewards: list[float]) -> list[float]:
    """Each reward less the mean of the others."""
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]
