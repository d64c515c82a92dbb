"""Every setting of a run: schema (names, defaults, limits), sources (files, environment, command line), validation."""

from mmllm.config.schema import ExperimentConfig
from mmllm.config.sources import load

__all__ = ["ExperimentConfig", "load"]
