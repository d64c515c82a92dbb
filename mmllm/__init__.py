"""CLIP ViT-B/32 and Qwen2.5-0.5B joined by a small projector, in plain PyTorch.

The four public names load on first use, so that `mmllm train --help` does not wait for torch. Read models/ (clip, qwen,
projector, multimodal), then data/chat, training/step, inference/engine and inference/sampling.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["ExperimentConfig", "MultimodalEvaluator", "MultimodalInferencePipeline", "MultimodalLLM"]

_MODULE_OF = {
    "ExperimentConfig": "mmllm.config.schema",
    "MultimodalEvaluator": "mmllm.evaluation.evaluator",
    "MultimodalInferencePipeline": "mmllm.inference.pipeline",
    "MultimodalLLM": "mmllm.models.multimodal",
}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mmllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
