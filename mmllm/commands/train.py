"""Train a model in two stages on images with text.

mmllm train full data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images
mmllm train full --dry-run device=cuda:24GB    # parameters, memory, steps; no weights and no card are needed
mmllm train full --resume auto    # continue from the newest checkpoint, bit for bit, with the settings of the run

CONFIG is a file (configs/full.py, my.json) or the name of one in ./configs, else of one that comes with mmllm.
"""

import argparse
import os
from pathlib import Path

from mmllm.commands import make_parser
from mmllm.config.schema import ExperimentConfig
from mmllm.config.sources import resolve
from mmllm.errors import ConfigError, DataError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("train", __doc__)
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="a configuration, then settings")
    parser.add_argument("--config", metavar="CONFIG", help="the same as CONFIG")
    parser.add_argument("--debug", action="store_true", help="the same as `debug`: 100 samples, one epoch a stage")
    parser.add_argument("--small-scale", action="store_true", help="the same as `small`: for small cards")
    parser.add_argument("--resume", metavar="auto|DIR", help="continue from the newest checkpoint, or from this one")
    parser.add_argument("--overwrite", action="store_true", help="start over where a run of this name exists")
    parser.add_argument("--allow-data-change", action="store_true", help="resume although the data file changed")
    parser.add_argument(
        "--dry-run", action="store_true", help="show parameters, memory, steps; device=cuda:24GB: does it fit?"
    )
    options = parser.parse_intermixed_args(arguments)
    named = [item for item in options.settings if "=" not in item] + ([options.config] if options.config else [])
    named += ["debug"] * options.debug + ["small"] * options.small_scale
    if len(named) > 1:
        parser.error(f"one configuration, please, not {len(named)}: {', '.join(named)}")
    options.config = named[0] if named else None
    options.settings = [item for item in options.settings if "=" in item]
    return options


def configuration_of(directory: str) -> Path:
    """The configuration that a run or a checkpoint was made with, for `--resume DIR` alone."""
    for name in ("training/experiment.json", "experiment.json"):
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    what = "holds no experiment.json, so it is no run" if Path(directory).is_dir() else "no such run"
    raise ConfigError(f"{directory}: {what}; name a run, one of its checkpoints, or a configuration too")


def refuse_missing(config: ExperimentConfig) -> None:
    """DataError for a data file or image folder that is not there: before torch is imported, which takes seconds."""
    names = ["train_data_path", "val_data_path", "features_path"]
    names += [] if config.data.features_path else ["image_dir", "val_image_dir"]
    for name in names:
        value = getattr(config.data, name)
        if value and not Path(value).expanduser().exists():
            for part in str(value).split(","):
                if not Path(part.strip()).expanduser().exists():
                    raise DataError(f"{part.strip()}: no such file or folder; it is data.{name}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.config is None and options.resume not in (None, "auto"):
        options.config = configuration_of(options.resume)
    config, origins = resolve(options.config, os.environ, options.settings, options.resume)
    # torch takes two seconds to import: only now that the command line and the settings are known to be right
    if options.dry_run:
        from mmllm.training.dry_run import describe

        print("\n".join(describe(config)))
        return 0
    refuse_missing(config)
    from mmllm.training.experiment import train

    return train(
        config, origins, resume=options.resume, overwrite=options.overwrite, allow_data_change=options.allow_data_change
    )
