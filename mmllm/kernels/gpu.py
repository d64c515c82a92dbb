"""The Triton kernels as functions of tensors: int8 products, and one decoding step of a language model.

A step in torch's operators is 1,100 kernels of about two microseconds, in which the GPU mostly waits. Here a layer is six:
queries, keys and values; attention and the sum of its parts; its projection; gate and up; down. int8 weights are widened
in registers, so that a step reads half of bfloat16's bytes. Every row is computed alone, whatever the others hold.

B rows, D hidden size, O outputs, I inputs, S slots of the cache, C its capacity in tokens, H query heads,
G key heads, K head size, V vocabulary.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.errors import RunError
from mmllm.runtime.console import stderr_rank0

MAX_ROWS = 64  # of an int8 product by our kernel; with more a product of widened weights is faster
KEYS = 32  # that a program of `attend` reads at once


@dataclass(frozen=True)
class Matrix:
    """Rows (O, I) in a float dtype, or in int8 with the scale (O) of each; a bias (O) or None."""

    rows: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    qkv: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


def project(
    x: Tensor, matrix: Matrix, y: Tensor, dtype: torch.dtype, *, norm: Tensor | None = None, eps: float = 0.0,
    gate: Matrix | None = None, is_added: bool = False,
) -> Tensor:  # fmt: skip
    """Writes y (B, O) = x (B, I) times the matrix, its inputs in `dtype`, and returns it; see the kernel.

    With `gate`: silu(x gate) * (x matrix).
    """
    from mmllm.kernels import triton_kernels as kernels

    first, second = (gate, matrix) if gate else (matrix, None)
    (rows, outs), width = y.shape, matrix.rows.shape[1]
    block_rows, block_outs, block_width, warps = blocks(rows, outs, width, first.rows.dtype, dtype)
    kernels.project[(-(-outs // block_outs), -(-rows // block_rows))](
        x, norm, first.rows, first.scale, first.bias, second and second.rows, second and second.scale, y,
        rows, outs, width, eps, ADD=is_added, DTYPE=triton_dtype(dtype), ROWS=block_rows,
        OUTS=block_outs, WIDTH=block_width, num_warps=warps,
    )  # fmt: skip
    return y


def blocks(rows: int, outs: int, width: int, held: torch.dtype, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows, outputs, columns and warps of a program of `project`: the fastest of some ten on an H100, at the shapes of
    Qwen2.5-0.5B, where `outs` are at most 1,152 or at least 4,864."""
    is_wide, is_head, is_int8 = width > 2048, outs > 8192, held == torch.int8
    if rows == 1:
        if is_head:
            return (1, 16, 256, 4) if is_int8 else (1, 4, 512, 2)
        if outs > 2048:
            return (1, 8, 256, 4) if is_int8 else (1, 4, 1024, 4)
        return 1, 2, 1024, 4
    if dtype == torch.float32:  # whose blocks are twice as large
        return 16 if rows <= 16 else 64, 32, 64, 4
    if rows <= 16:
        return (16, 64, 128, 4) if outs > 2048 else (16, 16, 512, 4) if is_wide else (16, 16, 128, 2)
    if outs > 2048:
        return (64, 128, 64, 4) if is_head else (64, 64, 128, 8)
    return (64, 16, 256, 4) if outs < 1024 else (64, 64, 64, 4)


def triton_dtype(dtype: torch.dtype) -> object:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, rope: tuple[Tensor, Tensor], heads: int,
    dtype: torch.dtype, norms: tuple[Tensor | None, Tensor | None] = (None, None), eps: float = 0.0, is_alone: bool = True,
) -> Tensor:  # fmt: skip
    """Puts the new keys and values into the cache (S, G, C, K) and returns the attention of each row, (B, H K)."""
    from mmllm.kernels import triton_kernels as kernels

    rows, (_, groups, capacity, size) = len(qkv), keys.shape
    parts = max(1, min(16, 128 // (1 << (rows * groups - 1).bit_length())))  # so that few rows, too, fill the GPU
    y = torch.empty(rows, heads * size, device=qkv.device, dtype=dtype)
    x = y if parts == 1 else torch.empty(rows, parts, heads, size, device=qkv.device)
    tops, totals = torch.empty(2, rows, parts, heads, device=qkv.device)
    shape = {"HEADS": heads, "HEAD": size}
    if not is_alone:
        kernels.store[rows, groups](
            qkv, norms[1], *rope, keys, values, slots_B, positions_B, capacity, eps, GROUPS=groups, num_warps=1, **shape
        )
    kernels.attend[rows, groups, parts](
        qkv, *norms, *rope, keys, values, slots_B, positions_B, x, tops, totals, capacity, eps, size**-0.5, GROUPS=groups,
        PARTS=parts, QUERIES=max(16, 1 << (heads // groups - 1).bit_length()), KEYS=KEYS, STORES=is_alone, **shape,
    )  # fmt: skip
    if parts > 1:
        kernels.join[rows, heads](x, tops, totals, y, PARTS=parts, num_warps=1, **shape)
    return y


@dataclass(frozen=True)
class Step:
    """The layers of a language model; `dtype` is that of the inputs of its products."""

    layers: list[Layer]
    norm: Tensor
    head: Matrix
    eps: float
    num_heads: int
    dtype: torch.dtype

    def __call__(
        self, x_BD: Tensor, slots_B: Tensor, positions_B: Tensor, keys: Tensor, values: Tensor,
        rope: tuple[Tensor, Tensor], keep_M: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (B, V) of what follows the tokens x_BD (float32, overwritten), which go to `positions_B` of `slots_B`.

        A row at -1 takes no part: nothing of the cache is changed, and its logits mean nothing. Without `keep_M` each row
        has a slot of its own; with it rows of a slot follow each other, and only the logits of these rows are returned,
        (M, V). `rope`: cosines and sines (C, K) of `rope_tables`.
        """
        rows, device = len(x_BD), x_BD.device
        for i, layer in enumerate(self.layers):
            qkv = torch.empty(rows, len(layer.qkv.rows), device=device)
            project(x_BD, layer.qkv, qkv, self.dtype, norm=layer.norm, eps=self.eps)
            seen = attend(
                qkv, keys[i], values[i], slots_B, positions_B, rope, self.num_heads, self.dtype,
                (layer.q_norm, layer.k_norm), self.eps, keep_M is None,
            )  # fmt: skip
            project(seen, layer.o, x_BD, self.dtype, is_added=True)
            gated = torch.empty(rows, len(layer.up.rows), device=device, dtype=self.dtype)
            project(x_BD, layer.up, gated, self.dtype, norm=layer.mlp_norm, eps=self.eps, gate=layer.gate)
            project(gated, layer.down, x_BD, self.dtype, is_added=True)
        x_MD = x_BD if keep_M is None else x_BD.index_select(0, keep_M)
        logits = torch.empty(len(x_MD), len(self.head.rows), device=device)
        return project(x_MD, self.head, logits, self.dtype, norm=self.norm, eps=self.eps)


def int8_linear(x: Tensor, q_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """x (..., I) times the int8 rows, scaled: (..., O), in the dtype of x."""
    x_BI = x.reshape(-1, x.shape[-1])
    if len(x_BI) <= MAX_ROWS and native(x.device):
        y_BO = torch.empty(len(x_BI), len(q_OI), device=x.device, dtype=x.dtype)
        project(x_BI.contiguous(), Matrix(q_OI, scale_O, bias_O), y_BO, x.dtype)
    else:
        y_BO = F.linear(x_BI, q_OI.to(x.dtype)).float() * scale_O
        y_BO = y_BO if bias_O is None else y_BO + bias_O
    return y_BO.to(x.dtype).unflatten(0, x.shape[:-1])


@functools.cache
def native(device: torch.device) -> bool:
    """Whether the Triton kernels compile here and are right. Prints one line that says so, or why torch is used."""
    if device.type != "cuda":
        return False
    try:
        self_test(device)
    except Exception as error:  # whatever a compiler may raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        stderr_rank0(f"kernels: torch's own on {device} ({reason})")
        return False
    stderr_rank0(f"kernels: our own on {device} (Triton)")
    return True


def self_test(device: torch.device) -> None:
    """RunError unless both kernels give what their formulas say, on shapes with every remainder."""
    for rows in (1, 5, 65):
        exact = [
            *project_and_formula(rows, device),
            *attend_and_formula(rows, device),
            *attend_and_formula(rows, device, is_alone=False),
        ]
        rounded = project_and_formula(rows, device, torch.bfloat16)  # other blocks, which compile by themselves
        for found, bound in ((exact, 1e-5), (rounded, 5e-3)):
            for what, got, wanted in found:
                error = float((got.double() - wanted).norm() / wanted.norm())
                if not error < bound:
                    raise RunError(f"{what} is wrong by {error:.1e}")


def project_and_formula(
    rows: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[tuple[str, Tensor, Tensor]]:
    """What `project` gives with everything at once, its products in `dtype`, and its formula in float64.

    In bfloat16 the blocks are those of Qwen2.5-0.5B's MLP.
    """
    rng = torch.Generator().manual_seed(rows)
    outs = 37 if dtype == torch.float32 else 2085

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    def matrix() -> Matrix:
        q = torch.randint(-127, 128, (outs, 300), generator=rng, dtype=torch.int8).to(device)
        return Matrix(q, random(outs).abs() / 1000, None)

    up, gate, x, norm, y = matrix(), matrix(), random(rows, 300), random(300), random(rows, outs)
    gate = Matrix(gate.rows, gate.scale, random(outs))
    normal = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm
    sums = [normal @ (each.rows * each.scale[:, None]).double().T for each in (gate, up)]
    wanted = y + F.silu(sums[0] + gate.bias) * sums[1]
    return [("a product", project(x, up, y, dtype, norm=norm, eps=1e-6, gate=gate, is_added=True), wanted)]


def attend_and_formula(rows: int, device: torch.device, is_alone: bool = True) -> list[tuple[str, Tensor, Tensor]]:
    """What `attend` gives, and what the cache holds then; beside them the formulas in float64.

    Not `is_alone`: the rows are tokens of one slot that follow each other.
    """
    rng = torch.Generator().manual_seed(rows)
    groups, heads, size, capacity = 2, 6, 16, 80
    qkv, keys, values = (
        torch.randn(*shape, generator=rng).to(device)
        for shape in ((rows, heads + 2 * groups, size), *[(rows + 1, groups, capacity, size)] * 2)
    )
    rope = torch.randn(2, capacity, size, generator=rng).to(device)
    slots, positions = torch.arange(rows) + 1, torch.tensor([70, 0, 33, 5, 64])[torch.arange(rows) % 5]
    if not is_alone:
        slots, positions = torch.ones(rows, dtype=torch.long), torch.arange(rows) + 9
    slots, positions = slots.to(device), positions.to(device)
    cos, sin = (table[positions][:, None].double() for table in rope)
    q, k = (x.double() * cos + x.double().roll(size // 2, -1) * sin for x in (qkv[:, :heads], qkv[:, heads:-groups]))
    all_keys, all_values, wanted = keys.double(), values.double(), []
    all_keys[slots, :, positions], all_values[slots, :, positions] = k, qkv[:, -groups:].double()
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        ks, vs = all_keys[slot, :, : position + 1], all_values[slot, :, : position + 1]
        scores = torch.einsum("grk,gnk->grn", q[row].unflatten(0, (groups, -1)), ks) / size**0.5
        wanted.append(torch.einsum("grn,gnk->grk", scores.softmax(-1), vs).flatten())
    where = slots, positions, tuple(rope), heads, torch.float32
    y = attend(qkv.flatten(1), keys, values, *where, is_alone=is_alone)
    return [("attention", y, torch.stack(wanted)), ("a key", keys, all_keys), ("a value", values, all_values)]
