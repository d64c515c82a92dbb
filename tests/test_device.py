"""The devices, and the memory that they say is used."""

import subprocess
import sys

GREEDY = """
import subprocess, sys
held = b"x" * 2_000_000_000
del held
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
PEAK = "import torch; from mmllm.device import peak_memory; print(peak_memory(torch.device('cpu')))"


def test_a_process_does_not_count_what_held_the_one_that_started_it():
    said = subprocess.run([sys.executable, "-c", GREEDY, PEAK], check=True, capture_output=True, text=True).stdout
    assert 20e6 < int(said) < 1.5e9
