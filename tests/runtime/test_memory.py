"""Peak memory is that of this process, and weights that change precision leave no gaps."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how Linux counts")

PARENT = """
import subprocess, sys
held = b"x" * 1_600_000_000
del held
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
PEAK = "import torch; from mmllm.runtime.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
WEIGHTS = """
import torch
from torch import nn
from mmllm.runtime.memory import keep_freed_memory
from mmllm.training.prepare import cast_

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0])

weights = [nn.Parameter(torch.ones(n, 2**20), False) for n in (4, 16, 8, 12, 10)]
keep_freed_memory(torch.device("cpu"))
for _ in range(3):
    cast_(weights, torch.bfloat16)
    small = resident()
    cast_(weights, torch.float32)
print((resident() - small) / 2**10)
"""


def output_of(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_process_does_not_count_the_peak_of_the_one_that_started_it():
    assert 20e6 < int(output_of(PARENT, PEAK)) < 1.4e9


@pytest.mark.slow
def test_weights_that_change_precision_leave_no_gaps():
    """50 Mi numbers: 100 MiB as bfloat16, 200 MiB as float32, and nothing in between stays."""
    assert 95 < float(output_of(WEIGHTS)) < 125


@pytest.mark.slow
def test_a_system_without_the_resource_module_has_no_peak():
    program = "import pathlib, sys, torch\nsys.modules['resource'] = None\npathlib.Path.exists = lambda self: False\n"
    done = subprocess.run([sys.executable, "-c", program + PEAK], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
