"""Where settings come from, and what is refused on the way."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT
from mmllm.config.schema import ExperimentConfig
from mmllm.config.sources import explain, load, resolve
from mmllm.errors import ConfigError

BEGIN = "from mmllm.config.schema import ExperimentConfig\n\nconfig = ExperimentConfig()\n"


def written(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_json_may_have_comments_and_only_some_of_the_settings(tmp_path):
    path = written(
        tmp_path / "x.json",
        """{
          "model": {
            "use_lora": true,
            "lora_config": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
            "load_in_8bit": true,  // 8-bit quantization
            "load_in_4bit": false, // "experimental"
            "clip": "https://example.org/clip" // not a comment before this
          }
        }""",
    )
    config = load(path)
    assert (config.model.use_lora, config.model.load_in_8bit) == (True, True)
    assert (config.model.lora_config.r, config.model.lora_config.lora_alpha) == (8, 32)
    assert config.model.lora_config.target_modules == ("q_proj", "v_proj")
    assert config.model.clip == "https://example.org/clip"


def test_later_sources_win_and_every_changed_setting_names_its_source(tmp_path):
    path = written(
        tmp_path / "x.py",
        BEGIN + "config.data.batch_size = 2\nconfig.data.max_length = 100\nconfig.training.bf16 = False\n",
    )
    config, origins = resolve(path, {"BATCH_SIZE": "3", "MAX_LENGTH": "200"}, ["data.batch_size=4"])
    assert (config.data.batch_size, config.data.max_length, config.training.bf16) == (4, 200, False)
    assert explain(config, origins) == [
        "data.batch_size = 4  (command line)",
        "data.max_length = 200  (environment variable MAX_LENGTH)",
        f"training.bf16 = False  ({path})",
    ]


def test_the_five_environment_variables_are_read():
    config, _ = resolve(
        None,
        {
            "BATCH_SIZE": "4",
            "GRADIENT_ACCUMULATION_STEPS": "5",
            "BF16": "false",
            "MAX_LENGTH": "256",
            "NUM_WORKERS": "0",
            "LEARNING_RATE": "1",
        },
        [],
    )
    assert (config.data.batch_size, config.data.max_length, config.data.num_workers) == (4, 256, 0)
    assert (config.training.gradient_accumulation_steps, config.training.bf16) == (5, False)
    assert config.training.learning_rate == 2e-5


def give(directory, command_line: dict, file: dict | None = None) -> None:
    """A run in `directory` as it leaves its settings; `command_line` and `file` say where they came from."""
    config = ExperimentConfig(output_dir=str(directory.parent), experiment_name=directory.name)
    origins = dict.fromkeys(command_line, "command line") | dict.fromkeys(file or {}, "my.py")
    for name, value in (command_line | (file or {})).items():
        config.set(name, value)
    directory.mkdir()
    config.save(directory / "experiment.json")
    (directory / "run.json").write_text(json.dumps({"starts": [{"settings_from": origins}]}))


def test_a_run_that_is_resumed_keeps_what_its_command_line_gave_it_and_follows_its_file(tmp_path):
    given = {"data.train_data_path": "train.json", "data.batch_size": 16}
    give(tmp_path / "mine", given, {"training.stage2.epochs": 5, "seed": 3})
    file = BEGIN + f"config.output_dir = {str(tmp_path)!r}\nconfig.experiment_name = 'mine'\n"
    path = written(tmp_path / "my.py", file + "config.data.batch_size = 8\nconfig.training.stage2.epochs = 6\n")
    config, origins = resolve(path, {}, ["max_length=99"], "auto")
    assert (config.data.train_data_path, config.data.batch_size, config.data.max_length) == ("train.json", 16, 99)
    assert (config.training.stage2.epochs, config.seed) == (6, 0)  # the file may be edited between
    assert origins["data.batch_size"] == "command line, earlier"
    config, _ = resolve(path, {"BATCH_SIZE": "4"}, [], str(tmp_path / "mine" / "checkpoint-epoch-1-step-3"))
    assert (config.data.train_data_path, config.data.batch_size) == ("train.json", 4)
    config, _ = resolve(path, {}, ["train_data_path=other.json"])
    assert (config.data.train_data_path, config.data.batch_size) == ("other.json", 8)  # a new run


def test_another_runs_checkpoint_gives_no_settings(tmp_path):
    give(tmp_path / "mine", {"data.train_data_path": "train.json", "data.batch_size": 16})
    overrides = [f"output_dir={tmp_path}", "experiment_name=mine", "train_data_path=other.json"]
    config, _ = resolve(None, {}, overrides, str(tmp_path / "another"))
    assert config.data.batch_size == 32


def test_nothing_to_resume_is_one_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    for _ in range(2):
        with pytest.raises(ConfigError, match="data.train_data_path is not set, and no run in .*experiment has it"):
            resolve(None, {}, [f"output_dir={tmp_path}"], "auto")
        (tmp_path / "experiment" / "run.json").write_text("{}")  # the other file is gone


def test_a_configuration_is_found_by_its_name_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("full") == load(ROOT / "configs" / "full.py")
    (tmp_path / "configs").mkdir()
    written(tmp_path / "configs" / "full.py", BEGIN + "config.seed = 7\n")
    config, origins = resolve("full", {}, [])
    assert (config.seed, origins) == (7, {"seed": "configs/full.py"})
    assert load("pooled").model.features == "pooled"
    with pytest.raises(ConfigError, match=r"^smal: no such configuration \(did you mean small\?\)$"):
        load("smal")


@pytest.mark.parametrize(
    "environment, overrides", [({"GRADIENT_ACCUMULATION_STEPS": "2"}, []), ({}, ["gradient_accumulation_steps=2"])]
)
def test_a_general_value_given_later_wins_over_what_the_file_gave_a_stage(environment, overrides):
    config, _ = resolve(ROOT / "configs" / "full.py", environment, overrides)
    assert [stage.gradient_accumulation_steps for stage in config.stages()] == [2, 2, 2]


def test_a_general_learning_rate_leaves_the_rate_of_alignment_alone():
    config, _ = resolve(ROOT / "configs" / "full.py", {}, ["learning_rate=1e-5"])
    assert [stage.learning_rate for stage in config.stages()] == [1e-3, 1e-5, 1e-5]


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.training.learning_rte = 1e-4", "unknown setting 'learning_rte' (did you mean learning_rate?)"),
        ("config.dta.batch_size = 4", "unknown setting 'dta' (did you mean data?)"),
        ("config.training.batch_size = 4", "unknown setting 'batch_size' (did you mean data.batch_size?)"),
        ("config.data.batch_size = '4'", "batch_size is '4'; it must be a whole number"),
        ("config.data.batch_size = True", "batch_size is True; it must be a whole number"),
        ("config.data.batch_size = 0", "batch_size is 0; it must be at least 1"),
        ("config.training.bf16 = 1", "bf16 is 1; it must be true or false"),
        (
            "config.model.lora_config.target_modules = 'q_proj'",
            "target_modules is 'q_proj'; it must be a list of texts",
        ),
        ("config.data = 4", "data is 4; it must be a group of settings, written {...}"),
        ("confg.seed = 1", "name 'confg' is not defined"),
        ("config.seed = int('x')", "invalid literal for int() with base 10: 'x'"),
        ("config.seed = = 1", "invalid syntax"),
        ("config.seed = 1 // 0", "integer division or modulo by zero"),
        ("assert config.seed == 7", "AssertionError"),
    ],
)
def test_a_mistake_in_a_python_file_is_named_with_its_line(line, message, tmp_path):
    path = written(tmp_path / "x.py", BEGIN + line + "\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}:4: {message}"


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"training": {"learning_rte": 1}}', "{}: unknown setting 'learning_rte' (did you mean learning_rate?)"),
        ('{"data": {"batch_size": 4.5}}', "{}: batch_size is 4.5; it must be a whole number"),
        ('{"data": 4}', "{}: data is 4; it must be a group of settings, written {{...}}"),
        ('{"training": {"stage1": []}}', "{}: stage1 is []; it must be a group of settings, written {{...}}"),
        ('{"seed": 1\n"device": "cpu"}', "{}:2: Expecting ',' delimiter"),
        ("[]", "{}: a JSON object is needed, written {{...}}"),
    ],
)
def test_a_mistake_in_a_json_file_is_named(text, message, tmp_path):
    path = written(tmp_path / "x.json", text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(message.format(path))


def test_a_python_file_must_bind_config(tmp_path):
    path = written(tmp_path / "x.py", "settings = 4\n")
    with pytest.raises(ConfigError, match="binds no `config`"):
        load(path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("epochs=1", "ambiguous setting 'epochs'; say which: training.stage1.epochs, training.stage2.epochs"),
        ("learning_rte=1", "unknown setting 'learning_rte' (did you mean training.learning_rate?)"),
        ("training.batch_size=4", "unknown setting 'training.batch_size' (did you mean data.batch_size?)"),
        ("--batch_size=4", "unknown setting '--batch_size' (did you mean data.batch_size?)"),
        ("model=4", "model is a group of settings; write model.NAME=value"),
        ("batch_size", "'batch_size'; settings are written key=value"),
        ("batch_size=many", "data.batch_size is 'many'; it must be a whole number"),
        ("batch_size=0", "data.batch_size is '0'; it must be at least 1"),
        ("warmup_ratio=nan", "training.warmup_ratio is 'nan'; it must be a finite number"),
        ("warmup_ratio=2", "training.warmup_ratio is '2'; it must be at most 1"),
        ("features=patches", "model.features is 'patches'; it must be 'patch' or 'pooled'"),
        (
            "stage1.train=clip",
            "training.stage1.train has 'clip'; it must be 'projector', 'language_model' or 'vision_tower'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, [override])
    assert str(caught.value).startswith(f"command line: {message}")


def test_a_mistake_in_the_environment_names_the_variable():
    with pytest.raises(ConfigError, match="environment variable MAX_LENGTH: data.max_length is '2k'"):
        resolve(None, {"MAX_LENGTH": "2k"}, [])


def test_a_missing_file_offers_the_nearest_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load("configs/full_scale.json")
    assert str(caught.value) == "configs/full_scale.json: no such configuration (did you mean configs/full.py?)"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_every_configuration_of_the_house_is_valid_and_survives_being_saved(name, tmp_path):
    config, _ = resolve(ROOT / "configs" / name, {}, [])
    config.save(tmp_path / "x.json")
    assert load(tmp_path / "x.json") == config


def test_configurations_are_read_without_torch():
    program = "import sys; from mmllm.config.sources import resolve as r; r('configs/full.py', {}, [])"
    program += "; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).stdout == b"False\n"


def test_8_bit_weights_alone_imply_adapters_and_say_so(tmp_path):
    path = written(tmp_path / "x.json", '{"model": {"load_in_8bit": true}}')
    config, origins = resolve(path, {}, [])
    assert config.model.use_lora
    assert any(
        line.startswith("model.use_lora = True  (implied by model.load_in_8bit") for line in explain(config, origins)
    )
    frozen, _ = resolve(path, {}, ["training.stage2.epochs=0"])
    assert not frozen.model.use_lora, "the projector alone needs none"
    with pytest.raises(ConfigError, match="load_in_8bit keeps the language model frozen: set model.use_lora=true"):
        resolve(path, {}, ["model.use_lora=false"])
