"""How far the answers of a model move in each precision: `mmllm precision --model DIR --data FILE`.

The surprising fact: the error of a logit says little. A model of random weights makes 20 % of it out of a rounding of
0.8 %; what counts is how often another word comes first, and how far the distributions are apart where words are learnt.

One JSON line a precision: relative error of the logits, Kullback-Leibler divergence from float32 (nats a token), share of
positions where the likeliest token is the same, and the loss. Next: fast.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from mmllm.config.schema import PRECISIONS
from mmllm.data.batches import Batch
from mmllm.data.chat import IGNORED
from mmllm.inference.optimize import load_model
from mmllm.models.multimodal import MultimodalLLM


def compare(source: str | Path, batches: list[Batch], precisions: tuple[str, ...] = PRECISIONS) -> list[dict]:
    """A row for each of `precisions`: the model in `source` against itself in float32, on the labelled positions."""
    wanted_MV, targets_M = labelled_logits(load_model(source), batches)
    rows = []
    for precision in precisions:
        got_MV, _ = labelled_logits(load_model(source, precision=precision), batches)
        rows.append({"precision": precision, "tokens": len(targets_M)} | distance(got_MV, wanted_MV, targets_M))
    return rows


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
    log_got_MV, log_wanted_MV = got_MV.log_softmax(-1), wanted_MV.log_softmax(-1)
    divergence_M = (log_wanted_MV.exp() * (log_wanted_MV - log_got_MV)).sum(-1)
    return {
        "error": float((got_MV - wanted_MV).norm() / wanted_MV.norm()),
        "divergence": float(divergence_M.mean()),
        "same_first": float((got_MV.argmax(-1) == wanted_MV.argmax(-1)).float().mean()),
        "loss": float(torch.nn.functional.cross_entropy(got_MV, targets_M)),
    }
