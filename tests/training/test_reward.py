"""Stage 3: the gradient is that of the written formula, a run learns what is rewarded, and it goes on bit for bit."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmllm.config.schema import ExperimentConfig, RewardConfig
from mmllm.config.sources import resolve
from mmllm.data.samples import load_samples
from mmllm.errors import CheckpointError, ConfigError, DataError
from mmllm.inference.request import Generated
from mmllm.layers.lora import add_lora_
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import read_metrics
from mmllm.storage import checkpoint as disk
from mmllm.training.experiment import train
from mmllm.training.prepare import train_only_
from mmllm.training.reward import CaptionSampler, caption_reward, keep_reference_, read_questions
from mmllm.training.stage import stage_groups
from mmllm.training.step import accumulate_gradients, adamw
from tiny_run import directory_of, weights, write_world

BOTH = ("multi_modal_projector", "language_model")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def start(world, tmp_path_factory) -> Path:
    """A model that stages 1 and 2 have taught to say the world's captions now and then."""
    config = world.config(tmp_path_factory.mktemp("start"), learning_rate=5e-3, gradient_accumulation_steps=1)
    config.training.stage2.epochs = 4
    assert train(config) == 0
    return directory_of(config) / "best_model"


def stage3_config(world, start: Path, out: Path, **settings) -> ExperimentConfig:
    """Five steps of stage 3 alone, from `start`; each is saved."""
    config = world.config(out, best_metric="cider", save_steps=1, keep_checkpoints=100)
    config.model.pretrained = str(start)
    config.training.stage1.epochs = config.training.stage2.epochs = 0
    config.training.stage3 = RewardConfig(epochs=1, learning_rate=1e-3, max_new_tokens=12, **settings)
    return config


def numbers(config: ExperimentConfig) -> list[tuple]:
    names = ("step", "loss", "reward", "kl", "grad_norm", "val_loss", "cider")
    return [tuple(row.get(name) for name in names) for row in read_metrics(directory_of(config))]


def settings_of(**settings) -> RewardConfig:
    config = ExperimentConfig()
    config.training.stage3 = RewardConfig(learning_rate=1e-3, **settings)
    return config.stages()[2]


# The gradient


def count_some(answers: list[Generated], references: tuple[str, ...]) -> list[float]:
    return [float(sum(token % 7 for token in answer.ids)) for answer in answers]


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_gradient_is_that_of_the_written_formula(world, start, way):
    """Each caption in a row of its own, log p and log p_0 from the logits of all positions, in float64."""
    model = MultimodalLLM.from_pretrained(start).double()
    settings = settings_of(kl_weight=0.5, num_captions=3, max_new_tokens=6)
    if way == "lora":
        add_lora_(model.language_model, ExperimentConfig().model.lora_config)
        model.double()
    train_only_(model, BOTH)
    optimizer = adamw(stage_groups(model, settings, 0.0), 0.9, 0.95)
    before = copy.deepcopy(model)
    keep_reference_(optimizer)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p) * p.requires_grad
    samples = load_samples(world.folder / "train.json", world.folder / "images")[:4]
    read = model.processor.image_processor
    asked = [
        [q for s in pair for q in read_questions(s, model.processor, 512, read)] for pair in (samples[:2], samples[2:])
    ]
    sampler = CaptionSampler(model, optimizer, settings, count_some, max_length=512, bf16=False)
    torch.manual_seed(5)
    model.eval()
    said = [sampler._sample(questions) for questions in asked]
    torch.manual_seed(5)
    batches, (score, divergence, captions) = sampler.batches(asked)
    accumulate_gradients(model, batches)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    terms, tokens, scores, divergences = [], 0, [], []
    for questions, of_questions in zip(asked, said, strict=True):
        for question, answers in zip(questions, of_questions, strict=True):
            logprobs, rewards = [], []
            for answer, reward in zip(answers, count_some(answers, ()), strict=True):
                end = [answer.end_id] * (answer.finish_reason == "stop")
                ids = torch.tensor([[*question.prompt.ids, *answer.ids, *end]])
                first = len(question.prompt.ids)
                now, then = (
                    m.logits(ids, question.prompt.pixels)[0, first - 1 : -1]
                    .log_softmax(-1)
                    .gather(1, ids[0, first:, None])
                    .sum()
                    for m in (model, before)
                )
                logprobs.append(now)
                scores.append(reward)
                divergences.append((now - then).item())
                rewards.append(reward - 0.5 * divergences[-1])
                tokens += ids.shape[1] - first
            for i, logprob in enumerate(logprobs):
                others = [reward for j, reward in enumerate(rewards) if j != i]
                terms.append(-(rewards[i] - sum(others) / len(others)) * logprob)
    (sum(terms) / tokens).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert captions == 12
    assert score == pytest.approx(sum(scores)) and len(set(scores)) > 1
    assert divergence == pytest.approx(sum(divergences), abs=1e-4) and abs(divergence) > 0.1
    assert found.keys() == wanted.keys() and any("lora" in name for name in found) == (way == "lora")
    size = sum(gradient.square().sum() for gradient in wanted.values()).sqrt()
    assert size > 0.01
    for name, gradient in wanted.items():
        assert (found[name].to_dense() - gradient).norm() < 1e-5 * size, name


def test_the_model_before_the_stage_is_back_in_its_place_afterwards(start):
    model = MultimodalLLM.from_pretrained(start)
    train_only_(model, BOTH)
    optimizer = adamw(stage_groups(model, settings_of(), 0.0), 0.9, 0.95)
    keep_reference_(optimizer)
    p = model.multi_modal_projector.linear_1.bias
    p.data += 1
    assert torch.equal(optimizer.state[p]["reference"] + 1, p)


def test_a_placeholder_of_an_image_that_the_model_says_is_not_trained_on(world, start):
    model = MultimodalLLM.from_pretrained(start)
    sampler = CaptionSampler(model, None, RewardConfig(), count_some, max_length=512, bf16=False)
    image_id = model.config.image_token_id
    end = model.processor.tokenizer.id("<|im_end|>")
    answers = [Generated(ids, "", "stop", 1, end_id=end) for ids in ((7, image_id, 8), (image_id,), (9,))]
    assert [sampler._targets(answer) for answer in answers] == [[7], [], [9, end]]
    sample = load_samples(world.folder / "train.json", world.folder / "images")[0]
    question = read_questions(sample, model.processor, 512, model.processor.image_processor)[0]
    for said in (answers, answers[1:2] * 2):  # also where no caption has a target
        batch = sampler._batch([question], [said])
        factors, _ = sampler._factors([question], [said], None)
        batch = replace(batch, factors_M=torch.tensor(factors))
        assert accumulate_gradients(model.requires_grad_(True), [batch]).isfinite()
        assert len(factors) == (batch.labels_BT >= 0).sum()


# The reward


def answer(text: str, finish_reason: str = "stop") -> Generated:
    return Generated((), text, finish_reason, 1)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    rows = [
        {"image": "a.png", "captions": ["A red dog runs.", "A dog runs on grass."]},
        {"image": "b.png", "captions": ["Two cats sit on a mat."]},
    ]
    path = tmp_path_factory.mktemp("data") / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_samples(path)


def test_a_caption_that_stops_in_the_middle_scores_less_than_the_same_words_ended(captioned):
    reward = caption_reward(captioned, 0.0)
    ended, cut, other = reward(
        [answer("A red dog runs"), answer("A red dog runs", "length"), answer("Two cats")], captioned[0].references
    )
    assert ended > cut > other == 0
    assert reward([answer("two cats sit on a mat .")], captioned[2].references) == pytest.approx([10])


def test_bleu_4_is_added_with_its_weight(captioned):
    answers = [answer("a dog runs on grass"), answer("a red dog on grass")]
    plain, mixed = (caption_reward(captioned, weight)(answers, captioned[0].references) for weight in (0.0, 2.0))
    assert mixed[0] - plain[0] == pytest.approx(2.0, abs=1e-6)
    assert 0 < mixed[1] - plain[1] < 1.5


def test_samples_without_captions_are_refused(captioned):
    asked = replace(
        captioned[0], messages=(replace(captioned[0].messages[0], parts=("How many?",)), *captioned[0].messages[1:])
    )
    with pytest.raises(DataError, match=r"1 of 4 training samples have none.*model.pretrained=outputs"):
        caption_reward([*captioned, asked], 0.0)


# Whole runs


def say_hat(answers: list[Generated], references: tuple[str, ...]) -> list[float]:
    return [float("hat" in answer.text.split()) for answer in answers]


@pytest.mark.slow
def test_a_run_whose_reward_is_a_word_learns_to_say_it(world, start, tmp_path):
    config = stage3_config(world, start, tmp_path, kl_weight=0.0)
    config.training.save_steps, config.training.gradient_accumulation_steps = None, 1
    config.training.stage3.epochs = 4
    assert train(config, reward=say_hat) == 0
    rewards = [row["reward"] for row in read_metrics(directory_of(config)) if "reward" in row]
    assert len(rewards) == 40
    assert sum(rewards[:3]) / 3 < 0.8 and sum(rewards[-10:]) / 10 > 0.95
    last = [row for row in read_metrics(directory_of(config)) if "captions" in row][-1]
    assert all("hat" in caption["answer"] for caption in last["captions"])


@pytest.mark.slow
@pytest.mark.parametrize("use_lora", [False, True])
def test_a_resumed_stage_3_is_the_uninterrupted_one_bit_for_bit(world, start, tmp_path, use_lora):
    configs = [stage3_config(world, start, tmp_path / name) for name in ("whole", "cut")]
    for config in configs:
        config.model.use_lora = use_lora
    assert train(configs[0]) == 0
    for step in (1, 3):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        cut(configs[1], configs[0], step)
        assert train(configs[1], resume="auto") == 0
        assert numbers(configs[1]) == numbers(configs[0])
        mine, theirs = weights(configs[1]), weights(configs[0])
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert numbers(configs[0])[0][3] == pytest.approx(0, abs=1e-5)  # nothing has moved yet
    assert abs(numbers(configs[0])[4][3]) > 1e-3


def cut(config: ExperimentConfig, source: ExperimentConfig, step: int) -> None:
    """Make `config`'s run what `source`'s was after `step`."""
    shutil.copytree(directory_of(source), directory_of(config), symlinks=True)
    for checkpoint in disk.checkpoints(directory_of(config)):
        if disk.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_all_three_stages_follow_each_other_and_early_stop_ends_the_third(world, tmp_path):
    config = world.config(tmp_path, best_metric="cider", early_stop=2)
    config.training.stage3 = RewardConfig(epochs=9, learning_rate=1e-5, num_captions=2, max_new_tokens=3)
    assert train(config) == 0
    rows = read_metrics(directory_of(config))
    assert [row["stage"] for row in rows if "loss" in row] == [1] * 5 + [2] * 5 + [3] * 10
    config.training.early_stop = 0
    assert train(config, resume="auto") == 0
    assert len([row for row in read_metrics(directory_of(config)) if row["stage"] == 3 and "loss" in row]) == 45
    config.training.stage3.kl_weight = 0.0
    with pytest.raises(CheckpointError, match=r"cannot be resumed with another training.stage3.kl_weight"):
        train(config, resume="auto")


# The settings


def test_stage_3_chooses_the_best_model_by_cider():
    config, origins = resolve(None, {}, ["stage3.epochs=1"])
    assert config.training.best_metric == "cider"
    assert origins["training.best_metric"] == "implied by training.stage3: a reward raises the validation loss"
    with pytest.raises(ConfigError, match="best_metric=val_loss never chooses a model of stage 3"):
        resolve(None, {}, ["stage3.epochs=1", "best_metric=val_loss"])
    with pytest.raises(ConfigError, match="reshard_after_forward saves nothing in stage 3"):
        resolve(None, {}, ["stage3.epochs=1", "reshard_after_forward=true"])


def test_a_general_setting_is_that_of_stage_3_too():
    config, _ = resolve(
        None, {}, ["stage3.batch_size=7", "data.batch_size=4", "learning_rate=1e-4", "stage3.kl_weight=0"]
    )
    stage = config.stages()[2]
    assert (stage.batch_size, stage.learning_rate, stage.kl_weight, stage.epochs) == (4, 1e-4, 0.0, 0)
