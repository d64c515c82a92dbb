"""Everything a run can be told, in one tree of dataclasses.

The surprising fact: a misspelt setting is worse than a crash. It trains for a week with the default. So every name is
checked wherever it comes from, also in `config.data.bach_size = 16`, and the nearest right name is offered.

    python train.py configs/full.py data.batch_size=16 stage2.epochs=1

Later sources win: defaults < file (Python or JSON) < environment < `key=value` on the command line.
Next: train.py.
"""

import difflib
import json
import re
import runpy
import traceback
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
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
    """Low-rank adapters, in PEFT's words."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "k_proj", "o_proj")


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
    """What is learnt from. `image_dir` None: the folder of the data file."""

    train_data_path: str | None = None
    val_data_path: str | None = None
    image_dir: str | None = None
    batch_size: int = 32  # samples of a micro-batch
    max_length: int = 512  # tokens of a sample, pictures included
    num_workers: int = 2
    bad_samples: str = "error"  # or "skip": written to bad_samples.jsonl
    max_bad_fraction: float = 0.01
    max_train_samples: int | None = None
    max_val_samples: int | None = None


@dataclass
class StageConfig(Section):
    """One stage. What is None is taken from TrainingConfig or DataConfig; a rate of 0 or None keeps a part as it is."""

    epochs: int = 1
    train: tuple[str, ...] = ("projector", "language_model")  # and "vision_tower"
    learning_rate: float | None = None
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None


@dataclass
class TrainingConfig(Section):
    """How it is learnt. One optimiser step sees batch_size x gradient_accumulation_steps samples."""

    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    bf16: bool = True
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
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
            raise ConfigError(
                f"{path}: no such configuration{did_you_mean(str(path), map(str, Path('configs').glob('*.py')))}"
            )
        return load_python(path) if path.suffix == ".py" else load_json(path)

    def validate(self) -> None:
        """Refuses values that no run could use, by name."""
        stages = [("training.stage1", self.training.stage1), ("training.stage2", self.training.stage2)]
        for name, value, allowed in (
            ("model.features", self.model.features, ("patch", "pooled")),
            ("data.bad_samples", self.data.bad_samples, ("error", "skip")),
            *((f"{name}.train", part, PARTS) for name, stage in stages for part in stage.train),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}: {value!r}; it can be {' or '.join(map(repr, allowed))}")
        positive = ["data.batch_size", "data.max_length", "training.gradient_accumulation_steps"]
        positive += ["training.keep_checkpoints", "training.log_steps", "training.eval_steps", "training.save_steps"]
        positive += ["data.max_train_samples", "data.max_val_samples"]
        positive += [f"{name}.{key}" for name, _ in stages for key in ("batch_size", "gradient_accumulation_steps")]
        for name in positive:
            value = self.get(name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value}; it must be at least 1")
        for name in ("data.num_workers", "training.learning_rate", "training.weight_decay", "training.max_grad_norm"):
            if self.get(name) < 0:
                raise ConfigError(f"{name}: {self.get(name)}; it must not be negative")

    def get(self, dotted: str) -> object:
        """The value of a setting by its full name."""
        value = self
        for name in dotted.split("."):
            value = getattr(value, name)
        return value

    def set(self, dotted: str, value: object) -> str:
        """Sets a setting by its full name, or by an end of it that only one setting has; returns the full name."""
        full = full_name(dotted)
        section, _, name = full.rpartition(".")
        setattr(self.get(section) if section else self, name, value)
        return full


PARTS = ("projector", "language_model", "vision_tower")
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
    """The configuration of a run, and for each setting that is not the default where its value came from."""
    config = ExperimentConfig.load(path) if path else ExperimentConfig()
    default = flat(ExperimentConfig())
    origins = {name: str(path) for name, value in flat(config).items() if value != default[name]}
    for variable, name in ENVIRONMENT.items():
        if variable in environment:
            set_from(config, name, literal(environment[variable]), f"environment variable {variable}")
            origins[name] = variable
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} on the command line; settings are written key=value")
        origins[set_from(config, name.lstrip("-"), literal(text), "command line")] = "command line"
    config.validate()
    return config, origins


def set_from(config: ExperimentConfig, name: str, value: object, origin: str) -> str:
    try:
        return config.set(name, value)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def literal(text: str) -> Value:
    """The value that a shell user means: true, none, 4, 1e-4, [a,b], or else the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"\[.*\]|\(.*\)", text):
        return tuple(part.strip().strip("'\"") for part in text[1:-1].split(",") if part.strip())
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load_python(path: Path) -> ExperimentConfig:
    """Runs the file and takes its `config`; an error names the file and the line."""
    try:
        config = runpy.run_path(str(path)).get("config")
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except (ConfigError, NameError, TypeError, AttributeError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise ConfigError(f"{path}:{lines[-1] if lines else 1}: {error}") from error
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{path}: binds no `config`; it needs a line such as `config = ExperimentConfig()`")
    return config


def load_json(path: Path) -> ExperimentConfig:
    text = path.read_text(encoding="utf-8-sig")
    # a string, or a comment to the end of the line: only the comment goes
    text = re.sub(r'("(?:[^"\\]|\\.)*")|//[^\n]*', lambda match: match[1] or "", text)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object is needed")
    config = ExperimentConfig()
    try:
        update(config, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def update(section: Section, content: dict, prefix: str = "") -> None:
    """Sets every setting that `content`, nested as the sections are, names."""
    for name, value in content.items():
        known = {f.name for f in fields(section)}
        inner = getattr(section, name) if name in known else None
        if is_dataclass(inner) and isinstance(value, dict):
            update(inner, value, f"{prefix}{name}.")
        elif is_dataclass(inner):
            raise ConfigError(f"{prefix}{name} is {value!r}; it is a group of settings, written {{...}}")
        else:
            setattr(section, name, value)


def flat(section: Section, prefix: str = "") -> dict[str, Value]:
    """Every setting by its full name."""
    values = {}
    for f in fields(section):
        value = getattr(section, f.name)
        values |= flat(value, f"{prefix}{f.name}.") if is_dataclass(value) else {f"{prefix}{f.name}": value}
    return values


def full_name(name: str) -> str:
    """The full name of a setting that `name` is, or is the only end of."""
    names = list(flat(ExperimentConfig()))
    if name in names:
        return name
    matches = [full for full in names if full.endswith(f".{name}")]
    if len(matches) > 1:  # the general setting, not those of the stages or of LoRA
        shallow = min(full.count(".") for full in matches)
        matches = [full for full in matches if full.count(".") == shallow]
    if len(matches) != 1:
        choice = f"; say which: {', '.join(matches)}" if matches else did_you_mean(name, names)
        raise ConfigError(f"unknown setting {name!r}{choice}")
    return matches[0]


def did_you_mean(name: str, names) -> str:
    """A hint at the nearest of `names`, or nothing."""
    ends = {full.rpartition(".")[2]: full for full in names} if "/" not in name else {}
    near = difflib.get_close_matches(name, [*names, *ends], n=1) or difflib.get_close_matches(
        name.rpartition(".")[2], list(ends), n=1
    )
    return f" (did you mean {ends.get(near[0], near[0])}?)" if near else ""


def checked(name: str, value: object, hint: object) -> object:
    """`value` as the type that `hint` asks for; an int may stand for a float, a list for a tuple, nothing else."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            values = [value] if isinstance(value, str) else value
            if isinstance(values, list | tuple) and all(isinstance(item, str) for item in values):
                return tuple(values)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, option) and not (isinstance(value, bool) and option is not bool):
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)).replace("NoneType", "none") for option in options)
    raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
