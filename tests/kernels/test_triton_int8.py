"""int8 products in bfloat16 against their formula: on a GPU by the Triton kernel, anywhere by torch."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from mmllm.errors import RunError
from mmllm.kernels import triton_int8
from mmllm.kernels.triton_int8 import int8_linear


def relative_error(rows: int, device: str) -> float:
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 300, generator=rng).bfloat16()
    q = torch.randint(-127, 128, (37, 300), generator=rng, dtype=torch.int8)
    scale, bias = torch.rand(37, generator=rng), torch.randn(37, generator=rng)
    wanted = x.double() @ (q * scale[:, None]).double().T + bias
    got = int8_linear(*(tensor.to(device) for tensor in (x, q, scale, bias)))
    assert got.dtype == torch.bfloat16
    return float((got.cpu() - wanted).norm() / wanted.norm())


def test_torchs_product_of_many_rows_applies_the_scale_to_exact_integers():
    assert relative_error(20, "cpu") < 0.005, "the result is rounded to bfloat16, and the integers are exact there"


def test_a_kernel_that_does_not_compile_or_is_wrong_is_not_used_and_one_line_says_so(monkeypatch, capsys):
    def does_not_compile(*arguments):
        raise ValueError("no such target\nand much more")

    monkeypatch.setattr(triton_int8, "self_test", does_not_compile)
    assert not triton_int8.native.__wrapped__(torch.device("cuda"))
    said = capsys.readouterr().err
    assert said == "kernels: torch's own products of int8 on cuda (ValueError: no such target)\n"
    monkeypatch.undo()
    with monkeypatch.context() as patch, pytest.raises(RunError, match="the kernel is wrong by 1.0e-01"):
        patch.setattr(triton_int8, "few_rows", lambda x, q, scale: 1.1 * (x.float() @ (q * scale[:, None]).T))
        triton_int8.self_test(torch.device("cpu"))


INTERPRETED = """
import torch
from mmllm.kernels.triton_int8 import few_rows

rng, worst = torch.Generator().manual_seed(0), 0.0
for rows in range(1, 17):
    for outputs, inputs in ((37, 300), (16, 512), (33, 31), (1, 1)):
        x = torch.randn(rows, inputs, generator=rng).bfloat16()
        q = torch.randint(-127, 128, (outputs, inputs), generator=rng, dtype=torch.int8)
        scale = torch.rand(outputs, generator=rng)
        wanted = x.double() @ (q * scale[:, None]).double().T
        worst = max(worst, float((few_rows(x, q, scale) - wanted).norm() / wanted.norm()))
print(worst)
"""


@pytest.mark.slow
def test_the_interpreted_kernel_gives_the_formula_for_every_number_of_rows_and_every_remainder():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED]
    worst = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert 0 < float(worst) < 3e-7


@pytest.mark.parametrize("capability", [80, 90, 100])  # A100, H100, B200
@pytest.mark.parametrize("rows, block_k", [(1, 512), (16, 32)])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(capability, rows, block_k, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": "*bf16", "q": "*i8", "scale": "*fp32", "y": "*fp32", "rows_m": "i32", "rows_o": "i32", "width": "i32"}
    sizes = {"BLOCK_M": rows, "BLOCK_O": triton_int8.BLOCK_O, "BLOCK_K": block_k}
    source = compiler.ASTSource(triton_int8.kernel(), types | dict.fromkeys(sizes, "constexpr"), sizes)
    made = triton.compile(source, target=target)
    assert f"sm_{capability}" in made.asm["ptx"] and made.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
def test_the_kernel_for_few_rows_gives_the_formula(rows):
    assert relative_error(rows, "cuda") < 0.005
