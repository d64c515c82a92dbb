"""Train a model in two stages on pictures with text.

python train.py configs/debug.py data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images
python train.py configs/full.py --dry-run        # parameters, memory, steps; loads and downloads nothing
python train.py configs/full.py --resume auto    # go on where it stopped, bit for bit
"""

import argparse
import os
from pathlib import Path

from mmllm.config.schema import ExperimentConfig, resolve
from mmllm.errors import ConfigError, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="a .py or .json file, then settings")
    parser.add_argument("--config", metavar="FILE", help="the same as CONFIG")
    parser.add_argument("--debug", action="store_true", help="the same as configs/debug.py")
    parser.add_argument("--small-scale", action="store_true", help="the same as configs/small.py")
    parser.add_argument("--resume", metavar="auto|DIR", help="go on from the newest checkpoint, or from this one")
    parser.add_argument("--overwrite", action="store_true", help="start over where a run of this name exists")
    parser.add_argument("--allow-data-change", action="store_true", help="resume although the data file changed")
    parser.add_argument("--dry-run", action="store_true", help="show parameters, memory and steps, and stop")
    options = parser.parse_intermixed_args(arguments)
    here = Path(__file__).parent / "configs"
    files = [item for item in options.settings if "=" not in item] + ([options.config] if options.config else [])
    files += [here / "debug.py"] * options.debug + [here / "small.py"] * options.small_scale
    if len(files) > 1:
        parser.error(f"one configuration, please, not {len(files)}: {', '.join(map(str, files))}")
    options.file = files[0] if files else None
    options.settings = [item for item in options.settings if "=" in item]
    return options


def configuration_of(resume: str) -> Path:
    """The configuration that a run or a checkpoint was made with, for `--resume DIR` alone."""
    for name in ("training/experiment.json", "experiment.json"):
        if (Path(resume) / name).is_file():
            return Path(resume) / name
    raise ConfigError(f"{resume}: no checkpoint with a configuration in it; name the configuration too")


def main() -> int:
    options = parse()
    if options.file is None and options.resume not in (None, "auto"):
        options.file = configuration_of(options.resume)
    config, origins = resolve(options.file, os.environ, options.settings)
    return dry_run(config) if options.dry_run else train(config, origins, options)


def dry_run(config: ExperimentConfig) -> int:
    from mmllm.training.dry_run import describe

    print("\n".join(describe(config)))
    return 0


def train(config: ExperimentConfig, origins: dict[str, str], options: argparse.Namespace) -> int:
    from mmllm.training import experiment

    return experiment.train(
        config,
        origins,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_data_change=options.allow_data_change,
    )


if __name__ == "__main__":
    run(main)
