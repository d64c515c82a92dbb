"""Run by torchrun from test_distributed.py: the gradient of one step of all processes, for each way of training.

split_gradient.py WORLD_FOLDER OUT.safetensors SIZE     SIZE: rows of a micro-batch in each process
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmllm.batches import Batch, make_batch, read_row
from mmllm.chat import IGNORED
from mmllm.config import LoraConfig
from mmllm.data import load_samples
from mmllm.distributed import World
from mmllm.errors import run
from mmllm.lora import add_lora_
from mmllm.model import MultimodalLLM
from mmllm.quant import quantize_
from mmllm.surgery import train_only_
from mmllm.trainer import accumulate_gradients, step_counts

WAYS = {"stage 1": ["multi_modal_projector"]} | dict.fromkeys(
    ("full", "lora", "int8"), ["multi_modal_projector", "language_model"]
)


def model_for(folder: Path, way: str) -> MultimodalLLM:
    model = MultimodalLLM.from_towers(folder / "clip", folder / "qwen")
    if way == "int8":
        quantize_(model.language_model)
    if way in ("lora", "int8"):
        add_lora_(model.language_model, LoraConfig(r=4, lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.fill_(0.02)
    model = model.to(torch.float64)
    train_only_(model, WAYS[way])
    return model


def rows_of(folder: Path, model: MultimodalLLM) -> list[Batch]:
    """Eight rows of different lengths; the last four learn nothing, and the last two have no picture either."""
    samples = load_samples(folder / "train.json", folder / "images")[:8]
    rows = [make_batch([read_row(sample, model.processor)], model.processor) for sample in samples]
    for i, row in enumerate(rows):
        if i >= 4:
            row.labels_BT.fill_(IGNORED)
        if i >= 6:
            text = row.ids_BT[row.ids_BT != model.config.image_token_id][None]
            rows[i] = Batch(text, torch.full_like(text, IGNORED), row.pixels_N3SS[:0])
    return rows


def joined(rows: list[Batch], pad_id: int) -> Batch:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row.ids_BT[0] for row in rows], batch_first=True, padding_value=pad_id)
    labels = pad([row.labels_BT[0] for row in rows], batch_first=True, padding_value=IGNORED)
    return Batch(ids, labels, torch.cat([row.pixels_N3SS for row in rows]))


def gradients(world: World, folder: Path, size: int) -> dict[str, torch.Tensor]:
    """Each process takes its half of the rows, in micro-batches of `size`."""
    found = {}
    for way in WAYS:
        model = model_for(folder, way)
        share = 8 // world.size
        rows = rows_of(folder, model)[world.rank * share : (world.rank + 1) * share]
        pad_id = model.processor.tokenizer.pad_id
        batches = [joined(rows[i : i + size], pad_id) for i in range(0, share, size)]
        targets = world.sum(step_counts(batches))[0]
        loss = accumulate_gradients(model, batches, targets=targets)
        world.sum_([loss])
        world.sum_gradients_(model.parameters())
        found |= {f"{way} {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[f"{way} loss"] = loss
    return found


def main() -> None:
    torch.set_num_threads(1)
    with World.start("cpu") as world:
        result = gradients(world, Path(sys.argv[1]), int(sys.argv[3]))
        if world.is_first:
            save_file(result, sys.argv[2])


if __name__ == "__main__":
    run(main)
