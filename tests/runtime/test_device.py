"""The devices, and the memory that they say is used."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how Linux counts")

GREEDY = """
import subprocess, sys
held = b"x" * 2_000_000_000
del held
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
FORGETFUL = """
import torch
from mmllm.runtime.memory import forget_peak, peak_memory
cpu, held = torch.device("cpu"), b"x" * 500_000_000
before = peak_memory(cpu)
del held
forget_peak(cpu)
print(before, peak_memory(cpu))
"""
PEAK = "import torch; from mmllm.runtime.memory import peak_memory; print(peak_memory(torch.device('cpu')))"


@pytest.mark.slow
def test_a_process_does_not_count_what_held_the_one_that_started_it():
    said = subprocess.run([sys.executable, "-c", GREEDY, PEAK], check=True, capture_output=True, text=True).stdout
    assert 20e6 < int(said) < 1.5e9


def test_a_peak_that_is_over_can_be_forgotten():
    said = subprocess.run([sys.executable, "-c", FORGETFUL], check=True, capture_output=True, text=True).stdout
    before, after = map(int, said.split())
    assert after < before - 400e6


WEIGHTS = """
import torch
from torch import nn
from mmllm.runtime.memory import forget_peak, keep_freed_memory, peak_memory
from mmllm.training.prepare import cast_
cpu = torch.device("cpu")
weights = [nn.Parameter(torch.ones(n, 2**20), False) for n in (4, 16, 8, 12, 10)]
keep_freed_memory(cpu)
for _ in range(3):
    cast_(weights, torch.bfloat16)
    forget_peak(cpu)
    small = peak_memory(cpu)
    cast_(weights, torch.float32)
print((peak_memory(cpu) - small) / 2**20)
"""


def test_weights_that_come_in_another_precision_leave_no_gaps():
    """50 M numbers: 100 MB as bfloat16, 200 MB as float32, and never much more than that."""
    said = subprocess.run([sys.executable, "-c", WEIGHTS], check=True, capture_output=True, text=True).stdout
    assert 95 < float(said) < 125
