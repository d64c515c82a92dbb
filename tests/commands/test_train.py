"""train.py as it is typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

from mmllm.commands import train
from mmllm.config import ExperimentConfig, load
from mmllm.errors import CheckpointError, ConfigError, DataError, UserError
from mmllm.layers.quantized import count_weights
from mmllm.models.qwen import Qwen2
from mmllm.runtime.device import choose_device
from mmllm.storage import checkpoint as disk
from mmllm.training.data_plan import plan_data
from mmllm.training.dry_run import PUBLISHED_QWEN, architecture, describe
from mmllm.training.prepare import train_only_
from mmllm.training.step import step_flops
from official import write_qwen
from tiny_run import write_world

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Arguments


@pytest.mark.parametrize(
    "arguments, config, settings",
    [
        (["configs/full.py", "data.batch_size=8"], "configs/full.py", ["data.batch_size=8"]),
        (["data.batch_size=8", "--resume", "auto", "configs/full.py"], "configs/full.py", ["data.batch_size=8"]),
        (["--config", "my.json", "seed=1"], "my.json", ["seed=1"]),
        (["debug", "seed=1"], "debug", ["seed=1"]),
        (["--debug", "seed=1"], "debug", ["seed=1"]),
        (["--small-scale"], "small", []),
        ([], None, []),
    ],
)
def test_a_configuration_may_be_named_in_every_known_way(arguments, config, settings):
    options = train.parse(arguments)
    assert (options.config, options.settings) == (config, settings)


def test_two_configurations_are_one_too_many(capsys):
    with pytest.raises(SystemExit) as exit:
        train.parse(["configs/full.py", "--debug"])
    assert exit.value.code == 2
    assert "one configuration, please, not 2: configs/full.py" in capsys.readouterr().err


def test_a_bare_resume_takes_the_configuration_of_the_checkpoint(tmp_path):
    (tmp_path / "training").mkdir()
    ExperimentConfig().save(tmp_path / "training" / "experiment.json")
    assert train.configuration_of(tmp_path) == tmp_path / "training" / "experiment.json"
    with pytest.raises(ConfigError, match="elsewhere: no such run; name a run, one of its checkpoints"):
        train.configuration_of(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="elsewhere: holds no experiment.json, so it is no run"):
        train.configuration_of(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "name, value, missing",
    [
        ("train_data_path", "no/such.json", "no/such.json"),
        ("train_data_path", "{here}/a.json, no.json", "no.json"),
        ("val_data_path", "no/such.json", "no/such.json"),
        ("image_dir", "no/images", "no/images"),
    ],
)
def test_a_path_that_does_not_exist_is_refused_before_torch_is_imported(tmp_path, monkeypatch, name, value, missing):
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setitem(sys.modules, "mmllm.training.experiment", None)  # its import fails
    settings = [f"data.train_data_path={tmp_path / 'a.json'}", f"data.{name}={value.format(here=tmp_path)}"]
    with pytest.raises(DataError, match=f"^{missing}: no such file or folder; it is data.{name}$"):
        train.main(["debug", *settings])


# The dry run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, total, trainable", [("full", "582,981,504", "495,525,504"), ("pooled", "583,145,344", "495,296,128")]
)
def test_a_dry_run_counts_the_published_model_without_having_it(name, total, trainable):
    config = load(name)
    config.set_text(
        "gradient_accumulation_steps", "1"
    )  # half the work: memory is simulated for up to two micro-batches
    lines = describe(config)
    row = next(line.split() for line in lines if line.startswith("total"))
    assert (row[1], row[3]) == (total, trainable)


def test_a_dry_run_reads_the_sizes_of_local_towers_and_counts_the_steps(tmp_path):
    world = write_world(tmp_path)
    config = world.config(tmp_path / "out")
    config.training.stage2.epochs = 3
    lines = describe(config)
    tokenizer = tmp_path / "qwen" / "tokenizer.json"
    assert lines[-3] == f"20 samples of at most 107 tokens, 15 targets a sample (counted by {tokenizer})"
    assert next(line.split() for line in lines if line.startswith("total")) == ["total", "555,712", "12,416", "131,776"]
    memory = r"about (0\.\d|1\.\d) GB at most, for rows of 107 tokens \(the process \1"  # 1: a CUDA build of torch
    assert re.match(r"stage 1: 1 epochs, 5 steps of 4 samples \(2 x 2\); " + memory, lines[-2])
    assert re.match(r"stage 2: 3 epochs, 15 steps of 4 samples \(2 x 2\); " + memory, lines[-1])
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_planned_from_its_config_alone(tmp_path, monkeypatch):
    def download(source, revision, allow_patterns):
        assert source == "somebody/else" and not any("safetensors" in pattern for pattern in allow_patterns)
        return str(write_qwen(tmp_path / "qwen"))

    config = ExperimentConfig()
    config.model.qwen = "somebody/else"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert architecture(config.model).text.hidden_size == 64

    def offline(source, revision, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="somebody/else: not a folder here, .*no network"):
        architecture(config.model)
    config.model.qwen = "./else"
    with pytest.raises(CheckpointError, match="./else: no such folder"):
        architecture(config.model)


@pytest.mark.parametrize(
    "name, parameters", [("0.5B", 494_032_768), ("1.5B-Instruct", 1_543_714_304), ("3B", 3_085_938_688)]
)
def test_the_published_sizes_are_known_without_the_hub(name, parameters):
    with torch.device("meta"):
        model = Qwen2(PUBLISHED_QWEN[f"Qwen/Qwen2.5-{name}"])
    assert count_weights(model) == parameters


def planned(tmp_path, device: str, *settings: str) -> list[str]:
    config = write_world(tmp_path).config(tmp_path / "out")
    for setting in (f"device={device}", *settings):
        config.set_text(*setting.split("="))
    return describe(config)


def test_a_card_that_is_not_here_can_be_planned_for(tmp_path):
    *_, stage_1, fits, stage_2, fits_too = planned(tmp_path / "fits", "cuda:24GB")
    assert fits == fits_too == "  fits a card of 24 GB (23.2 GB usable)"
    assert "weights" not in stage_1 and "about 0.1 GB at most" in stage_2
    if not torch.cuda.is_available():
        assert planned(tmp_path / "unknown", "cuda")[-1].startswith("no CUDA card is here; device=cuda:24GB says")
    with pytest.raises(UserError, match="a size, as in cuda:24GB, is for --dry-run"):
        choose_device("cuda:24GB")


@pytest.mark.slow
def test_the_first_single_change_that_makes_a_stage_fit_is_named(tmp_path):
    """0.12 GB: rows of 480 tokens do not fit in batches of 32."""
    lines = planned(tmp_path, "cuda:0.12GB", "data.batch_size=32", "data.max_length=480", "data.train_data_path=none")
    assert lines[-1].startswith("  does not fit a card of 0.12 GB (0.1 GB usable); data.batch_size=")
    assert lines[-1].endswith(" GB (the gradient is the same)")
    none = planned(tmp_path / "none", "cuda:0.01GB")[-1]
    assert ", nor with one change; neither do all of them together: 0.1 GB with data.batch_size=1 " in none
    assert none.endswith("training.optimizer=adamw8bit model.use_lora=true model.load_in_8bit=true")


def test_too_little_data_is_named_with_the_settings_for_it(tmp_path):
    lines = planned(tmp_path, "cpu", "data.batch_size=8", "training.gradient_accumulation_steps=4")
    assert "1 epochs, 0 steps of 32 samples (8 x 4)" in lines[-4]
    advice = "data.batch_size=2 training.gradient_accumulation_steps=1"
    assert lines[-1] == f"  too little data for one step: set {advice}"


def test_without_a_tokenizer_lengths_are_estimated_and_bad_samples_do_not_count(tmp_path):
    world = write_world(tmp_path)
    (world.folder / "qwen" / "tokenizer.json").unlink()
    config = world.config(tmp_path / "out")
    records = json.loads((world.folder / "train.json").read_text()) + [{"image": "1.png", "text": ""}]
    (world.folder / "train.json").write_text(json.dumps(records))
    plan = plan_data(config, architecture(config.model))
    assert plan.samples == 20
    assert "1 of 21 samples are bad and not counted; the first is 20: has an empty answer" in plan.lines[0]
    assert plan.lines[1].endswith("(estimated from the bytes of the texts, as no tokenizer is here)")
    assert plan.size.images == plan.size.rows == 1


def test_the_operations_of_a_step_are_those_of_its_matrices():
    from mmllm.models.multimodal import MultimodalLLM, torch

    with torch.device("meta"):
        model = MultimodalLLM(architecture(ExperimentConfig().model))
    train_only_(model, ["multi_modal_projector", "language_model"])
    flops = step_flops(model, tokens=64 * 128, targets=64 * 128, images=64)
    assert flops == pytest.approx(24.3e12, rel=0.05)  # 64 x 128 tokens, all of them targets


# The whole command


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_with_its_own_settings(tmp_path, capsys):
    world = write_world(tmp_path)
    config = world.config(tmp_path / "out", save_steps=1, keep_checkpoints=3)
    data = [f"data.train_data_path={config.data.train_data_path}", f"data.image_dir={config.data.image_dir}"]
    config.data.train_data_path = config.data.image_dir = None
    config.save(tmp_path / "my.json")
    directory = tmp_path / "out" / "tiny"
    process = run(tmp_path / "my.json", *data, "training.log_steps=2")
    while process.poll() is None and not list(directory.glob(".checkpoint-epoch-1-step-3.tmp*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert train.main([str(tmp_path / "my.json"), "--resume", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "going on from" in out and "training.log_steps = 2  (command line, earlier)" in out
    assert "changed: " not in out
    assert out.splitlines()[-1].startswith(f"try it: python -m mmllm sample --model {directory}/best_model --image ")
    assert [disk.step_of(path) for path in disk.checkpoints(directory)][-1] == 10
    assert not list(directory.glob(".*"))
