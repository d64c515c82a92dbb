"""cpu.cpp: compiled on first use, self-tested when it is loaded, with torch's own products as the fallback.

A C++ compiler is worth a factor of two in speed and changes no int8 result: `reference.int8_linear` gives the same bits.
The library is kept in the user's cache folder, under a name made of the source, torch's version and the processor.

O outputs, K inputs.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.errors import RunError
from mmllm.kernels import reference
from mmllm.runtime.console import stderr_rank0
from mmllm.runtime.files import sha256_of
from mmllm.runtime.machine import cache_folder, processor

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-fopenmp")
INSTRUCTIONS = {"avx512_vnni": "AVX-512 VNNI", "avx2": "AVX2"}  # a flag of the processor, its name for people


@functools.cache
def native() -> bool:
    """Whether `torch.ops.mmllm` holds the kernels: compiled, loaded, and right. Prints one line that says so or why not."""
    try:
        torch.ops.load_library(build())
        self_test()
    except (RunError, OSError) as error:
        stderr_rank0(f"kernels: torch's own products, about half as fast ({str(error).splitlines()[0]})")
        return False
    flags = processor().split()
    kind = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "no vector instructions known by name")
    stderr_rank0(f"kernels: our own ({kind})")
    return True


def build(flags: tuple[str, ...] = FLAGS) -> Path:
    """The compiled library; RunError says why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise RunError("no C++ compiler; install g++ or set CXX")
    key = "\0".join([SOURCE.read_text(), torch.__version__, compiler, *flags, processor()])
    library = cache_folder() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    checksum = library.with_suffix(".sha256")  # loading a library that was cut off would end the process
    if library.exists() and checksum.exists() and checksum.read_text() == sha256_of(library):
        return library
    stderr_rank0(f"compiling {SOURCE.name} once, about 10 s; kept in {library.parent}")
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [
                *shlex.split(compiler),
                *flags,
                *headers,
                str(SOURCE),
                "-o",
                made,
                *LIBRARIES,
                f"-L{root / 'lib'}",
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                lines = result.stderr.splitlines()
                reason = next((line for line in lines if "error" in line), "\n".join(lines)[:200])
                raise RunError(f"{compiler} cannot compile {SOURCE.name}: {reason}")
            made.with_suffix(".sha256").write_text(sha256_of(made))
            made.with_suffix(".sha256").replace(checksum)
            made.replace(library)  # atomic: another process may be building the same
    except OSError as error:
        raise RunError(f"{library}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder") from error
    return library


def self_test() -> None:
    """RunError unless the kernels give what their formulas say, on shapes with every remainder."""
    ops, rng = torch.ops.mmllm, torch.Generator().manual_seed(0)
    x, bias = torch.randn(11, 44, generator=rng), torch.randn(37, generator=rng)
    x[3, 5] = 30.0
    q = torch.randint(-127, 128, (37, 44), generator=rng, dtype=torch.int8)
    scale = torch.rand(37, generator=rng) + 0.1
    for bits in reference.MAX_ACTIVATION:
        wanted = reference.int8_linear(x, q, scale, bias, bits)
        got = ops.int8_linear(x, panels(q), scale, bias, bits)
        if not torch.equal(wanted, got):
            raise RunError(f"the int8 kernel is wrong at {bits} bits by {(wanted - got).abs().max():.1e}")
    x2, half = torch.randn(11, 64, generator=rng), torch.randn(37, 44, generator=rng).bfloat16()
    matrix = reference.int4_matrix(*reference.quantize_int4(torch.randn(37, 64, generator=rng)))

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.double(), weight.double(), bias.double())

    for name, got, wanted in (
        ("int4", ops.int4_linear(x2, *ops.int4_pack(matrix), bias, 37), reference.int4_linear(x2, matrix, bias)),
        ("bfloat16", ops.bf16_linear(x, bf16_panels(half), bias, 37), linear(x, half)),
    ):
        error = (got - wanted).abs().max()
        if not error < 1e-4:
            raise RunError(f"the {name} kernel is wrong by {error:.1e}")


# Layouts --------------------------------------------------------------------------------------------------------------


def panels(q_OK: Tensor) -> Tensor:
    """int8 (O, K) as the kernel reads it: unsigned, (O/16, K/4, 16, 4), padded with 128, which stands for 0."""
    rows, columns = -q_OK.shape[0] % 16, -q_OK.shape[1] % 4
    raised = F.pad(q_OK, (0, columns, 0, rows)).view(torch.uint8) ^ 128
    return raised.unflatten(0, (-1, 16)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def rows_of_panels(panels: Tensor, rows: Tensor) -> Tensor:
    """The int8 rows with the numbers `rows` (any shape) of a matrix in `panels`, (..., K)."""
    return (panels[rows // 16, :, rows % 16].flatten(-2) ^ 128).view(torch.int8)


def int4_panels(q_OK: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Results of `quantize_int4` as the kernel reads them: q + 8 in (O/16, K/32, 4, 64), two in a byte, and (O/16, K/32, 16)."""
    rows = -q_OK.shape[0] % 16
    raised = (F.pad(q_OK, (0, 0, 0, rows)) + 8).view(torch.uint8).unflatten(0, (-1, 16)).unflatten(2, (-1, 4, 2, 4))
    low, high = raised.permute(4, 0, 2, 3, 1, 5).flatten(-2)
    return low | high << 4, F.pad(scale, (0, 0, 0, rows)).unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def rows_of_int4_panels(panels: Tensor, scale: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` rows of what `int4_panels` was given."""
    four_columns = panels.view(torch.int32)
    halves = torch.stack([four_columns, four_columns >> 4]).bitwise_and_(0x0F0F0F0F)
    q_OK = halves.permute(1, 4, 2, 3, 0).flatten(2).flatten(0, 1).view(torch.int8).sub_(8)
    return q_OK[:count], scale.transpose(1, 2).flatten(0, 1)[:count]


def bf16_panels(weight_OK: Tensor) -> Tensor:
    """bfloat16 (O, K) as (O/16, K, 16), K padded to an even number."""
    rows, columns = -weight_OK.shape[0] % 16, -weight_OK.shape[1] % 2
    return F.pad(weight_OK, (0, columns, 0, rows)).unflatten(0, (-1, 16)).transpose(1, 2).contiguous()
