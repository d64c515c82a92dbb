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
from mmllm.device import forget_peak, peak_memory
cpu, held = torch.device("cpu"), b"x" * 500_000_000
before = peak_memory(cpu)
del held
forget_peak(cpu)
print(before, peak_memory(cpu))
"""
PEAK = "import torch; from mmllm.device import peak_memory; print(peak_memory(torch.device('cpu')))"


def test_a_process_does_not_count_what_held_the_one_that_started_it():
    said = subprocess.run([sys.executable, "-c", GREEDY, PEAK], check=True, capture_output=True, text=True).stdout
    assert 20e6 < int(said) < 1.5e9


def test_a_peak_that_is_over_can_be_forgotten():
    said = subprocess.run([sys.executable, "-c", FORGETFUL], check=True, capture_output=True, text=True).stdout
    before, after = map(int, said.split())
    assert after < before - 400e6
