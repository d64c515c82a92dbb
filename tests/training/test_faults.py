"""Runs in which something is wrong: with the data, the numbers, the disk, or the moment."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmllm.data.order import sample_order
from mmllm.errors import CheckpointError, ConfigError, DataError, RunError, UserError
from mmllm.reporting.metrics import read_metrics
from mmllm.runtime.files import locked
from mmllm.storage import checkpoint as disk
from mmllm.training import stage
from mmllm.training.experiment import train
from mmllm.training.resume import find_checkpoint
from tiny_run import break_image, directory_of, poison, weights, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A world whose language model answers NaN to the digit 7, which one training sample asks about."""
    return poison(write_world(tmp_path_factory.mktemp("poisoned"), tie_word_embeddings=False), 13)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(poisoned, tmp_path):
    config = poisoned.config(tmp_path, save_steps=1, keep_checkpoints=100)
    words = (
        r"step (\d): loss nan, gradient norm nan, with the samples (s\d+, )*s13(,|;).* Last checkpoint: (\S+)\. Look"
    )
    with pytest.raises(RunError, match=words) as caught:
        train(config)
    step, *_, last = re.search(words, str(caught.value)).groups()
    assert last == ("none" if step == "1" else f"checkpoint-epoch-1-step-{int(step) - 1}")
    for checkpoint in disk.checkpoints(directory_of(config)):
        tensors = load_file(checkpoint / "model.safetensors")
        assert all(tensors[n].isfinite().all() for n in tensors if n.startswith("multi_modal_projector"))
    assert all(torch.tensor(row["loss"]).isfinite() for row in read_metrics(directory_of(config)) if "loss" in row)


def test_a_bad_step_may_be_skipped_when_the_settings_say_so(poisoned, tmp_path, capsys):
    config = poisoned.config(tmp_path, max_skipped_steps=1)
    config.data.val_data_path = None
    config.training.stage2.epochs = 0
    assert train(config) == 0
    rows = read_metrics(directory_of(config))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert sum("left_out" in row for row in rows) == 1
    assert weights(config)["multi_modal_projector.linear_1.weight"].isfinite().all()
    assert capsys.readouterr().out.count("; skipped") == 1


def test_one_bad_step_more_than_allowed_in_a_row_ends_the_run(poisoned, tmp_path, monkeypatch):
    update = stage.update_
    monkeypatch.setattr(stage, "update_", lambda *arguments: (float("nan"), update(*arguments)[1]))
    with pytest.raises(RunError, match="step 3: loss nan"):
        train(poisoned.config(tmp_path, max_skipped_steps=2))


def test_one_failed_save_is_tolerated_and_the_next_one_ends_the_run(world, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, 10, usage.free, 10, 10])  # at the start, and at each checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    config = world.config(tmp_path, save_steps=1)
    with pytest.raises(RunError, match="no space left on"):
        train(config)
    assert [disk.step_of(path) for path in disk.checkpoints(directory_of(config))] == [2]
    assert capsys.readouterr().out.count("warning: no space left") == 2
    assert [row["step"] for row in read_metrics(directory_of(config))] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_disk_too_small_for_the_checkpoints_is_refused_before_the_first_step(world, tmp_path, monkeypatch):
    """Room is needed for two that are kept, the best one, and the one being written; what an old run holds counts."""
    usage, config = shutil.disk_usage(tmp_path), world.config(tmp_path, save_steps=1)
    assert train(config) == 0
    size = sum(path.stat().st_size for path in disk.newest(directory_of(config)).rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(4.1 * size)))
    other = world.config(tmp_path / "other", save_steps=1)
    with pytest.raises(
        UserError, match="too little space: up to 4 checkpoints of 0.0 GB need .* lower training.keep_checkpoints"
    ):
        train(other)
    assert read_metrics(directory_of(other)) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(2.3 * size)))
    assert train(config, overwrite=True) == 0


def test_too_few_samples_for_a_step_are_refused(world, tmp_path):
    config = world.config(tmp_path, gradient_accumulation_steps=11)
    with pytest.raises(DataError, match="20 training samples do not fill one step of 2 x 11"):
        train(config)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_data_file_is_named_before_anything_is_made(world, tmp_path, split):
    config = world.config(tmp_path)
    setattr(config.data, f"{split}_data_path", "no/such.json")
    with pytest.raises(DataError, match=rf"no/such.json: cannot be read .*; it is data.{split}_data_path"):
        train(config)
    assert not directory_of(config).exists()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("training.stage2.train", (), "training.stage2.train is empty"),
        ("training.stage1.epochs", 0, "all stages have 0 epochs"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(world, tmp_path, name, value, words):
    config = world.config(tmp_path)
    if value == 0:
        config.training.stage2.epochs = 0
    section, _, last = name.rpartition(".")
    setattr(config.get(section), last, value)
    with pytest.raises(ConfigError, match=words):
        train(config)


def test_an_image_that_cannot_be_decoded_in_the_middle_of_a_run_is_replaced_and_listed(tmp_path, capsys):
    world = write_world(tmp_path)
    config = world.config(tmp_path / "out")
    config.data.bad_samples, config.data.max_bad_fraction = "skip", 0.1
    break_image(world.folder / "images" / "3.png")
    assert train(config) == 0
    rows = [json.loads(line) for line in (directory_of(config) / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["index"], row["file"]) for row in rows] == [(3, "s3")]
    assert "warning: sample 3 (s3) is replaced by the next one" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_image_ends_the_run_with_its_steps_saved_and_the_run_can_go_on_without_it(tmp_path):
    world = write_world(tmp_path)
    index = sample_order(20, 1, 0)[9]  # of the third step
    break_image(world.folder / "images" / f"{index}.png")
    config, other = world.config(tmp_path / "out"), world.config(tmp_path / "skipped from the start")
    words = (
        rf"\(s{index}\): .*broken or cut off.*allow 0 such samples. Saved .*step-2: mend .*--resume auto.*samples=skip"
    )
    with pytest.raises(DataError, match=words):
        train(config)
    assert [path.name for path in disk.checkpoints(directory_of(config))] == ["checkpoint-epoch-1-step-2"]
    for each in (config, other):
        each.data.bad_samples, each.data.max_bad_fraction = "skip", 0.1
        assert train(each, resume="auto") == 0
    mine, theirs = weights(config), weights(other)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_a_broken_image_of_the_validation_ends_the_run_with_its_steps_saved_or_is_replaced(tmp_path, capsys):
    world = write_world(tmp_path)
    config = world.config(tmp_path / "out")
    break_image(world.folder / "images" / "22.png")
    with pytest.raises(
        DataError, match=r"sample \d \(s22\): .*22.png: broken.* Saved .*checkpoint-epoch-1-step-5: mend"
    ):
        train(config)
    config.data.bad_samples, config.data.max_bad_fraction = "skip", 0.2
    assert train(config, resume="auto") == 0
    assert [row["step"] for row in read_metrics(directory_of(config)) if "val_loss" in row] == [5, 10]
    said = capsys.readouterr().err
    assert re.search(r"warning: sample \d \(s22\) is replaced by the next one: .*22.png: broken", said)


def test_images_that_the_cache_finds_broken_are_listed_before_the_first_step(tmp_path):
    world = write_world(tmp_path)
    config = world.config(tmp_path / "out")
    config.data.cache_features = True
    break_image(world.folder / "images" / "3.png")
    with pytest.raises(
        DataError, match=r"1 of 20 samples are bad; fix those listed in .*bad_samples=skip, which leaves"
    ):
        train(config)
    assert read_metrics(directory_of(config)) == []
    config.data.bad_samples = "skip"
    with pytest.raises(
        DataError, match=r"more than data.max_bad_fraction=0.01 allows; they are listed in \S+\. The first"
    ):
        train(config)
    rows = [json.loads(line) for line in (directory_of(config) / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["index"], Path(row["file"]).name) for row in rows] == [(3, "3.png")]
    config.data.max_bad_fraction = 0.1
    assert train(config) == 0


def test_a_validation_that_is_not_a_number_is_never_the_best(world, tmp_path, monkeypatch):
    losses = iter([float("nan"), 5.0])
    monkeypatch.setattr(
        stage, "validation_losses", lambda *_, **__: {"val_loss": next(losses), "val_loss_shuffled": None}
    )
    config = world.config(tmp_path)
    assert train(config) == 0
    assert disk.step_of((directory_of(config) / "best_model").resolve()) == 10


def test_a_run_needs_a_data_file(world, tmp_path):
    config = world.config(tmp_path)
    config.data.train_data_path = None
    with pytest.raises(ConfigError, match="data.train_data_path is not set"):
        train(config)


def test_an_output_directory_that_cannot_be_made_is_named(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*; choose another output_dir"):
        train(world.config(tmp_path / "file"))


def test_a_second_run_of_the_same_name_is_refused_and_removes_nothing_of_the_first(world, tmp_path):
    config = world.config(tmp_path)
    half_written = directory_of(config) / ".checkpoint-epoch-1-step-5.tmp-7"
    half_written.mkdir(parents=True)
    with locked(directory_of(config)):
        for options in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(
                UserError, match=r"another run is writing there \(process \d+ on .*choose another exper"
            ):
                train(config, **options)
    assert half_written.is_dir()


def test_a_run_whose_checkpoints_are_gone_says_so(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="holds no checkpoint; begin the run anew, without --resume"):
        find_checkpoint(tmp_path / "other", str(tmp_path), overwrite=False)
    assert find_checkpoint(tmp_path, "auto", overwrite=False) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_checkpoint(tmp_path, "auto", overwrite=False) is None
    assert capsys.readouterr().out == (
        f"nothing to resume in {tmp_path}: a new run begins\n"
        f"nothing to resume in {tmp_path}, whose checkpoints are gone; its logs are replaced: a new run begins\n"
    )
    (tmp_path / "checkpoint-epoch-1-step-5").mkdir()
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole; begin the run anew"):
        find_checkpoint(tmp_path / "other", str(tmp_path), overwrite=False)


def test_a_tilde_in_output_dir_is_the_home_folder(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = world.config("~/runs")
    config.training.stage2.epochs = 0
    assert train(config) == 0
    assert (tmp_path / "runs" / "tiny" / "best_model").exists() and not (tmp_path / "~").exists()
