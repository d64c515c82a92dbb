"""Train a model in two stages on images with text.

mmllm train configs/debug.py data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images
mmllm train configs/full.py --dry-run        # parameters, memory, steps; loads and downloads nothing
mmllm train configs/full.py --resume auto    # continue from the newest checkpoint, bit for bit
"""

import argparse
import os
from pathlib import Path

from mmllm.commands import make_parser
from mmllm.config.sources import resolve
from mmllm.errors import ConfigError
from mmllm.runtime.threads import limit_threads

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("train", __doc__)
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="a .py or .json file, then settings")
    parser.add_argument("--config", metavar="FILE", help="the same as CONFIG")
    parser.add_argument("--debug", action="store_true", help="the same as configs/debug.py")
    parser.add_argument("--small-scale", action="store_true", help="the same as configs/small.py")
    parser.add_argument("--resume", metavar="auto|DIR", help="continue from the newest checkpoint, or from this one")
    parser.add_argument("--overwrite", action="store_true", help="start over where a run of this name exists")
    parser.add_argument("--allow-data-change", action="store_true", help="resume although the data file changed")
    parser.add_argument("--dry-run", action="store_true", help="show parameters, memory and steps, and stop")
    options = parser.parse_intermixed_args(arguments)
    files = [item for item in options.settings if "=" not in item] + ([options.config] if options.config else [])
    files += [CONFIGS / "debug.py"] * options.debug + [CONFIGS / "small.py"] * options.small_scale
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


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.file is None and options.resume not in (None, "auto"):
        options.file = configuration_of(options.resume)
    config, origins = resolve(options.file, os.environ, options.settings)
    # torch takes two seconds to import: only now that the command line and the settings are known to be right
    limit_threads()
    if options.dry_run:
        from mmllm.training.dry_run import describe

        print("\n".join(describe(config)))
        return 0
    from mmllm.training.experiment import train

    return train(
        config,
        origins,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_data_change=options.allow_data_change,
    )
