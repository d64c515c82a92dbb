"""int8 products in bfloat16 against their formula: on a GPU by the Triton kernel, anywhere by torch."""

import pytest
import torch

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
def test_the_kernel_for_few_rows_gives_the_formula(rows):
    assert relative_error(rows, "cuda") < 0.005
