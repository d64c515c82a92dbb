"""Every setting of a run: its name, default, limits, and where its value came from."""

from mmllm.config.schema import ExperimentConfig

__all__ = ["ExperimentConfig"]
