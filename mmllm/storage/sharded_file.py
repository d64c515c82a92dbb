"""One safetensors file, written by several processes at once.

Nothing has to be gathered: the rows of a tensor lie one after the other in the file, so each process writes its own rows
where they belong, and the bytes are those that `save_file` would write. Of a tensor that every process has in full, each
writes its share.

Format: https://huggingface.co/docs/safetensors (eight bytes of length, a JSON header, the numbers).
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
BYTES_PER_WRITE = 2**26
Piece = tuple[int, Tensor]  # rows, and the byte of the file where they begin


@dataclass(frozen=True)
class Layout:
    """A safetensors file without its numbers: the header, the byte where each tensor begins, the size of the file."""

    header: bytes
    begins: dict[str, int]
    size: int


def layout(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Layout:
    """Where `safetensors.torch.save_file` would put each of the tensors."""
    kinds = list(DTYPES)
    entries: dict = {"__metadata__": metadata} if metadata else {}
    begins, size = {}, 0
    for name in sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name)):
        tensor, begin = tensors[name], size
        begins[name], size = begin, begin + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, size]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Layout(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + size)


def create(path: Path, plan: Layout) -> None:
    """The file with its header and room for the numbers."""
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)


def own_pieces(tensors: Mapping[str, Tensor], plan: Layout, world: World) -> list[Piece]:
    """What this process writes: its rows of a sharded tensor, its share of a tensor that every process has in full."""
    pieces = []
    for name, tensor in tensors.items():
        tensor = tensor.detach() if tensor.ndim else tensor.detach()[None]
        begin, end = row_range(len(tensor), world)
        part = local(tensor) if isinstance(tensor, DTensor) else tensor[begin:end]
        row_bytes = tensor.nbytes // max(1, len(tensor))
        pieces.append((plan.begins[name] + begin * row_bytes, part))
    return [(at, part) for at, part in pieces if part.numel()]


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Write the pieces into the file and wait until they are on disk. Other processes may write at the same time."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for at, part in pieces:
            content = memoryview(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            while len(content):
                written = os.pwrite(descriptor, content[:BYTES_PER_WRITE], at)
                at, content = at + written, content[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
