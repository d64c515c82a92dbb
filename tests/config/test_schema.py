"""The settings: defaults, types and limits."""

import pytest

from conftest import ROOT
from mmllm import ExperimentConfig
from mmllm.config import load
from mmllm.config.schema import LoraConfig, flat
from mmllm.config.sources import resolve
from mmllm.errors import ConfigError


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


def test_a_stage_has_the_general_values_where_it_has_none_of_its_own():
    config = ExperimentConfig()
    config.data.batch_size = 6
    config.training.stage2.gradient_accumulation_steps = 7
    config.training.stage2.projector_learning_rate = 1e-6
    first, second, _ = config.stages()
    assert (first.batch_size, first.gradient_accumulation_steps, first.learning_rate) == (6, 1, 1e-3)
    assert (second.batch_size, second.gradient_accumulation_steps, second.learning_rate) == (6, 7, 2e-5)
    assert (first.projector_learning_rate, second.projector_learning_rate) == (1e-3, 1e-6)


def test_an_unknown_name_is_refused_at_once():
    config = ExperimentConfig()
    with pytest.raises(ConfigError, match=r"unknown setting 'bach_size' \(did you mean batch_size\?\)"):
        config.data.bach_size = 16


def test_8_and_4_bits_at_once_are_refused():
    with pytest.raises(ConfigError, match="choose one"):
        resolve(None, {}, ["load_in_8bit=true", "load_in_4bit=true"])


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


def test_debug_is_small():
    config = load(ROOT / "configs" / "debug.py")
    assert (config.data.max_train_samples, config.data.max_val_samples, config.data.batch_size) == (100, 50, 4)
    assert [stage.epochs for stage in config.stages()] == [1, 1, 0]


def test_small_adapts_an_int8_model_in_2_and_1_epochs():
    config = load(ROOT / "configs" / "small.py")
    assert (config.model.use_lora, config.model.load_in_8bit, config.data.batch_size) == (True, True, 8)
    assert [stage.epochs for stage in config.stages()] == [2, 1, 0]
    assert all(stage.gradient_accumulation_steps > 1 for stage in config.stages())


def test_full_trains_patches_for_3_and_2_epochs():
    config = load(ROOT / "configs" / "full.py")
    assert (config.model.features, config.data.batch_size) == ("patch", 32)
    assert [stage.epochs for stage in config.stages()] == [3, 2, 0]
    assert [stage.train for stage in config.stages()] == [("projector",), *[("projector", "language_model")] * 2]


def test_pooled_is_full_but_for_the_one_token():
    full = flat(load(ROOT / "configs" / "full.py"))
    pooled = flat(load(ROOT / "configs" / "pooled.py"))
    assert {name for name in full if full[name] != pooled[name]} == {"experiment_name", "model.features"}
