"""Training, on towers so small that ten steps take a second."""

import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mmllm.commands import evaluate
from mmllm.config.schema import ExperimentConfig, TrainingConfig
from mmllm.data.batches import make_batch, read_rows
from mmllm.data.samples import load_samples
from mmllm.errors import CheckpointError, ConfigError, DataError, UserError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import read_metrics
from mmllm.runtime.distributed import ALONE, World
from mmllm.storage import checkpoint as disk
from mmllm.training.experiment import load_data, train
from mmllm.training.prepare import PART_OF, checkpoint_blocks_, train_only_
from mmllm.training.stage import stage_groups
from mmllm.training.step import accumulate_gradients, adamw, count_targets, learning_rate_at, update_
from mmllm.training.validation import sample_captions, validation_losses
from tiny_run import directory_of, weights, write_world

EVERY = ("projector", "language_model", "vision_tower")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole_run(world, tmp_path_factory):
    """Ten steps without interruption, each of them saved."""
    config = world.config(tmp_path_factory.mktemp("whole"), save_steps=1, keep_checkpoints=100)
    assert train(config) == 0
    return config


def new_model(world):
    return MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")


def batches_of(world, model, size):
    """The first eight samples, of different lengths, in micro-batches of `size`."""
    samples = load_samples(world.folder / "train.json", world.folder / "images")[:8]
    rows = [read_rows(sample, model.processor)[0] for sample in samples]
    return [make_batch(rows[i : i + size], model.processor) for i in range(0, 8, size)]


def gradients(model, batches, bf16=False):
    model.zero_grad()
    loss = accumulate_gradients(model, batches, bf16)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def numbers(config):
    """What a run computed in each step: everything of metrics.jsonl but the times."""
    timing = ("ms", "tokens_per_s", "images_per_s", "peak_bytes")
    rows = read_metrics(directory_of(config))
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


def assert_equal_runs(config, other):
    assert numbers(config) == numbers(other)
    mine, theirs = weights(config), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# The gradient


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_split_into_micro_batches_gives_the_same_gradient(world, size, dtype, tolerance):
    model = new_model(world).to(dtype)
    train_only_(model, [PART_OF[part] for part in EVERY])
    loss, whole = gradients(model, batches_of(world, model, 8))
    split_loss, split = gradients(model, batches_of(world, model, size))
    assert split.keys() == whole.keys()
    # without RoPE a key's bias adds the same to all scores of a query: its true gradient is zero, what is left is noise
    names = [n for n in whole if not (n.startswith("vision_tower") and n.endswith("k_proj.bias"))]
    worst = max(((split[name] - whole[name]).norm() / whole[name].norm()).item() for name in names)
    assert worst <= tolerance
    assert abs(split_loss - loss) <= 3e-6 * loss


def test_the_loss_is_the_mean_over_labelled_tokens_only(world):
    model = new_model(world)
    batches = batches_of(world, model, 8)
    loss, _ = gradients(model, batches)
    logits = model.logits(batches[0].ids_BT, batches[0].pixels_N3SS)[:, :-1].log_softmax(-1)
    labels = batches[0].labels_BT[:, 1:]
    losses = [-logits[b, t, labels[b, t]] for b, t in (labels != -100).nonzero().tolist()]
    assert len(losses) == count_targets(batches)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_step_without_a_target_moves_nothing_and_is_not_nan(world):
    model = new_model(world)
    batch = batches_of(world, model, 8)[0]
    batch.labels_BT.fill_(-100)
    loss, found = gradients(model, [batch])
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


def test_recomputed_blocks_give_the_same_gradient_bit_for_bit(world):
    model = new_model(world)
    plain_loss, plain = gradients(model, batches_of(world, model, 4))
    checkpoint_blocks_(model.language_model.model.layers)
    checkpoint_blocks_(model.vision_tower.vision_model.encoder.layers)
    loss, found = gradients(model, batches_of(world, model, 4))
    assert loss == plain_loss
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == []


def test_bfloat16_stays_near_float32_and_keeps_float32_weights(world):
    model = new_model(world)
    loss, plain = gradients(model, batches_of(world, model, 4))
    low_loss, low = gradients(model, batches_of(world, model, 4), bf16=True)
    assert low_loss == pytest.approx(loss, rel=2e-2)
    assert {gradient.dtype for gradient in low.values()} == {torch.float32}
    name = "multi_modal_projector.linear_2.weight"
    assert_close(low[name], plain[name], rtol=0, atol=0.1 * plain[name].abs().max().item())


def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(world):
    model = new_model(world).train()
    train_only_(model, ["multi_modal_projector"])
    _, found = gradients(model, batches_of(world, model, 4))
    assert {name.partition(".")[0] for name in found} == {"multi_modal_projector"}
    assert not model.vision_tower.training
    assert not model.language_model.training
    assert model.multi_modal_projector.training


def test_a_gradient_that_is_not_finite_moves_nothing(world):
    model = new_model(world)
    train_only_(model, ["multi_modal_projector"])
    stage = ExperimentConfig().stages()[0]
    optimizer = adamw(stage_groups(model, stage, 0.0), 0.9, 0.95)
    before = model.multi_modal_projector.linear_1.weight.clone()
    batch = batches_of(world, model, 8)[0]
    batch.pixels_N3SS[0] = float("inf")
    loss, norm = update_(
        model, optimizer, [batch], TrainingConfig(bf16=False), targets=9, world=World(torch.device("cpu"))
    )
    assert not (torch.tensor([loss, norm]).isfinite().all())
    assert torch.equal(model.multi_modal_projector.linear_1.weight, before)
    assert not optimizer.state
    assert model.multi_modal_projector.linear_1.weight.grad is None


# A whole run


def test_what_a_batch_holds_and_what_is_left_out_is_said_once(world, tmp_path, capsys):
    """Three long captions of the first image, which take a row each, and a conversation of which one exchange fits."""
    turns = [
        {"from": role, "value": text} for role, text in [("human", "what is it?"), ("gpt", "a cat on the mat")] * 9
    ]
    captions = {"image": "0.png", "captions": ["the thing over there on the mat " * 4 + end for end in "abc"]}
    (tmp_path / "train.json").write_text(json.dumps([captions, {"conversations": turns}]))
    config = world.config(tmp_path)
    model = new_model(world)
    config.data.train_data_path, config.data.val_data_path = str(tmp_path / "train.json"), None
    texts = [
        model.processor.encode(list(s.messages)) for s in load_samples(tmp_path / "train.json", world.folder / "images")
    ]
    config.data.max_length = max(len(encoded.ids) for encoded in texts[:3])
    notes = load_data(config, model, tmp_path, {}, ALONE).notes
    assert (
        "a sample is up to 3 texts of an image in up to 3 rows: a batch of 2 samples has up to 6 texts in 6 rows"
        in notes
    )
    (left_out,) = [note for note in notes if "are left out" in note]
    printed = capsys.readouterr().out
    assert "of 1 samples are left out" in left_out and all(printed.count(note) == 1 for note in notes)


def test_validation_images_are_looked_for_in_their_own_folder(world, tmp_path):
    shutil.copytree(world.folder / "images", tmp_path / "val_images")
    config = world.config(tmp_path)
    config.data.val_image_dir = str(tmp_path / "val_images")
    data = load_data(config, new_model(world), tmp_path, {}, ALONE)
    folders = [{sample.images[0].parent for sample in part} for part in (data.train, data.val)]
    assert folders == [{world.folder / "images"}, {tmp_path / "val_images"}]


def test_a_run_leaves_every_step_once_and_a_best_model_that_loads(whole_run):
    directory = directory_of(whole_run)
    rows = read_metrics(directory)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["stage"] for row in rows if "loss" in row] == [1] * 5 + [2] * 5
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10]
    assert all((directory / name).is_file() for name in ("run.json", "experiment.json", "loss.png", "report.md"))
    assert "- 20 samples to train on, 6 samples to validate." in (directory / "report.md").read_text()
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    assert disk.step_of((directory / "best_model").resolve()) == best["step"]
    assert MultimodalLLM.from_pretrained(directory / "best_model").processor is not None


def test_stage_1_moves_the_projector_alone_and_stage_2_the_language_model_too(world, whole_run):
    begin = new_model(world).state_dict()
    after = [
        load_file(directory_of(whole_run) / name / "model.safetensors")
        for name in ("checkpoint-epoch-1-step-5", "checkpoint-epoch-2-step-10")
    ]
    moved = [{n.partition(".")[0] for n in state if not torch.equal(state[n], begin[n])} for state in after]
    assert moved == [{"multi_modal_projector"}, {"multi_modal_projector", "language_model"}]


@pytest.mark.parametrize("step", [3, 5, 8], ids=["inside stage 1", "between the stages", "inside stage 2"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(world, whole_run, tmp_path, step):
    config = world.config(tmp_path, save_steps=1, keep_checkpoints=100)
    shutil.copytree(directory_of(whole_run), directory_of(config), symlinks=True)
    for checkpoint in disk.checkpoints(directory_of(config)):
        if disk.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    assert train(config, resume="auto") == 0
    assert_equal_runs(config, whole_run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw8bit"}, {"compile": True}], ids=str)
def test_a_run_on_a_gpu_takes_the_steps_of_one_on_a_cpu_and_goes_on_from_a_checkpoint(
    world, whole_run, tmp_path, settings
):
    config = world.config(tmp_path, save_steps=1, keep_checkpoints=100, **settings)
    config.device = "cuda"
    assert train(config) == 0
    mine, theirs = ([row["loss"] for row in numbers(c) if "loss" in row] for c in (config, whole_run))
    assert mine == pytest.approx(theirs, rel=0.02 if settings else 1e-3)
    for checkpoint in disk.checkpoints(directory_of(config)):
        if disk.step_of(checkpoint) > 3:
            shutil.rmtree(checkpoint)
    assert train(config, resume="auto") == 0
    assert [row["loss"] for row in numbers(config) if "loss" in row] == pytest.approx(mine, rel=1e-3)


def test_more_and_smaller_micro_batches_resume_the_same_run(world, whole_run, tmp_path, capsys):
    config = world.config(tmp_path, gradient_accumulation_steps=4)
    config.data.batch_size = 1
    checkpoint = directory_of(whole_run) / "checkpoint-epoch-1-step-3"
    assert train(config, resume=str(checkpoint)) == 0
    mine, theirs = ([row["loss"] for row in numbers(c) if "loss" in row] for c in (config, whole_run))
    assert mine == pytest.approx(theirs[3:], abs=1e-4)
    assert "changed: data.batch_size: 2 at the checkpoint, 1 now" in capsys.readouterr().out


def test_another_learning_rate_is_printed_and_holds_from_there_on(world, whole_run, tmp_path, capsys):
    config = world.config(tmp_path)
    config.training.stage2.learning_rate = 7e-4
    assert train(config, resume=str(directory_of(whole_run) / "checkpoint-epoch-1-step-5")) == 0
    printed = capsys.readouterr().out
    assert "changed: training.stage2.learning_rate: None at the checkpoint, 0.0007 now" in printed
    assert "stage 2: 5 steps" in printed and "parameters, with a new optimizer" in printed
    wanted = [learning_rate_at(step, 7e-4, round(config.training.warmup_ratio * 5), 5) for step in range(5)]
    assert [row["learning_rate"] for row in numbers(config) if "loss" in row] == pytest.approx(wanted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_and_saves_and_the_run_goes_on_from_there(world, whole_run, tmp_path, capsys, number):
    config = world.config(tmp_path)
    metrics = directory_of(config) / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    code = train(config)
    thread.join()
    assert code == 128 + number
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    saved = disk.step_of(disk.newest(directory_of(config)))
    assert 2 <= saved < 10
    assert len([row for row in numbers(config) if "loss" in row]) == saved
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().out
    assert train(config, resume="auto") == 0
    assert_equal_runs(config, whole_run)


def test_a_damaged_newest_checkpoint_is_passed_over_with_one_warning(world, whole_run, tmp_path, capsys):
    config = world.config(tmp_path, save_steps=1, keep_checkpoints=100)
    shutil.copytree(directory_of(whole_run), directory_of(config), symlinks=True)
    bad = directory_of(config) / "checkpoint-epoch-2-step-10"
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"checkpoint-epoch-2-step-10/model.safetensors: .* bytes"):
        train(config, resume=str(bad))
    assert train(config, resume="auto") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning") == 1
    assert "checkpoint-epoch-2-step-9: step 9, stage 2" in printed
    assert_equal_runs(config, whole_run)


def test_a_finished_run_has_nothing_left_to_resume(whole_run, capsys):
    before = (directory_of(whole_run) / "metrics.jsonl").read_text()
    assert train(whole_run, resume="auto") == 0
    assert "already at step 10 of 10" in capsys.readouterr().out
    assert (directory_of(whole_run) / "metrics.jsonl").read_text() == before


def test_more_epochs_continue_a_finished_run(world, whole_run, tmp_path, capsys):
    config = world.config(tmp_path)
    config.training.stage2.epochs = 2
    checkpoint = directory_of(whole_run) / "checkpoint-epoch-2-step-10"
    assert train(config, resume=str(checkpoint)) == 0
    assert [row["step"] for row in numbers(config) if "loss" in row] == list(range(11, 16))
    assert "changed: training.stage2.epochs: 1 at the checkpoint, 2 now" in capsys.readouterr().out


def test_a_run_is_never_written_over_unasked(world, whole_run, tmp_path):
    with pytest.raises(
        UserError, match=r"holds a run already \(checkpoint-epoch-2-step-10\).*--resume auto.*--overwrite"
    ):
        train(whole_run)
    config = world.config(tmp_path)
    old = directory_of(config) / "checkpoint-epoch-9-step-99"
    old.mkdir(parents=True)
    config.data.max_train_samples = 3
    with pytest.raises(DataError, match="3 training samples do not fill one step"):
        train(config, overwrite=True)
    assert old.is_dir()  # a start that is refused removes nothing
    config.data.max_train_samples = None
    config.training.stage2.epochs = 0
    assert train(config, overwrite=True) == 0
    assert [path.name for path in disk.checkpoints(directory_of(config))] == ["checkpoint-epoch-1-step-5"]


# What a resumed run may not change


def resumed(world, whole_run, tmp_path, change, **options):
    config = world.config(tmp_path)
    change(config)
    return train(config, resume=str(directory_of(whole_run) / "checkpoint-epoch-1-step-3"), **options)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("model.features", "pooled", "model.features: 'patch' at the checkpoint, 'pooled' now"),
        ("model.qwen", "other", "model.qwen: .*qwen' at the checkpoint, 'other' now"),
        ("seed", "7", "seed: 0 at the checkpoint, 7 now"),
        ("data.share_images", "false", "data.share_images: True at the checkpoint, False now"),
        ("data.batch_size", "3", r"samples of a step .*: 4 then, 6 now"),
        (
            "training.stage1.train",
            "projector,language_model",
            "training.stage1.train: .'projector',. at the checkpoint",
        ),
    ],
)
def test_another_model_or_order_is_refused_field_by_field(world, whole_run, tmp_path, name, value, words):
    with pytest.raises(CheckpointError, match=words):
        resumed(world, whole_run, tmp_path, lambda config: config.set_text(name, value))


def test_another_data_file_is_refused_unless_allowed(world, whole_run, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((world.folder / "train.json").read_text().replace("a cat", "a dog"))

    def change(config):
        config.data.train_data_path = str(other)

    with pytest.raises(DataError, match=r"other.json: not the file of the checkpoint any more.*--allow-data-change"):
        resumed(world, whole_run, tmp_path, change)
    assert resumed(world, whole_run, tmp_path, change, allow_data_change=True) == 0


def test_another_number_of_samples_is_refused(world, whole_run, tmp_path):
    def change(config):
        config.data.max_train_samples = 12

    with pytest.raises(DataError, match="12 samples are used, 20 were at the checkpoint"):
        resumed(world, whole_run, tmp_path, change)


def test_no_row_of_another_run_stays_in_a_directory_that_is_begun_from_elsewhere(world, whole_run, tmp_path):
    checkpoint = directory_of(whole_run) / "checkpoint-epoch-1-step-5"
    config = world.config(tmp_path)
    directory = directory_of(config)
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0, "stage": 1}\n')
    (directory / "run.json").write_text('{"starts": [{"command": "another"}]}')
    assert train(config, resume=str(checkpoint)) == 0
    assert [row["step"] for row in read_metrics(directory) if "loss" in row] == [6, 7, 8, 9, 10]
    assert len(json.loads((directory / "run.json").read_text())["starts"]) == 1


def test_an_evaluation_of_a_runs_model_stands_in_its_report_until_the_run_is_begun_anew(world, whole_run, tmp_path):
    config = world.config(tmp_path)
    directory = directory_of(config)
    shutil.copytree(directory_of(whole_run), directory, symlinks=True)
    data = ["--data", config.data.val_data_path, "--image-dir", config.data.image_dir, "--max-new-tokens", "4"]
    evaluate.main(["--model", str(directory / "best_model"), "--device", "cpu", *data])
    report = (directory / "report.md").read_text()
    name = (directory / "best_model").resolve().name
    assert f"## Scores\n\n`{config.data.val_data_path}`, answered by {name}:\n\n| captions | bleu_1 |" in report
    assert re.search(r"\n\| true images \| \d\.\d{3} \|.*\n\| shuffled images \| \d\.\d{3} \|", report)
    assert train(config, overwrite=True) == 0
    assert "## Scores" not in (directory / "report.md").read_text()


def test_a_checkpoint_knows_how_many_tokens_were_read(whole_run):
    first, last = (
        disk.read_state(directory_of(whole_run) / f"checkpoint-epoch-{n}-step-{5 * n}")["tokens"] for n in (1, 2)
    )
    assert 0 < first < last


def test_the_model_of_an_earlier_run_can_be_trained_on(world, whole_run, tmp_path):
    config = world.config(tmp_path)
    config.model.pretrained = str(directory_of(whole_run) / "best_model")
    config.training.stage1.epochs = 0
    assert train(config) == 0
    assert [row["stage"] for row in numbers(config) if "loss" in row] == [2] * 5
    config.experiment_name, config.model.features = "other", "pooled"
    with pytest.raises(ConfigError, match="model.features is 'pooled', but .*best_model has 'patch'"):
        train(config, {"model.features": "command line"})


# Validation


def test_validation_is_the_mean_loss_of_all_samples_whatever_the_batch_size(world, tmp_path):
    model, config = new_model(world), world.config(tmp_path)
    samples = load_samples(config.data.val_data_path, config.data.image_dir)
    rows = [read_rows(sample, model.processor)[0] for sample in samples]
    loss_sum, targets = model(*vars(make_batch(rows, model.processor)).values())
    scores = [validation_losses(model, samples, config, size) for size in (1, 4, 6)]
    for score in scores:
        assert score["val_loss"] == pytest.approx((loss_sum / targets).item(), abs=1e-5)
    assert scores[0]["val_loss_shuffled"] is None  # no second image to exchange
    assert abs(scores[2]["val_loss_shuffled"] - scores[2]["val_loss"]) > 1e-3


def test_sampled_captions_stand_beside_question_and_reference(world, tmp_path):
    samples = load_samples(world.folder / "val.json", world.folder / "images")[:2]
    captions = sample_captions(new_model(world), samples)
    assert [(c["id"], c["prompt"], c["reference"]) for c in captions] == [
        ("s20", "Describe this image.", "a cat"),
        ("s21", "Describe this image.", "the thing over there"),
    ]
    assert all(isinstance(c["answer"], str) for c in captions)


def test_a_run_on_a_part_of_the_samples_says_what_its_quality_means(world, tmp_path, capsys):
    config = world.config(tmp_path)
    config.data.max_train_samples, config.data.val_data_path = 4, None
    config.training.stage1.epochs = 0
    assert train(config) == 0
    said = capsys.readouterr().out
    assert (
        "data.max_train_samples=4: this run shows that the data can be trained on; how good its model answers says"
        in said
    )
