"""What every test shares: seeds, one thread per process, and the folder of real inputs where there is one."""

import os
import random
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported; child processes inherit it

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MMLLM_SHARED", ROOT.parent / "shared" / "data"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Seeds every generator and goes back to one thread, before a test and before the fixtures it is the first to use.

    The models of the tests are so small that more threads only wait for each other.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The directory of a small model with long answers."""
    from official import write_model

    return write_model(tmp_path_factory.mktemp("served"), max_position_embeddings=32768)


@pytest.fixture(scope="session")
def pipeline(folder):
    from mmllm.inference.pipeline import load_pipeline

    return load_pipeline(folder, device="cpu")


@pytest.fixture(scope="module")
def client(pipeline):
    """A client of a server of that model."""
    from starlette.testclient import TestClient

    from server_process import app, wait_until_loaded

    with TestClient(app(pipeline), raise_server_exceptions=False) as client:
        yield wait_until_loaded(client)


@pytest.fixture
def shared():
    """A function: name of a file of real inputs -> its path; the test is skipped, by that name, where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs the real file {name}")
        return SHARED / name

    return find
