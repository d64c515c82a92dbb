"""One safetensors file, written by several processes at once.

The surprising fact: nothing has to be gathered. A tensor's rows lie one after the other in the file, so each process puts
its own where they belong, and the bytes are those that one process alone would have written. Where all have the whole
tensor, each writes its share of it.

Format: https://huggingface.co/docs/safetensors (eight bytes of length, a JSON header, the numbers). Next: saving.py.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmllm.runtime.distributed import World, local, row_range

DTYPES = {  # in the order in which the library writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
AT_ONCE = 2**26  # bytes of one write
Piece = tuple[int, Tensor]  # rows, and the byte of the file where they begin


@dataclass(frozen=True)
class Layout:
    """A safetensors file before its numbers are there: the header, and the byte where each tensor begins."""

    header: bytes
    begins: dict[str, int]
    size: int


def layout(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Layout:
    """Where `safetensors.torch.save_file` would put each of the tensors."""
    kinds = list(DTYPES)
    ordered = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    entries: dict = {"__metadata__": metadata} if metadata else {}
    places, size = {}, 0
    for name in ordered:
        places[name], tensor = size, tensors[name]
        size += tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], size],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Layout(header, {name: len(header) + place for name, place in places.items()}, len(header) + size)


def create(path: Path, plan: Layout) -> None:
    """The file with its header and room for the numbers."""
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)


def own_pieces(tensors: Mapping[str, Tensor], plan: Layout, world: World) -> list[Piece]:
    """What this process writes: its rows of what is spread, and its share of what every process has."""
    pieces = []
    for name, tensor in tensors.items():
        tensor = tensor.detach() if tensor.ndim else tensor.detach()[None]
        begin, end = row_range(len(tensor), world)
        part = local(tensor) if isinstance(tensor, DTensor) else tensor[begin:end]
        row_bytes = tensor.numel() * tensor.element_size() // max(1, len(tensor))
        pieces.append((plan.begins[name] + begin * row_bytes, part))
    return [(place, part) for place, part in pieces if part.numel()]


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Puts the pieces into the file and waits until they are on disk. Other processes may write at the same time."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for place, part in pieces:
            content = memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            while len(content):
                written = os.pwrite(descriptor, content[:AT_ONCE], place)
                place, content = place + written, content[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
