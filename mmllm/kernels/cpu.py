"""Our own products on the CPU (cpu.cpp): built on first use, proved before they are used, and what to do without them.

The surprising fact: a C++ compiler is worth a factor of two, and the formula is the same without one. The integer products
of cpu.cpp are also what `torch._int_mm` computes, so `int8` gives the same bits on every machine.

The library is kept in the user's cache folder under a name made of the source, torch's version, and the processor.
Formulas: M rows x (K numbers each), O outputs. Next: packed.py.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmllm.errors import RunError
from mmllm.layers.quantized import quantize_int4
from mmllm.runtime.console import stderr_rank0
from mmllm.runtime.machine import cache_folder, processor

SOURCE = Path(__file__).with_suffix(".cpp")
DIGIT = 8  # bits of one signed digit of an activation
LARGEST = {24: 0x7F7F00, 8: 127}  # of an activation as a whole number, by its bits; as in cpu.cpp
LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-fopenmp")


# Build ----------------------------------------------------------------------------------------------------------------


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """The compiled library; RunError says why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise RunError("no C++ compiler; install g++ or set CXX")
    key = "\0".join([SOURCE.read_text(), torch.__version__, compiler, *flags, processor()])
    library = cache_folder() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    stderr_rank0(f"compiling {SOURCE.name} once, about 20 s; kept in {library.parent}")
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    command = [compiler, *flags, *headers, str(SOURCE)]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as unfinished:
            made = Path(unfinished) / library.name
            result = subprocess.run(
                [*command, "-o", made, *LIBRARIES, f"-L{root / 'lib'}"], capture_output=True, text=True
            )
            if result.returncode:
                lines = result.stderr.splitlines()
                reason = next((line for line in lines if "error" in line), "\n".join(lines)[:200])
                raise RunError(f"{compiler} cannot compile {SOURCE.name}: {reason}")
            made.replace(library)  # whole or not at all: others may be building the same
    except OSError as error:
        raise RunError(f"{library}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder") from error
    return library


@functools.cache
def native() -> bool:
    """Whether `torch.ops.mmllm` holds our kernels: compiled, loaded, and right. One line says which, or why not."""
    try:
        torch.ops.load_library(build())
        register_shapes()
        prove()
    except (RunError, OSError) as error:
        stderr_rank0(f"kernels: torch's own products, about half as fast ({str(error).splitlines()[0]})")
        return False
    stderr_rank0(f"kernels: our own ({instructions()})")
    return True


def instructions() -> str:
    flags = processor().split()
    return next((name for flag, name in NAMES.items() if flag in flags), "no vector instructions known by name")


NAMES = {"avx512_vnni": "AVX-512 VNNI", "avx2": "AVX2"}


def register_shapes() -> None:
    """What torch.compile has to know of the operators."""

    for name, shape in {
        "int8_linear": lambda x, panels, scale, bias, bits: scale.numel(),
        "int8_linears": lambda x, panels, scales, biases, bits: sum(scale.numel() for scale in scales),
        "int4_linear": lambda x, panels, scale, bias, out_features: out_features,
        "bf16_linear": lambda x, panels, bias, out_features: out_features,
        "swiglu": lambda x: x.shape[-1] // 2,
        "rms_norm": lambda x, weight, eps: x.shape[-1],
    }.items():
        torch.library.register_fake(f"mmllm::{name}", partial(_last_becomes, shape))


def _last_becomes(shape: Callable[..., int], x: Tensor, *others: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape(x, *others))


def prove() -> None:
    """RunError unless the kernels give what their formulas say, on shapes with every remainder."""
    rng = torch.Generator().manual_seed(0)
    x, bias = torch.randn(11, 44, generator=rng), torch.randn(37, generator=rng)
    x[3, 5] = 30.0
    q = torch.randint(-127, 128, (37, 44), generator=rng, dtype=torch.int8)
    scale = torch.rand(37, generator=rng) + 0.1
    for bits in LARGEST:
        wanted, got = (
            int_mm_linear(x, q, scale, bias, bits),
            torch.ops.mmllm.int8_linear(x, panels(q), scale, bias, bits),
        )
        if not torch.equal(wanted, got):
            raise RunError(f"the int8 kernel is wrong at {bits} bits by {(wanted - got).abs().max():.1e}")
    x2, half = torch.randn(11, 64, generator=rng), torch.randn(37, 44, generator=rng).bfloat16()
    q4, scale4 = quantize_int4(torch.randn(37, 64, generator=rng))
    matrix = (q4.unflatten(1, (-1, 32)) * scale4[..., None].float()).flatten(1)
    gates, ups = x2.double().split(32, 1)
    for name, got, wanted in (
        (
            "int4",
            torch.ops.mmllm.int4_linear(x2, *torch.ops.mmllm.int4_pack(matrix), bias, 37),
            linear(x2, matrix, bias),
        ),
        ("bfloat16", torch.ops.mmllm.bf16_linear(x, bf16_panels(half), bias, 37), linear(x, half, bias)),
        ("SwiGLU", torch.ops.mmllm.swiglu(x2), gates * gates.sigmoid() * ups),
        ("norm", torch.ops.mmllm.rms_norm(x2, x2[0], 0.0), x2[0] * x2 * x2.double().square().mean(1, True).rsqrt()),
    ):
        error = (got - wanted).abs().max()
        if not error < 1e-4:
            raise RunError(f"the {name} kernel is wrong by {error:.1e}")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.double() @ weight.double().T + bias.double()


# Layouts --------------------------------------------------------------------------------------------------------------


def panels(q: Tensor) -> Tensor:
    """int8 (O, K) as the kernel reads it: unsigned, (O/16, K/4, 16, 4), filled up with what stands for 0."""
    rows, columns = -q.shape[0] % 16, -q.shape[1] % 4
    raised = torch.nn.functional.pad(q, (0, columns, 0, rows)).view(torch.uint8) ^ 128
    return raised.unflatten(0, (-1, 16)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def rows_of_panels(panels: Tensor, rows: Tensor) -> Tensor:
    """The int8 rows numbered `rows` (any shape), (..., K), of a matrix in `panels`."""
    return (panels[rows // 16, :, rows % 16].flatten(-2) ^ 128).view(torch.int8)


def bf16_panels(weight: Tensor) -> Tensor:
    """bfloat16 (O, K) as (O/16, K, 16)."""
    rows, columns = -weight.shape[0] % 16, -weight.shape[1] % 2
    return torch.nn.functional.pad(weight, (0, columns, 0, rows)).unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


# The same without a compiler ------------------------------------------------------------------------------------------


def whole_numbers(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Each row of x as int32 numbers X and the float64 `unit` of it (M, 1): x is about X * unit."""
    peak_M1 = x_MK.abs().amax(1, keepdim=True)
    step_M1 = peak_M1.double() / LARGEST[bits]
    scale_M1 = (1 / step_M1).clamp(max=3e38).float().masked_fill(step_M1 == 0, 0)
    is_finite_M1 = peak_M1.isfinite()
    unit_M1 = (1 / scale_M1.double()).masked_fill(scale_M1 == 0, 0).masked_fill(~is_finite_M1, torch.nan)
    return torch.where(is_finite_M1, x_MK * scale_M1, 0).round().int(), unit_M1


def digits(X_MK: Tensor, count: int) -> list[Tensor]:
    """X as `count` signed bytes, the lowest first."""
    found = []
    for _ in range(count):
        low = ((X_MK + 128) & 255) - 128
        found.append(low.to(torch.int8))
        X_MK = (X_MK - low) >> DIGIT
    return found


def int_mm_linear(x: Tensor, q_OK: Tensor, scale_O: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """The product of cpu.cpp, bit for bit, by torch's integer product."""
    x_MK = x.reshape(-1, x.shape[-1])
    X_MK, unit_M1 = whole_numbers(x_MK, bits)
    pieces = digits(X_MK, bits // DIGIT)
    sums = torch._int_mm(torch.cat(pieces), q_OK.T).double().chunk(len(pieces))
    total_MO = sum(piece * 2 ** (DIGIT * place) for place, piece in enumerate(sums))
    y_MO = (total_MO * (unit_M1 * scale_O.double())).float()
    return (y_MO if bias is None else y_MO + bias).unflatten(0, x.shape[:-1])
