"""int8 products on a GPU: few rows by a Triton kernel that widens the weights in registers, many rows by torch.

torch has no product of bfloat16 rows with int8 weights that reads only the int8, and widening the matrix first writes
twice what int8 saves. The kernel multiplies what it has just read and applies the scale last.
It has not been run on a GPU yet; tests interpret it, and compile it for three GPUs.

M rows, O outputs, K inputs.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.errors import RunError
from mmllm.runtime.console import stderr_rank0

MAX_ROWS = 16  # with more rows a matrix product is faster, in spite of the widened weights
BLOCK_O = 16


def int8_linear(x: Tensor, q_OK: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """x (..., K) times the int8 rows, scaled: (..., O), in the dtype of x."""
    x_MK = x.reshape(-1, x.shape[-1])
    if len(x_MK) <= MAX_ROWS and native(x.device):
        y_MO = few_rows(x_MK.contiguous(), q_OK, scale_O)
    else:
        y_MO = F.linear(x_MK, q_OK.to(x.dtype)).float() * scale_O
    y_MO = y_MO if bias_O is None else y_MO + bias_O
    return y_MO.to(x.dtype).unflatten(0, x.shape[:-1])


@functools.cache
def native(device: torch.device) -> bool:
    """Whether the Triton kernel compiles here and is right. Prints one line that says so, or why torch is used."""
    if device.type != "cuda":
        return False
    try:
        self_test(device)
    except Exception as error:  # whatever a compiler may raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        stderr_rank0(f"kernels: torch's own products of int8 on {device} ({reason})")
        return False
    stderr_rank0(f"kernels: our own for int8 on {device} (Triton)")
    return True


def self_test(device: torch.device) -> None:
    """RunError unless the kernel gives what its formula says, on shapes with every remainder."""
    rng = torch.Generator().manual_seed(0)
    x_MK = torch.randn(5, 300, generator=rng).to(device, torch.bfloat16)
    q_OK = torch.randint(-127, 128, (37, 300), generator=rng, dtype=torch.int8).to(device)
    scale_O = torch.rand(37, generator=rng).to(device)
    wanted_MO = x_MK.double() @ (q_OK * scale_O[:, None]).double().T
    error = float((few_rows(x_MK, q_OK, scale_O) - wanted_MO).norm() / wanted_MO.norm())
    if not error < 1e-5:
        raise RunError(f"the kernel is wrong by {error:.1e}")


def few_rows(x_MK: Tensor, q_OK: Tensor, scale_O: Tensor) -> Tensor:
    """The product in float32; a program makes 16 outputs of all rows, so that every weight is read once."""
    rows, outputs = len(x_MK), len(q_OK)
    y_MO = torch.empty(rows, outputs, device=x_MK.device)
    block_m = 1 << (rows - 1).bit_length()
    grid = ((outputs + BLOCK_O - 1) // BLOCK_O,)
    block_k = max(32, 512 // block_m)  # keeps the size of a program's registers constant
    kernel()[grid](x_MK, q_OK, scale_O, y_MO, rows, outputs, x_MK.shape[1], block_m, BLOCK_O, block_k)
    return y_MO


@functools.cache
def kernel() -> Callable:
    import triton  # not installed everywhere
    import triton.language as tl

    @triton.jit
    def product(
        x, q, scale, y, rows_m, rows_o, width, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for first in range(0, width, BLOCK_K):
            inside = first + k < width
            w_at = q + o[:, None].to(tl.int64) * width + first + k[None, :]
            weights = tl.load(w_at, mask=(o[:, None] < rows_o) & inside[None, :], other=0)
            x_at = x + m[:, None] * width + first + k[None, :]
            xs = tl.load(x_at, mask=(m[:, None] < rows_m) & inside[None, :], other=0.0)
            products = weights.to(tl.float32)[None, :, :] * xs.to(tl.float32)[:, None, :]
            sums += tl.sum(products, axis=2)
        scales = tl.load(scale + o, mask=o < rows_o, other=0.0)
        is_there = (m[:, None] < rows_m) & (o[None, :] < rows_o)
        tl.store(y + m[:, None] * rows_o + o[None, :], sums * scales[None, :], mask=is_there)

    return product
