"""Every setting of a run, with its default and its limits.

A misspelt setting that is ignored trains for a week with the default. So unknown names, wrong types and values out of
range are refused wherever they come from, also in `config.data.bach_size = 16`, and the nearest name is offered.
"""

import json
import operator
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmllm.config.validation import describe, did_you_mean
from mmllm.errors import ConfigError

PRECISIONS = ("float32", "bfloat16", "int8", "int8-dynamic", "int4")  # to answer in, see inference/optimize.py
GENERAL = ("data.batch_size", "training.gradient_accumulation_steps", "training.learning_rate")  # of all stages

LOSS_RISES = "a reward raises the validation loss"
STAGES = ("stage1", "stage2", "stage3")

MOST = 10**12  # no setting is larger
Count = Annotated[int, Field(ge=1, le=MOST)]
Amount = Annotated[int, Field(ge=0, le=MOST)]
Rate = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # a list will do
Part = Literal["projector", "language_model", "vision_tower"]
Parts = Annotated[tuple[Part, ...], Field(strict=False)]


class Section(BaseModel):
    """A group of settings. ConfigError for an unknown name or a wrong value, given at first or assigned later."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)

    def __init__(self, **values: object):
        with self._one_line_errors():
            super().__init__(**values)

    def __setattr__(self, name: str, value: object) -> None:
        with self._one_line_errors():
            super().__setattr__(name, value)

    @classmethod
    @contextmanager
    def _one_line_errors(cls, prefix: str = "") -> Iterator[None]:
        try:
            yield
        except ValidationError as error:
            raise ConfigError(describe(error, [*cls.model_fields, *setting_names()], prefix=prefix)) from None


class LoraConfig(Section):
    """Low-rank adapters, in PEFT's words. `target_modules` may be ("all-linear",)."""

    r: Count = 16
    lora_alpha: Amount = 32
    lora_dropout: Fraction = 0.1
    target_modules: Names = ("q_proj", "v_proj", "k_proj", "o_proj")
    use_rslora: bool = False


class ModelConfig(Section):
    """Where the model comes from. `pretrained` (an mmllm directory) takes the place of `clip` and `qwen`."""

    clip: str = "openai/clip-vit-base-patch32"
    qwen: str = "Qwen/Qwen2.5-0.5B-Instruct"
    pretrained: str | None = None
    features: Literal["patch", "pooled"] = "patch"  # every patch is a token, or the image is one token
    image_size: Count | None = (
        None  # pixels a side; None: the vision tower's. Its positions are interpolated to another
    )
    image_fit: Literal["crop", "stretch", "pad"] | None = None  # how it becomes a square; None: as for the tower
    system_prompt: str = "You are a helpful assistant."
    use_lora: bool = False
    lora_config: LoraConfig = Field(default_factory=LoraConfig)
    load_in_8bit: bool = False
    load_in_4bit: bool = False


class DataConfig(Section):
    """What is trained on. `image_dir` None: the folder of the data file. The splits are for files that hold several.

    With `share_images` a sample is an image with all texts that the file has for it, for `batch_size`, steps and epochs
    too; `max_*_samples` count single texts.
    """

    train_data_path: str | None = None
    val_data_path: str | None = None
    val_fraction: Fraction = 0.0  # of the training images, set aside for validation where val_data_path is None
    image_dir: str | None = None
    val_image_dir: str | None = None  # None: as image_dir
    train_split: str = "train"
    val_split: str = "val"
    batch_size: Count = 32  # samples of a micro-batch
    max_length: Count = 512  # tokens of a sample, images included
    num_workers: Amount = 2
    bad_samples: Literal["error", "skip"] = "error"  # skipped ones are listed in bad_samples.jsonl
    max_bad_fraction: Rate = 0.01
    max_train_samples: Count | None = None
    max_val_samples: Count | None = None
    share_images: bool = True  # all captions or questions of an image in one row: the same gradient, cheaper
    group_by_length: bool = False  # rows of similar length in one micro-batch: less padding, the same gradient
    augment: bool = False  # train on random parts of the images, also mirrored where no text says left or right
    cache_features: bool = False  # run the frozen tower once for each image and keep its output in output_dir/features
    features_path: str | None = None  # safetensors of features by image name; the images are not needed then


class StageConfig(Section):
    """One stage. A rate, batch size or accumulation of None is the general one."""

    epochs: Amount = 1
    train: Parts = ("projector", "language_model")
    learning_rate: Rate | None = None
    projector_learning_rate: Rate | None = None  # None: the stage's own rate, as for the tower
    vision_learning_rate: Rate | None = None
    batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None


class RewardConfig(StageConfig):
    """Stage 3 samples captions and raises the probability of those that score above the others of their image."""

    epochs: Amount = 0
    num_captions: Annotated[int, Field(ge=2, le=MOST)] = 5  # sampled for each image
    max_new_tokens: Count = 40  # of a caption
    bleu_weight: Weight = 0.0  # the reward is CIDEr-D + bleu_weight * BLEU-4
    kl_weight: Weight = 0.02  # of the distance to the model before the stage; 0 keeps no copy of it


class TrainingConfig(Section):
    """How it is trained. One optimizer step of a process takes batch_size x gradient_accumulation_steps samples."""

    learning_rate: Rate = 2e-5
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # its moments: 8 bytes a trained parameter, or 2
    weight_decay: Weight = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    warmup_ratio: Rate = 0.03
    max_grad_norm: Annotated[float, Field(ge=1e-6)] = 1.0  # at 0 nothing would move
    bf16: bool = True  # float16 with a scale of the loss on cards without bfloat16
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    compile: bool = False  # the language model's blocks, by torch.compile: pays after some hundred steps
    sharding: Literal["auto", "full", "none"] = "auto"  # auto: shard where the language model is trained
    reshard_after_forward: bool = False  # gather weights twice a step, for models that do not fit otherwise
    timeout_s: Count = 600  # a process that is silent for so long is lost
    stage1: StageConfig = Field(default_factory=lambda: StageConfig(epochs=3, train=("projector",), learning_rate=1e-3))
    stage2: StageConfig = Field(default_factory=lambda: StageConfig(epochs=2))
    stage3: RewardConfig = Field(default_factory=RewardConfig)
    log_steps: Count = 1
    eval_steps: Count | None = None  # None: at the end of every epoch
    save_steps: Count | None = None  # None: at the end of every epoch
    keep_checkpoints: Count = 2
    early_stop: Amount = 0  # checkpoints of the last stage in a row without a better `best_metric` that end it
    num_sample_captions: Amount = 4
    best_metric: Literal["val_loss", "cider", "vqa"] = "val_loss"  # chooses best_model, and when to stop early
    num_metric_samples: Count = 64  # validation samples, and captions or answers, that cider and vqa are measured on
    max_skipped_steps: Amount = 0  # steps in a row that may be skipped because their gradient is not finite


class ExperimentConfig(Section):
    """A whole run; its results are in `output_dir`/`experiment_name`."""

    experiment_name: str = "experiment"
    output_dir: str = "outputs"
    seed: Amount = 0
    device: str = "auto"
    use_wandb: bool = False
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    def to_dict(self) -> dict:
        return self.model_dump(mode="json")

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def get(self, name: str) -> object:
        """The value of a setting or group by its full name, such as `data.batch_size`; "" is the whole."""
        return operator.attrgetter(name)(self) if name else self

    def set(self, name: str, value: object) -> None:
        """Set a setting by its full name."""
        group, _, last = name.rpartition(".")
        setattr(self.get(group), last, value)

    def set_text(self, name: str, text: str) -> list[str]:
        """Set a setting from text, by its full name or an end of it that only one setting has.

        A general value replaces what a stage has for itself: BATCH_SIZE=4 means every batch, unless the stage's own is a
        default. Returns the full names of all settings that it changed.
        """
        full = full_name(name)
        group, _, last = full.rpartition(".")
        section = self.get(group)
        value = from_text(text, type(section).model_fields[last].annotation)
        with section._one_line_errors(f"{group}." if group else ""):
            section.__pydantic_validator__.validate_assignment(section, last, value, strict=False)
        stages = [f"training.{stage}.{last}" for stage in STAGES] if full in GENERAL else []
        default = ExperimentConfig()
        changed = [own for own in stages if default.get(own) is None and self.get(own) is not None]
        for own in changed:
            self.set(own, None)
        return [full, *changed]

    def stages(self) -> tuple[StageConfig, StageConfig, RewardConfig]:
        """The stages, with the general settings where they have none of their own."""
        return tuple(self._filled(self.get(f"training.{stage}")) for stage in STAGES)

    def _filled(self, stage: StageConfig) -> StageConfig:
        own = stage.model_dump(exclude_none=True)
        general = {full.rpartition(".")[2]: self.get(full) for full in GENERAL} | own
        rates = dict.fromkeys(("projector_learning_rate", "vision_learning_rate"), general["learning_rate"])
        return type(stage)(**(rates | general))

    def imply(self) -> dict[str, str]:
        """Set what follows from other settings and nobody set: names and reasons.

        `model.use_lora` where an int8 or int4 language model is trained, `training.best_metric` where stage 3 is on.
        """
        model, training, implied = self.model, self.training, {}
        if self._trains_rounded_weights() and "use_lora" not in model.model_fields_set:
            model.use_lora = True
            rounding = "load_in_8bit" if model.load_in_8bit else "load_in_4bit"
            reason = "rounded weights are frozen, adapters beside them are trained"
            implied["model.use_lora"] = f"implied by model.{rounding}: {reason}"
        if training.stage3.epochs and "best_metric" not in training.model_fields_set:
            training.best_metric = "cider"
            implied["training.best_metric"] = f"implied by training.stage3: {LOSS_RISES}"
        return implied

    def _trains_rounded_weights(self) -> bool:
        trains = any("language_model" in stage.train and stage.epochs for stage in self.stages())
        return trains and (self.model.load_in_8bit or self.model.load_in_4bit) and not self.model.use_lora

    def check(self) -> None:
        """ConfigError for settings that exclude each other; each alone was checked when it was set."""
        model, data = self.model, self.data
        if model.load_in_8bit and model.load_in_4bit:
            raise ConfigError("model.load_in_8bit and model.load_in_4bit are both true; choose one")
        if data.cache_features and data.features_path:
            raise ConfigError("data.cache_features and data.features_path are both set; choose one")
        if data.augment and (data.cache_features or data.features_path):
            raise ConfigError(
                "data.augment shows other parts of an image each time, and features are made once: unset "
                f"data.{'cache_features' if data.cache_features else 'features_path'}, or augment"
            )
        if data.val_data_path and data.val_fraction:
            raise ConfigError("data.val_data_path and data.val_fraction are both set; choose one")
        if self.training.early_stop and data.train_data_path and not (data.val_data_path or data.val_fraction):
            raise ConfigError(
                "training.early_stop needs a validation: set data.val_data_path, or data.val_fraction=0.1, or early_stop=0"
            )
        if self.training.stage3.epochs and self.training.best_metric == "val_loss":
            raise ConfigError(
                f"training.best_metric=val_loss never chooses a model of stage 3: {LOSS_RISES}; set cider"
            )
        if self.training.stage3.epochs and self.training.reshard_after_forward:
            raise ConfigError(
                "training.reshard_after_forward saves nothing in stage 3, where each process needs all weights to sample "
                "captions; set it to false"
            )
        for number, stage in enumerate(self.stages(), 1):
            if (data.cache_features or data.features_path) and "vision_tower" in stage.train and stage.epochs:
                raise ConfigError(
                    f"training.stage{number}.train has vision_tower, but data.cache_features and data.features_path hold "
                    "the output of a frozen one; take it out of there, or unset these"
                )
        if self._trains_rounded_weights():
            name = "load_in_8bit" if model.load_in_8bit else "load_in_4bit"
            raise ConfigError(
                f"model.{name} keeps the language model frozen: set model.use_lora=true, or let no stage train it"
            )


def setting_names(section: type[Section] = ExperimentConfig, prefix: str = "") -> list[str]:
    """The full names of all settings, in order."""
    names = []
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        names += setting_names(field.annotation, f"{prefix}{name}.") if is_section else [prefix + name]
    return names


def flat(config: ExperimentConfig) -> dict[str, object]:
    """Every setting's value by its full name."""
    return {name: config.get(name) for name in setting_names()}


def full_name(name: str) -> str:
    """The full name of a setting that `name` is, or is the only end of; a general setting goes before a stage's."""
    names = setting_names()
    matches = [full for full in names if full == name] or [full for full in names if full.endswith(f".{name}")]
    depth = min((full.count(".") for full in matches), default=0)
    nearest = [full for full in matches if full.count(".") == depth]
    if len(nearest) == 1:
        return nearest[0]
    if any(full.startswith(f"{name}.") for full in names):
        raise ConfigError(f"{name} is a group of settings; write {name}.NAME=value")
    if matches:
        raise ConfigError(f"ambiguous setting {name!r}; say which: {', '.join(matches)}")
    raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, names)}")


def from_text(text: str, annotation: object) -> str | None | tuple[str, ...]:
    """What a shell user means by `text`, where it is not a number, a text or a truth value, which pydantic reads."""
    if type(None) in typing.get_args(annotation) and text.strip().lower() in ("none", "null", ""):
        return None
    if typing.get_origin(annotation) is tuple:
        return tuple(part.strip().strip("'\"") for part in text.strip("[]() ").split(",") if part.strip())
    return text
