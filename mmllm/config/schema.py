"""Everything a run can be told, in one tree of dataclasses.

The surprising fact: a misspelt setting is worse than a crash. It trains for a week with the default. So every name is
checked wherever it comes from, also in `config.data.bach_size = 16`, and the nearest right name is offered.

    python train.py configs/full.py data.batch_size=16 stage2.epochs=1

Later sources win: defaults < file (Python or JSON) < environment < `key=value` on the command line.
Next: train.py.
"""

import difflib
import json
import math
import operator
import re
import runpy
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from mmllm.errors import ConfigError

Value = str | int | float | bool | None | tuple[str, ...]


class Section:
    """A group of settings that refuses names and types it does not know."""

    def __setattr__(self, name: str, value: object) -> None:
        hints = typing.get_type_hints(type(self))
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, hints)}")
        object.__setattr__(self, name, checked(name, value, hints[name]))


@dataclass
class LoraConfig(Section):
    """Low-rank adapters, in PEFT's words. `target_modules` may be ("all-linear",)."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "k_proj", "o_proj")
    use_rslora: bool = False


@dataclass
class ModelConfig(Section):
    """Where the model comes from. `pretrained` (an mmllm directory) takes the place of `clip` and `qwen`."""

    clip: str = "openai/clip-vit-base-patch32"
    qwen: str = "Qwen/Qwen2.5-0.5B-Instruct"
    pretrained: str | None = None
    features: str = "patch"  # "patch": every patch is a token; "pooled": the picture is one token
    system_prompt: str = "You are a helpful assistant."
    use_lora: bool = False
    lora_config: LoraConfig = field(default_factory=LoraConfig)
    load_in_8bit: bool = False
    load_in_4bit: bool = False


@dataclass
class DataConfig(Section):
    """What is learnt from. `image_dir` None: the folder of the data file. The splits are for files that hold several.

    With `share_images` a sample is a picture with everything that the file says or asks about it, for `batch_size`, steps
    and epochs too; `max_*_samples` count single texts.
    """

    train_data_path: str | None = None
    val_data_path: str | None = None
    image_dir: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    batch_size: int = 32  # samples of a micro-batch
    max_length: int = 512  # tokens of a sample, pictures included
    num_workers: int = 2
    bad_samples: str = "error"  # or "skip": listed in bad_samples.jsonl
    max_bad_fraction: float = 0.01
    max_train_samples: int | None = None
    max_val_samples: int | None = None
    share_images: bool = True  # all captions or questions of a picture in one row: the same gradient, cheaper
    group_by_length: bool = False  # rows of like length into one micro-batch of their step: less padding, same gradient
    cache_features: bool = False  # run the frozen tower once a picture and keep what it saw in output_dir/features
    features_path: str | None = None  # safetensors of features by picture name: no picture need be there then


@dataclass
class StageConfig(Section):
    """One stage. A rate, batch size or accumulation of None is the general one; the rates of parts are the stage's."""

    epochs: int = 1
    train: tuple[str, ...] = ("projector", "language_model")  # and "vision_tower"
    learning_rate: float | None = None
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None


@dataclass
class TrainingConfig(Section):
    """How it is learnt. A process sees batch_size x gradient_accumulation_steps samples in one optimiser step."""

    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    bf16: bool = True
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False  # the language model's blocks, by torch.compile: pays after some hundred steps
    sharding: str = (
        "auto"  # or "full", "none": weights spread over processes; auto: where the language model is trained
    )
    reshard_after_forward: bool = False  # for models that would not fit otherwise: gather weights twice a step
    timeout_s: int = 600  # a process that says nothing for so long is lost
    stage1: StageConfig = field(default_factory=lambda: StageConfig(epochs=3, train=("projector",), learning_rate=1e-3))
    stage2: StageConfig = field(default_factory=lambda: StageConfig(epochs=2))
    log_steps: int = 1
    eval_steps: int | None = None  # None: at the end of every epoch
    save_steps: int | None = None  # None: at the end of every epoch
    keep_checkpoints: int = 2
    num_sample_captions: int = 4
    max_skipped_steps: int = 0  # steps in a row that may be left out because the gradient is not finite


@dataclass
class ExperimentConfig(Section):
    """A whole run; its results lie in `output_dir`/`experiment_name`."""

    experiment_name: str = "experiment"
    output_dir: str = "outputs"
    seed: int = 0
    device: str = "auto"
    use_wandb: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_dict(self) -> dict:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes JSON that `load` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ExperimentConfig":
        """Reads a Python file that binds `config`, or JSON in which // comments are allowed."""
        path = Path(path)
        if not path.is_file():
            near = difflib.get_close_matches(str(path), map(str, Path("configs").glob("*.py")), n=1)
            raise ConfigError(f"{path}: no such configuration" + (f" (did you mean {near[0]}?)" if near else ""))
        return load_python(path) if path.suffix == ".py" else load_json(path)

    def stages(self) -> tuple[StageConfig, StageConfig]:
        """Both stages, what they leave open filled in from the general settings."""
        return self._filled(self.training.stage1), self._filled(self.training.stage2)

    def _filled(self, stage: StageConfig) -> StageConfig:
        rate = first_given(stage.learning_rate, self.training.learning_rate)
        return replace(
            stage,
            learning_rate=rate,
            projector_learning_rate=first_given(stage.projector_learning_rate, rate),
            vision_learning_rate=first_given(stage.vision_learning_rate, rate),
            batch_size=first_given(stage.batch_size, self.data.batch_size),
            gradient_accumulation_steps=first_given(
                stage.gradient_accumulation_steps, self.training.gradient_accumulation_steps
            ),
        )

    def validate(self, origins: Mapping[str, str] | None = None) -> None:
        """Refuses values that no run could use, by name and by where they came from."""
        for full, value in flat(self).items():
            name = full.rpartition(".")[2]
            fault = ""
            for item in value if isinstance(value, tuple) else [value]:
                if name in CHOICES and item not in CHOICES[name]:
                    fault = f"it can be {' or '.join(map(repr, CHOICES[name]))}"
            if name in LIMITS and value is not None and not LIMITS[name][0] <= value <= LIMITS[name][1]:
                low, high = LIMITS[name]
                fault = f"it must be at least {low}" + (f" and at most {high}" if high < MOST else "")
            if fault:
                source = f"{origins[full]}: " if origins and full in origins else ""
                raise ConfigError(f"{source}{full} is {value!r}; {fault}")
        if self.model.load_in_8bit and self.model.load_in_4bit:
            raise ConfigError("model.load_in_8bit and model.load_in_4bit are both true; choose one")
        if self.data.cache_features and self.data.features_path:
            raise ConfigError("data.cache_features and data.features_path are both set; choose one")
        for number, stage in enumerate(self.stages(), 1):
            if (self.data.cache_features or self.data.features_path) and "vision_tower" in stage.train and stage.epochs:
                raise ConfigError(
                    f"training.stage{number}.train has vision_tower, but data.cache_features and data.features_path are of "
                    "a frozen one; take it out of there, or unset these"
                )
        trains = any("language_model" in stage.train and stage.epochs for stage in self.stages())
        for name in ("load_in_8bit", "load_in_4bit"):
            if self.get(f"model.{name}") and trains and not self.model.use_lora:
                raise ConfigError(
                    f"model.{name} holds the language model frozen: set model.use_lora=true, or let no stage train it"
                )

    def get(self, dotted: str) -> object:
        """The value of a setting by its full name."""
        return operator.attrgetter(dotted)(self)

    def set_text(self, name: str, text: str) -> list[str]:
        """Sets a setting from text, by its full name or an end of it that only one setting has.

        What a stage had for itself gives way to a general value that is set later: BATCH_SIZE=4 means every batch.
        Returns the full names of all settings that it changed.
        """
        full = full_name(name)
        path, _, last = full.rpartition(".")
        section = self.get(path) if path else self
        setattr(section, last, literal(text, typing.get_type_hints(type(section))[last]))
        changed = [full]
        if full in GENERAL:
            for stage in ("stage1", "stage2"):
                own, default = f"training.{stage}.{last}", ExperimentConfig()
                if default.get(own) is None and self.get(own) is not None:
                    setattr(self.get(f"training.{stage}"), last, None)
                    changed.append(own)
        return changed


PRECISIONS = ("float32", "bfloat16", "int8", "int8-dynamic", "int4")  # to answer in, see fast.py
GENERAL = ("data.batch_size", "training.gradient_accumulation_steps", "training.learning_rate")
MOST = 10**12  # no setting is larger; refuses infinity too
CHOICES = {
    "features": ("patch", "pooled"),
    "bad_samples": ("error", "skip"),
    "sharding": ("auto", "full", "none"),
    "train": ("projector", "language_model", "vision_tower"),
}
COUNTS = ("batch_size", "max_length", "gradient_accumulation_steps", "log_steps", "eval_steps", "save_steps", "r")
COUNTS += ("keep_checkpoints", "max_train_samples", "max_val_samples")
AMOUNTS = ("num_workers", "epochs", "seed", "num_sample_captions", "max_skipped_steps", "weight_decay", "lora_alpha")
RATES = ("learning_rate", "projector_learning_rate", "vision_learning_rate", "warmup_ratio", "max_bad_fraction")
LIMITS = {
    **dict.fromkeys(COUNTS, (1, MOST)),
    **dict.fromkeys(AMOUNTS, (0, MOST)),
    **dict.fromkeys(RATES, (0, 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), (0, math.nextafter(1, 0))),
    "timeout_s": (1, MOST),
    "max_grad_norm": (1e-6, MOST),  # at 0 nothing would ever move
}
ENVIRONMENT = {
    "BATCH_SIZE": "data.batch_size",
    "GRADIENT_ACCUMULATION_STEPS": "training.gradient_accumulation_steps",
    "BF16": "training.bf16",
    "MAX_LENGTH": "data.max_length",
    "NUM_WORKERS": "data.num_workers",
}


def resolve(
    path: str | Path | None, environment: Mapping[str, str], overrides: list[str]
) -> tuple[ExperimentConfig, dict[str, str]]:
    """The configuration of a run, and for each setting that some source has changed the name of that source."""
    config = ExperimentConfig.load(path) if path else ExperimentConfig()
    default = flat(ExperimentConfig())
    origins = {name: str(path) for name, value in flat(config).items() if value != default[name]}
    given = [
        (name, environment[key], f"environment variable {key}")
        for key, name in ENVIRONMENT.items()
        if key in environment
    ]
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"command line: {override!r}; settings are written key=value")
        given.append((name, text, "command line"))
    for name, text, origin in given:
        try:
            changed = config.set_text(name, text)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        origins |= dict.fromkeys(changed, origin)
    config.validate(origins)
    return config, origins


def explain(config: ExperimentConfig, origins: Mapping[str, str]) -> list[str]:
    """One line for each setting that some source has changed: its name, value and source."""
    values = flat(config)
    return [f"{name} = {values[name]!r}  ({origin})" for name, origin in sorted(origins.items())]


def literal(text: str, hint: object) -> Value:
    """What a shell user means by `text` where a value of type `hint` is wanted; text that fits no type is returned as is."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    word = text.strip().lower()
    if types.NoneType in kinds and word in ("none", "null", ""):
        return None
    if bool in kinds:
        return WORDS.get(word, text)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(part.strip().strip("'\"") for part in text.strip("[]() ").split(",") if part.strip())
    for kind in (kind for kind in (int, float) if kind in kinds):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def first_given(*values: int | float | None) -> int | float | None:
    return next((value for value in values if value is not None), None)


def load_python(path: Path) -> ExperimentConfig:
    """Runs the file and takes its `config`; an error names the file and the line."""
    try:
        config = runpy.run_path(str(path)).get("config")
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # it is a program, and may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        message = str(error) or type(error).__name__
        if isinstance(error, AttributeError) and isinstance(error.obj, Section):
            message = (
                f"unknown setting {error.name!r}{did_you_mean(error.name, typing.get_type_hints(type(error.obj)))}"
            )
        raise ConfigError(f"{path}:{lines[-1] if lines else 1}: {message}") from error
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{path}: binds no `config`; it needs a line such as `config = ExperimentConfig()`")
    return config


def load_json(path: Path) -> ExperimentConfig:
    """Reads nested JSON objects; `//` begins a comment."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text; save it so") from error
    # a string, or a comment to the end of the line: only the comment goes
    text = re.sub(r'("(?:[^"\\]|\\.)*")|//[^\n]*', lambda match: match[1] or "", text)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object is needed, written {{...}}")
    config = ExperimentConfig()
    try:
        update(config, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def update(section: Section, content: dict, prefix: str = "") -> None:
    """Sets every setting that `content`, nested as the sections are, names."""
    groups = {f.name for f in fields(section) if is_dataclass(getattr(section, f.name))}
    for name, value in content.items():
        if name not in groups:
            setattr(section, name, value)
        elif isinstance(value, dict):
            update(getattr(section, name), value, f"{prefix}{name}.")
        else:
            raise ConfigError(f"{prefix}{name} is {value!r}; it is a group of settings, written {{...}}")


def flat(section: Section, prefix: str = "") -> dict[str, Value]:
    """Every setting by its full name."""
    values = {}
    for f in fields(section):
        value = getattr(section, f.name)
        values |= flat(value, f"{prefix}{f.name}.") if is_dataclass(value) else {f"{prefix}{f.name}": value}
    return values


def full_name(name: str) -> str:
    """The full name of a setting that `name` is, or is the only end of; a general setting goes before a stage's."""
    names = list(flat(ExperimentConfig()))
    if name in names:
        return name
    matches = [full for full in names if full.endswith(f".{name}")]
    shallow = [full for full in matches if full.count(".") == min(map(_depth, matches))]
    if len(shallow) == 1:
        return shallow[0]
    if any(full.startswith(f"{name}.") for full in names):
        raise ConfigError(f"{name} is a group of settings; write {name}.NAME=value")
    hint = f"; say which: {', '.join(matches)}" if matches else did_you_mean(name)
    raise ConfigError(f"{'ambiguous' if matches else 'unknown'} setting {name!r}{hint}")


def _depth(full: str) -> int:
    return full.count(".")


def did_you_mean(name: str, near: Iterable[str] = ()) -> str:
    """A hint at the nearest of the names `near`, else of all settings, or nothing."""
    names = sorted(flat(ExperimentConfig()), key=_depth, reverse=True)
    ends = {full.rpartition(".")[2]: full for full in names}  # the general setting, where a stage has one too
    last = name.rpartition(".")[2]
    if last in ends:
        return f" (did you mean {ends[last]}?)"
    for wanted, known in ((name, {n: n for n in near}), (name, {n: n for n in names}), (last, ends)):
        for match in difflib.get_close_matches(wanted, known, n=1, cutoff=0.7):
            return f" (did you mean {known[match]}?)"
    return ""


def checked(name: str, value: object, hint: object) -> object:
    """`value` as the type that `hint` asks for; an int may stand for a float, a list for a tuple, nothing else."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, option) and not (isinstance(value, bool) and option is not bool):
            return value
    raise ConfigError(
        f"{name} is {value!r}; it must be {' or '.join(NAME_OF.get(option, 'a group of settings') for option in options)}"
    )


NAME_OF = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "none",
    tuple[str, ...]: "a list of texts",
}
