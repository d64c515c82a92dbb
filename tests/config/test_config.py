"""Where settings come from, and what is refused on the way."""

import subprocess
import sys

import pytest

from conftest import ROOT
from mmllm import ExperimentConfig
from mmllm.config.schema import LoraConfig, flat
from mmllm.config.sources import explain, load, resolve
from mmllm.errors import ConfigError

BEGIN = "from mmllm.config.schema import ExperimentConfig\n\nconfig = ExperimentConfig()\n"


def written(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_python_example_of_the_description_works(tmp_path):
    config = ExperimentConfig()
    config.experiment_name = "my_experiment"
    config.data.train_data_path = "path/to/train.json"
    config.data.image_dir = "path/to/images"
    config.data.batch_size = 16
    config.training.learning_rate = 1e-4
    config.save(tmp_path / "my_config.json")

    loaded, _ = resolve(tmp_path / "my_config.json", {}, [])
    assert loaded == config
    assert loaded.data.batch_size == 16
    assert loaded.training.learning_rate == 1e-4


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


@pytest.mark.parametrize(
    "environment, overrides", [({"GRADIENT_ACCUMULATION_STEPS": "2"}, []), ({}, ["gradient_accumulation_steps=2"])]
)
def test_a_general_value_given_later_wins_over_what_the_file_gave_a_stage(environment, overrides):
    config, _ = resolve(ROOT / "configs" / "full.py", environment, overrides)
    assert [stage.gradient_accumulation_steps for stage in config.stages()] == [2, 2]


def test_a_general_learning_rate_leaves_the_rate_of_alignment_alone():
    config, _ = resolve(ROOT / "configs" / "full.py", {}, ["learning_rate=1e-5"])
    assert [stage.learning_rate for stage in config.stages()] == [1e-3, 1e-5]


def test_a_stage_has_the_general_values_where_it_has_none_of_its_own():
    config = ExperimentConfig()
    config.data.batch_size = 6
    config.training.stage2.gradient_accumulation_steps = 7
    config.training.stage2.projector_learning_rate = 1e-6
    first, second = config.stages()
    assert (first.batch_size, first.gradient_accumulation_steps, first.learning_rate) == (6, 1, 1e-3)
    assert (second.batch_size, second.gradient_accumulation_steps, second.learning_rate) == (6, 7, 2e-5)
    assert (first.projector_learning_rate, second.projector_learning_rate) == (1e-3, 1e-6)


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
        ('{"seed": 1,\n}', "{}:2: Expecting property name enclosed in double quotes"),
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


def test_an_unknown_name_is_refused_at_once():
    config = ExperimentConfig()
    with pytest.raises(ConfigError, match=r"unknown setting 'bach_size' \(did you mean batch_size\?\)"):
        config.data.bach_size = 16


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


def test_8_and_4_bits_at_once_are_refused():
    with pytest.raises(ConfigError, match="choose one"):
        resolve(None, {}, ["load_in_8bit=true", "load_in_4bit=true"])


def test_a_missing_file_offers_the_nearest_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load("configs/full_scale.json")
    assert str(caught.value) == "configs/full_scale.json: no such configuration (did you mean configs/full.py?)"


@pytest.mark.parametrize(
    "text, value",
    [
        ("batch_size=4", 4),
        ("learning_rate=1", 1.0),
        ("learning_rate=1e-4", 1e-4),
        ("experiment_name=4", "4"),
        ("experiment_name=true", "true"),
        ("experiment_name=a=b", "a=b"),
        ("experiment_name=none", "none"),
        ("bf16=True", True),
        ("bf16=0", False),
        ("use_lora=yes", True),
        ("pretrained=none", None),
        ("eval_steps=none", None),
        ("eval_steps=4", 4),
        ("target_modules=q_proj,v_proj", ("q_proj", "v_proj")),
        ("target_modules=['q_proj', 'v_proj']", ("q_proj", "v_proj")),
        ("stage1.train=projector", ("projector",)),
    ],
)
def test_a_value_from_a_shell_is_what_its_user_means(text, value):
    config = ExperimentConfig()
    name, _, text = text.partition("=")
    (changed,) = config.set_text(name, text)
    assert config.get(changed) == value and type(config.get(changed)) is type(value)


def test_a_wrong_value_is_refused_in_a_constructor_too():
    with pytest.raises(ConfigError, match="^r is 'x'; it must be a whole number$"):
        LoraConfig(r="x")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_every_configuration_of_the_house_is_valid_and_survives_being_saved(name, tmp_path):
    config, _ = resolve(ROOT / "configs" / name, {}, [])
    config.save(tmp_path / "x.json")
    assert load(tmp_path / "x.json") == config


def test_debug_is_small():
    config = load(ROOT / "configs" / "debug.py")
    assert (config.data.max_train_samples, config.data.max_val_samples, config.data.batch_size) == (100, 50, 4)
    assert [stage.epochs for stage in config.stages()] == [1, 1]


def test_small_adapts_an_int8_model_in_2_and_1_epochs():
    config = load(ROOT / "configs" / "small.py")
    assert (config.model.use_lora, config.model.load_in_8bit, config.data.batch_size) == (True, True, 8)
    assert [stage.epochs for stage in config.stages()] == [2, 1]
    assert all(stage.gradient_accumulation_steps > 1 for stage in config.stages())


def test_full_trains_patches_for_3_and_2_epochs():
    config = load(ROOT / "configs" / "full.py")
    assert (config.model.features, config.data.batch_size) == ("patch", 32)
    assert [stage.epochs for stage in config.stages()] == [3, 2]
    assert [stage.train for stage in config.stages()] == [("projector",), ("projector", "language_model")]


def test_pooled_is_full_but_for_the_one_token():
    full = flat(load(ROOT / "configs" / "full.py"))
    pooled = flat(load(ROOT / "configs" / "pooled.py"))
    assert {name for name in full if full[name] != pooled[name]} == {"experiment_name", "model.features"}


def test_configurations_are_read_without_torch():
    program = "import sys; from mmllm.config.sources import resolve as r; r('configs/full.py', {}, [])"
    program += "; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).stdout == b"False\n"
