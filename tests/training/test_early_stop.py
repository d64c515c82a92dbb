"""The last stage ends where the validation loss stops falling, and a resumed run agrees."""

import pytest

from mmllm.config import load
from mmllm.config.schema import ExperimentConfig
from mmllm.config.sources import resolve
from mmllm.errors import ConfigError
from mmllm.storage import checkpoint as disk
from mmllm.training import stage
from mmllm.training.experiment import train
from tiny_run import directory_of, weights, write_world


def run_with_losses(monkeypatch, config: ExperimentConfig, losses: list[float], **how) -> int:
    """Train with these validation losses in place of those computed."""
    found = iter(losses)
    scores = lambda *arguments, **named: {"val_loss": next(found), "val_loss_shuffled": None}  # noqa: E731
    monkeypatch.setattr(stage, "validation_losses", scores)
    return train(config, **how)


@pytest.mark.slow
def test_a_run_ends_after_the_given_number_of_checkpoints_without_a_lower_loss(tmp_path, monkeypatch, capsys):
    config = write_world(tmp_path).config(tmp_path / "out", early_stop=2)
    config.training.stage2.epochs = 6
    # stage 1 never ends early, and its checkpoints do not count
    assert run_with_losses(monkeypatch, config, [5.0, 4.0, 3.0, 3.5, 3.1]) == 0
    out = capsys.readouterr().out
    assert "early stop: the last 2 checkpoints did not lower the validation loss" in out
    assert (directory_of(config) / disk.BEST).resolve().name == "checkpoint-epoch-3-step-15"
    assert disk.checkpoints(directory_of(config))[-1].name == "checkpoint-epoch-5-step-25"
    assert train(config, resume="auto") == 0
    assert "already at step 25 of 35; nothing is left to train" in capsys.readouterr().out
    config.training.early_stop = 3  # a longer patience goes on
    assert run_with_losses(monkeypatch, config, [3.3, 2.0], resume="auto") == 0
    assert disk.checkpoints(directory_of(config))[-1].name == "checkpoint-epoch-6-step-30"


@pytest.mark.slow
def test_a_run_that_was_stopped_in_between_ends_at_the_same_step(tmp_path, monkeypatch):
    world, losses = write_world(tmp_path), [5.0, 3.0, 4.0, 3.5]
    whole = world.config(tmp_path / "whole", early_stop=2, keep_checkpoints=9)
    whole.training.stage2.epochs = 6
    assert run_with_losses(monkeypatch, whole, losses) == 0
    expected = weights(whole)
    third = next(path for path in disk.checkpoints(directory_of(whole)) if disk.step_of(path) == 15)
    assert run_with_losses(monkeypatch, whole, losses[3:], resume=str(third)) == 0
    assert disk.checkpoints(directory_of(whole))[-1].name == "checkpoint-epoch-4-step-20"
    assert all((weights(whole)[name] == expected[name]).all() for name in expected)


def test_early_stop_without_validation_is_refused_with_what_to_set():
    with pytest.raises(
        ConfigError, match="early_stop needs a validation: set data.val_data_path, or data.val_fraction"
    ):
        resolve("own", {}, ["data.train_data_path=train.json"])
    assert load("own").training.early_stop == 2
