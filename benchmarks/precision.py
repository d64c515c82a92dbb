"""How much each precision changes a model: one JSON line for each, with its loss and its distance from float32.

The error of the logits says little: in a model of random weights a rounding of 0.8 % becomes 20 % of it. What counts is
how often another token comes first, and how far apart the distributions are at the trained positions.

M labelled positions, V vocabulary.
"""

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from mmllm.config.schema import PRECISIONS
from mmllm.data.batches import Batch, ordered_batches
from mmllm.data.chat import IGNORED
from mmllm.data.samples import load_samples
from mmllm.inference.optimize import load_model
from mmllm.models.multimodal import MultimodalLLM


def measure(source: str, data: str, image_dir: str | None, limit: int) -> None:
    """Print one row per precision for the first `limit` samples of `data`."""
    processor = MultimodalLLM.from_pretrained(source, dtype=None).processor
    batches = list(ordered_batches(load_samples(data, image_dir)[:limit], processor, 1, num_workers=0))
    for row in compare(source, batches):
        print(json.dumps(row))


def compare(source: str | Path, batches: list[Batch], precisions: tuple[str, ...] = PRECISIONS) -> list[dict]:
    """One row per precision: the model in `source` compared with itself in float32 at the labelled positions."""
    wanted_MV, targets_M = labelled_logits(load_model(source), batches)
    rows = []
    for precision in precisions:
        got_MV, _ = labelled_logits(load_model(source, precision=precision), batches)
        rows.append({"precision": precision, "tokens": len(targets_M)} | distance(got_MV, wanted_MV, targets_M))
    if importlib.util.find_spec("gguf"):
        got_MV, _ = labelled_logits(as_q4_0_(load_model(source)), batches)
        rows.append({"precision": "llama.cpp Q4_0"} | distance(got_MV, wanted_MV, targets_M))
    return rows


@torch.no_grad()
def as_q4_0_(model: MultimodalLLM) -> MultimodalLLM:
    """Rounds every matrix of a float language model to llama.cpp's Q4_0, as our GGUF files do; activations stay float32."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_0
    for parameter in model.language_model.parameters():
        if parameter.ndim > 1:
            stored = quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(quants.dequantize(stored, kind)))
    return model


@torch.inference_mode()
def labelled_logits(model: MultimodalLLM, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Logits (M, V) of the labelled positions of all batches, and their tokens."""
    logits, targets = [], []
    for batch in batches:
        x_BTD = model.language_model(model.embed(batch.ids_BT, batch.pixels_N3SS))
        is_target = batch.labels_BT[:, 1:] != IGNORED
        logits.append(model.language_model.logits(x_BTD[:, :-1][is_target]))
        targets.append(batch.labels_BT[:, 1:][is_target])
    return torch.cat(logits), torch.cat(targets)


def distance(got_MV: Tensor, wanted_MV: Tensor, targets_M: Tensor) -> dict[str, float]:
    """Relative error of the logits, Kullback-Leibler divergence (nats per token), share of equal argmaxes, and loss."""
    log_got_MV, log_wanted_MV = got_MV.log_softmax(-1), wanted_MV.log_softmax(-1)
    divergence_M = (log_wanted_MV.exp() * (log_wanted_MV - log_got_MV)).sum(-1)
    return {
        "error": float((got_MV - wanted_MV).norm() / wanted_MV.norm()),
        "divergence": float(divergence_M.mean()),
        "same_first": float((got_MV.argmax(-1) == wanted_MV.argmax(-1)).float().mean()),
        "loss": float(torch.nn.functional.cross_entropy(got_MV, targets_M)),
    }
