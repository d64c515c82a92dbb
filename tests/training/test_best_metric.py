"""The metric that chooses the best model: what it is measured on, its value, and the checkpoint that wins."""

import pytest

from mmllm.config.schema import ExperimentConfig, TrainingConfig
from mmllm.data.chat import Message
from mmllm.data.samples import Sample, load_samples, share_images
from mmllm.errors import UserError
from mmllm.evaluation.captions import caption_scores
from mmllm.evaluation.tasks import Task
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import read_metrics
from mmllm.storage import checkpoint as disk
from mmllm.training import stage
from mmllm.training.experiment import train
from mmllm.training.run import best_of, better
from mmllm.training.validation import check_metric, generated_answers, generated_metric, metric_score, metric_tasks
from tiny_run import break_image, directory_of, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def question(*references):
    return Task("1", (), (), references, "", is_caption=False)


def test_accuracy_is_the_official_one_for_several_people_and_a_match_for_one():
    tasks = [question("red", "red", "red", "blue"), question("Two.")]
    assert metric_score("vqa", tasks, ["blue ", "2"]) == pytest.approx((0.25 + 1) / 2)  # 0.25: one of four agrees
    assert metric_score("vqa", tasks, ["red", None]) == 0.75  # an image that cannot be read is left out
    assert metric_score("vqa", tasks, [None, None]) is None


def test_cider_is_that_of_the_evaluation():
    references = (("a cat sits here", "the cat"), ("two dogs run",), ("a red car",))
    tasks = [Task("", (), (), texts, "", is_caption=True) for texts in references]
    answers = ["a cat sits here", "two dogs", "a tree"]
    assert metric_score("cider", tasks, answers) == caption_scores(answers, references)["cider"] > 0.1


def sample(name, asked, answer):
    messages = (Message("user", (asked,)), Message("assistant", (answer,)))
    return Sample(name, (), messages, (answer,), kind="caption" if asked == "Caption:" else "")


def test_captions_or_questions_of_the_first_samples_are_asked():
    samples = [sample("1", "Caption:", "a cat"), sample("2", "Why?", "so"), sample("3", "Where?", "there")]
    asked = {
        metric: [task.references[0] for task in metric_tasks(samples, TrainingConfig(best_metric=metric))]
        for metric in ("val_loss", "cider", "vqa")
    }
    assert asked == {"val_loss": [], "cider": ["a cat"], "vqa": ["so", "there"]}
    two = TrainingConfig(best_metric="cider", num_metric_samples=1)
    assert [task.references for task in metric_tasks(samples[1:], two)] == [("so",)]  # no caption: all are


def test_the_captions_of_an_image_are_the_references_of_one_task(world):
    first = load_samples(world.folder / "val.json", world.folder / "images")[0]
    samples = share_images([first, Sample("again", first.images, first.messages, ("a tiger",))])
    (task,) = metric_tasks(samples, TrainingConfig(best_metric="cider"))
    assert task.references == ("a cat", "a tiger")


def test_references_without_a_word_are_refused_before_the_first_step():
    training = TrainingConfig(best_metric="cider")
    check_metric([sample("1", "Caption:", "a cat")], training)
    with pytest.raises(UserError, match="no reference holds a word"):
        check_metric([sample("1", "Caption:", "...")], training)


def test_answers_end_with_a_signal_and_pass_over_images_that_cannot_be_read(tmp_path, capsys):
    world = write_world(tmp_path)
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    break_image(world.folder / "images" / "22.png")
    samples = load_samples(world.folder / "val.json", world.folder / "images")
    tasks = metric_tasks(samples, TrainingConfig(best_metric="cider"))
    answers = generated_answers(model, tasks, slots=2)
    assert [answer is None for answer in answers] == [False, False, True, False, False, False]
    assert "warning: sample s22 is left out: " in capsys.readouterr().err
    assert answers == generated_answers(model, tasks, slots=4)
    calls = iter([False, False, *[True] * 9])  # a stopped run calls the model a few times more, not for every sample
    assert generated_answers(model, tasks, lambda: next(calls), slots=1)[1:] == [None] * 5
    assert generated_metric(model, samples, TrainingConfig(best_metric="cider"), 2, lambda: True) == {}


@pytest.mark.parametrize(
    "best, scores, metric, wins",
    [
        (None, {"val_loss": 2.0}, "val_loss", True),
        ({"val_loss": 2.0}, {"val_loss": 1.9}, "val_loss", True),
        ({"val_loss": 2.0}, {"val_loss": 2.0}, "val_loss", False),
        (None, {"val_loss": float("nan")}, "val_loss", False),
        ({"val_loss": 2.0, "cider": 0.5}, {"val_loss": 3.0, "cider": 0.6}, "cider", True),
        ({"val_loss": 2.0, "cider": 0.5}, {"val_loss": 1.0, "cider": 0.4}, "cider", False),
        ({"val_loss": 2.0, "cider": 0.0}, {"val_loss": 1.0, "cider": 0.0}, "cider", True),
        ({"val_loss": 2.0, "cider": 0.5}, {"val_loss": 1.0, "cider": None}, "cider", False),
        ({"val_loss": 2.0}, {"val_loss": 3.0, "vqa": 0.1}, "vqa", True),  # the first of this metric
        ({"val_loss": 2.0, "vqa": 0.1}, {"val_loss": 1.0}, "val_loss", True),
    ],
)
def test_the_lower_loss_or_the_higher_metric_is_better(best, scores, metric, wins):
    best = best and {"name": "old"} | best
    found = better(best, "new", scores, metric)
    assert found == ({"name": "new"} | scores if wins else best)


def test_the_best_of_another_number_of_samples_is_not_comparable(tmp_path):
    (tmp_path / "a").mkdir()
    best = {"name": "a", "val_loss": 2.0, "cider": 0.5}
    config = ExperimentConfig()
    state = {"best": best, "data_sha256": {}, "config": config.to_dict()}
    state["config"]["training"]["num_metric_samples"] = 8
    assert best_of(config, tmp_path, state, {}) == best
    config.data.max_val_samples = 100
    assert best_of(config, tmp_path, state, {}) is None
    config.data.max_val_samples = None
    config.training.best_metric = "cider"
    assert best_of(config, tmp_path, state, {}) is None
    config.training.num_metric_samples = 8
    assert best_of(config, tmp_path, state, {}) == best
    del state["config"]["training"]["num_metric_samples"]  # of a run before there was such a setting
    assert best_of(config, tmp_path, state, {}) is None


def test_the_model_with_the_highest_cider_is_the_best_whatever_its_loss(world, tmp_path, monkeypatch, capsys):
    ciders = iter([0.5, 0.25])
    losses = iter([2.0, 1.0])
    monkeypatch.setattr(stage, "generated_metric", lambda *_, **__: {"cider": next(ciders)})
    monkeypatch.setattr(
        stage, "validation_losses", lambda *_, **__: {"val_loss": next(losses), "val_loss_shuffled": None}
    )
    config = world.config(tmp_path, best_metric="cider", num_sample_captions=0)
    assert train(config) == 0
    directory = directory_of(config)
    assert disk.step_of((directory / "best_model").resolve()) == 5
    state = disk.read_state(directory / "checkpoint-epoch-2-step-10")
    assert state["best"] == {"name": "checkpoint-epoch-1-step-5", "val_loss": 2.0, "cider": 0.5}
    said = capsys.readouterr().out
    assert "validation at step 5: loss 2.0000 | CIDEr 0.5000 | " in said
    assert "-> checkpoint-epoch-1-step-5, validation loss 2.0000, CIDEr 0.5000" in said
    assert "Best validation CIDEr: 0.5000, at step 5." in (directory / "report.md").read_text()


def test_a_run_goes_on_with_another_metric_and_measures_it_by_generating(world, tmp_path):
    config = world.config(tmp_path)
    config.training.stage2.epochs = 0
    assert train(config) == 0
    config.training.stage2.epochs, config.training.best_metric = 1, "vqa"
    assert train(config, resume="auto") == 0
    directory = directory_of(config)
    first, second = [row for row in read_metrics(directory) if "val_loss" in row]
    best = disk.read_state(disk.newest(directory))["best"]
    assert best == {"name": "checkpoint-epoch-2-step-10", "val_loss": second["val_loss"], "vqa": second["vqa"]}
    model = MultimodalLLM.from_pretrained(directory / "best_model")
    samples = load_samples(config.data.val_data_path, config.data.image_dir)
    assert generated_metric(model, samples, config.training, slots=4) == {"vqa": second["vqa"]}
    assert "vqa" not in first


def test_a_run_ends_early_by_its_metric_whatever_its_loss(world, tmp_path, monkeypatch, capsys):
    accuracies, losses = iter([0.1, 0.5, 0.4]), iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(stage, "generated_metric", lambda *_, **__: {"vqa": next(accuracies)})
    monkeypatch.setattr(
        stage, "validation_losses", lambda *_, **__: {"val_loss": next(losses), "val_loss_shuffled": None}
    )
    config = world.config(tmp_path, best_metric="vqa", early_stop=1, num_sample_captions=0)
    config.training.stage2.epochs = 9
    assert train(config) == 0
    assert disk.step_of(disk.newest(directory_of(config))) == 15
    assert "the last 1 checkpoints did not raise the VQA accuracy of the validation" in capsys.readouterr().out
