"""A safetensors file from several hands has the bytes that the library writes alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.runtime.distributed import World
from mmllm.storage.sharded_file import DTYPES, create, layout, own_pieces, write_pieces


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    drawn = {f"w.{dtype}": (50 * torch.randn(7, 3, generator=rng)).to(dtype) for dtype in DTYPES}
    shapes = {"no axis": (), "one row": (1, 5), "no row": (0, 3), "é": (2,), "cube": (5, 2, 2), "turned": (3, 4)}
    drawn |= {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return drawn | {"turned": drawn["turned"].T}


def write(path: Path, processes: int, metadata: dict[str, str]) -> None:
    plan = layout(tensors(), metadata)
    create(path, plan)
    for rank in reversed(range(processes)):
        write_pieces(path, own_pieces(tensors(), plan, World(torch.device("cpu"), rank, processes)))


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_any_number_of_processes_writes_the_file_of_the_library(tmp_path, processes, metadata):
    save_file({n: value.contiguous() for n, value in tensors().items()}, tmp_path / "theirs", metadata or None)
    write(tmp_path / "ours", processes, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_larger_than_one_write_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("mmllm.storage.sharded_file.BYTES_PER_WRITE", 10)
    write(tmp_path / "ours", 2, {})
    assert all(torch.equal(value, tensors()[name]) for name, value in load_file(tmp_path / "ours").items())
