"""Where settings come from: defaults < file < environment < `key=value` on the command line; the later one wins.

A file is Python that binds `config`, or JSON in which // comments are allowed; its name alone will do:

    mmllm train full data.batch_size=16 stage2.epochs=1
"""

import difflib
import json
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path

from mmllm.config.schema import ExperimentConfig, Section, flat, setting_names
from mmllm.config.validation import did_you_mean
from mmllm.errors import ConfigError

ENVIRONMENT = {
    "BATCH_SIZE": "data.batch_size",
    "GRADIENT_ACCUMULATION_STEPS": "training.gradient_accumulation_steps",
    "BF16": "training.bf16",
    "MAX_LENGTH": "data.max_length",
    "NUM_WORKERS": "data.num_workers",
}
COMMAND_LINE, VARIABLE, EARLIER = "command line", "environment variable", ", earlier"  # origins, also in run.json


def resolve(
    source: str | Path | None, environment: Mapping[str, str], overrides: list[str], resume: str | None = None
) -> tuple[ExperimentConfig, dict[str, str]]:
    """The configuration of a run, and for each setting that some source has changed the name of that source.

    A run that goes on (`resume` is "auto", its directory or one of its checkpoints) keeps what its earlier command lines
    and environments gave it: these need not be given again.
    """
    given = [(name, environment[key], f"{VARIABLE} {key}") for key, name in ENVIRONMENT.items() if key in environment]
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{COMMAND_LINE}: {override!r}; settings are written key=value")
        given.append((name, text, COMMAND_LINE))
    config, origins = _apply(source, {}, given)
    directory = Path(config.output_dir).expanduser() / config.experiment_name
    if resume == "auto" or (resume and directory.resolve() in (Path(resume).resolve(), Path(resume).resolve().parent)):
        config, origins = _apply(source, earlier_settings(directory), given)
        if config.data.train_data_path is None:
            raise ConfigError(
                f"data.train_data_path is not set, and no run in {directory} has it; begin one: data.train_data_path=FILE"
            )
    origins |= config.imply()
    config.check()
    return config, origins


def _apply(
    source: str | Path | None, earlier: dict[str, tuple[object, str]], given: list[tuple[str, str, str]]
) -> tuple[ExperimentConfig, dict[str, str]]:
    config = load(source) if source else ExperimentConfig()
    values, default = flat(config), flat(ExperimentConfig())
    origins = {name: str(find(source)) for name in values if values[name] != default[name]}
    for name, (value, origin) in earlier.items():
        config.set(name, value)
        origins[name] = origin
    for name, text, origin in given:
        try:
            changed = config.set_text(name, text)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        origins |= dict.fromkeys(changed, origin)
    return config, origins


def earlier_settings(directory: Path) -> dict[str, tuple[object, str]]:
    """Value and origin of what command lines and environments gave the run in `directory`; empty if there is no run."""
    run, settings = directory / "run.json", directory / "experiment.json"
    if not (run.is_file() and settings.is_file()):
        return {}
    values = flat(load(settings))
    origins = json.loads(run.read_text(encoding="utf-8"))["starts"][-1]["settings_from"]
    return {
        name: (values[name], origin.removesuffix(EARLIER) + EARLIER)
        for name, origin in origins.items()
        if origin.startswith((COMMAND_LINE, VARIABLE)) and name not in ("output_dir", "experiment_name")
    }


def explain(config: ExperimentConfig, origins: Mapping[str, str]) -> list[str]:
    """One line for each setting that some source has changed: its name, value and source."""
    return [f"{name} = {config.get(name)!r}  ({origin})" for name, origin in sorted(origins.items())]


def load(source: str | Path) -> ExperimentConfig:
    """The configuration in a file, or the one called `source` in ./configs or among those that came with mmllm."""
    path = find(source)
    return _load_python(path) if path.suffix == ".py" else _load_json(path)


def find(source: str | Path) -> Path:
    package = Path(__file__).parents[1]
    installed = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    for path in (Path(source), Path("configs", f"{source}.py"), installed / f"{source}.py"):
        if path.is_file():
            return path
    local = [*Path("configs").glob("*.py"), *installed.glob("*.py")]
    known = [*map(str, local), *(path.stem for path in local)]
    near = difflib.get_close_matches(str(source), known, n=1)
    raise ConfigError(f"{source}: no such configuration" + (f" (did you mean {near[0]}?)" if near else ""))


def _load_python(path: Path) -> ExperimentConfig:
    """Run the file and take its `config`; an error names the file and the line."""
    try:
        config = runpy.run_path(str(path)).get("config")
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # it is a program, and may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        message = str(error) or type(error).__name__
        if isinstance(error, AttributeError) and isinstance(error.obj, Section):
            hint = did_you_mean(error.name, [*type(error.obj).model_fields, *setting_names()])
            message = f"unknown setting {error.name!r}{hint}"
        raise ConfigError(f"{path}:{lines[-1] if lines else 1}: {message}") from error
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{path}: binds no `config`; it needs a line such as `config = ExperimentConfig()`")
    return config


def _load_json(path: Path) -> ExperimentConfig:
    try:
        text = path.read_text(encoding="utf-8-sig")
        # a string, or a comment to the end of the line: only the comment goes
        text = re.sub(r'("(?:[^"\\]|\\.)*")|//[^\n]*', lambda match: match[1] or "", text)
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ConfigError("a JSON object is needed, written {...}")
        return ExperimentConfig(**content)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text; save it so") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
