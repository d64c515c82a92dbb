"""What every test may use: the folder of real inputs, where there is one."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MMLLM_SHARED", ROOT.parent / "shared" / "data"))


@pytest.fixture
def shared():
    """A function: name of a file of real inputs -> its path; the test is skipped, by that name, where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs the real file {name}")
        return SHARED / name

    return find


@pytest.fixture(scope="module")
def one_thread():
    """So small a model is only slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
