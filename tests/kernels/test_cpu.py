"""The kernels against their formulas in float64, and against torch's integer product."""

import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from mmllm.errors import RunError
from mmllm.kernels import cpu as kernels
from mmllm.kernels import reference
from mmllm.kernels.reference import int4_linear, int4_matrix, quantize_int4, quantize_int8
from mmllm.runtime.machine import processor

SHAPES = [(16, 32), (37, 64), (200, 896), (1152, 160)]
needs_compiler = pytest.mark.usefixtures("compiler")


@pytest.fixture
def compiler():
    if not kernels.native():
        pytest.skip("no C++ compiler here")


def a_case(rows: int, outputs: int, inputs: int):
    """Activations with an outlier and a row of zeros, a weight of uneven rows, a bias."""
    rng = torch.Generator().manual_seed(outputs)
    x = torch.randn(rows, inputs, generator=rng)
    x[0, 3] = 30.0
    x[-1] = 0.0
    weight = torch.randn(outputs, inputs, generator=rng) * torch.logspace(-3, 1, outputs)[:, None]
    return x, weight, torch.randn(outputs, generator=rng)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bits", [16, 8])
def test_the_int8_kernel_gives_the_bits_of_torchs_integer_product(outputs, inputs, bits):
    x, weight, bias = a_case(9, outputs, inputs)
    q, scale = quantize_int8(weight)
    wanted = reference.int8_linear(x, q, scale[:, 0], bias, bits)
    assert torch.equal(torch.ops.mmllm.int8_linear(x, kernels.panels(q), scale[:, 0], bias, bits), wanted)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_other_processors_get_the_same_products(name):
    """Builds for less than this processor, each self-tested in a process of its own: an operator is registered once."""
    if name == "avx2" and "avx2" not in processor().split():
        pytest.skip("this processor has no AVX2")
    less = {"avx2": ("-mavx2", "-mfma"), "portable": ()}[name]
    flags = ("-O0", *(flag for flag in kernels.FLAGS if flag not in ("-O3", "-march=native")), *less)
    program = (
        "import torch; from mmllm.kernels import cpu as kernels; "
        f"torch.ops.load_library(kernels.build({flags!r})); kernels.self_test()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_kernels_that_are_wrong_are_not_used_and_one_line_says_so(monkeypatch, capsys):
    assert kernels.native()
    formula = reference.int8_linear
    monkeypatch.setattr(reference, "int8_linear", lambda *arguments: formula(*arguments) + 1)
    assert not kernels.native.__wrapped__()
    said = capsys.readouterr().err
    assert (
        said == "kernels: torch's own products, about half as fast (the int8 kernel is wrong at 16 bits by 1.0e+00)\n"
    )
    monkeypatch.undo()
    assert kernels.native.__wrapped__()
    assert capsys.readouterr().err.startswith("kernels: our own (")


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_bfloat16_kernel_keeps_activations_in_float32(outputs, inputs):
    x, weight, bias = a_case(9, outputs, inputs)
    wanted = x.double() @ weight.bfloat16().double().T + bias.double()
    got = torch.ops.mmllm.bf16_linear(x, torch.ops.mmllm.bf16_pack(weight), bias, outputs)
    assert relative(got, wanted) < 1e-6


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_int4_kernel_gives_what_its_formula_gives(outputs, inputs):
    x, weight, bias = a_case(9, outputs, inputs)
    wanted = int4_linear(x, int4_matrix(*quantize_int4(weight)), bias)
    got = torch.ops.mmllm.int4_linear(x, *torch.ops.mmllm.int4_pack(weight), bias, outputs)
    assert relative(got, wanted) < 1e-6 and got.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "bfloat16", "int4"])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    x, weight, bias = a_case(21, 200, 896)
    ops = torch.ops.mmllm

    def product(first: int, last: int) -> torch.Tensor:
        rows = x[first:last]
        if kind == "bfloat16":
            return ops.bf16_linear(rows, ops.bf16_pack(weight), bias, 200)
        if kind == "int4":
            return ops.int4_linear(rows, *ops.int4_pack(weight), bias, 200)
        return ops.int8_linear(rows, *ops.int8_pack(weight), bias, 16 if kind == "int8" else 8)

    together = product(0, 21)
    for size in (1, 2, 3, 8, 13):
        for first in range(0, 21 - size + 1, size):
            assert torch.equal(product(first, first + size), together[first : first + size]), (size, first)


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    x, weight, bias = a_case(3, 1152, 896)
    packed = torch.ops.mmllm.int8_pack(weight)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(torch.ops.mmllm.int8_linear(x, *packed, bias, 16))
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_makes_only_its_own_result_nan(value):
    x, weight, _ = a_case(4, 32, 64)
    x[1, 5] = value
    q, scale = quantize_int8(weight)
    is_nan = reference.int8_linear(x, q, scale[:, 0], None, 16).isnan()
    assert is_nan[1].all() and not is_nan[[0, 2, 3]].any()
    if kernels.native():
        assert torch.equal(torch.ops.mmllm.int8_linear(x, kernels.panels(q), scale[:, 0], None, 16).isnan(), is_nan)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_in_cpp_gives_the_numbers_of_the_formulas(dtype):
    _, weight, _ = a_case(1, 37, 64)
    weight[5] = 0
    weight = weight.to(dtype)
    q, scale = quantize_int8(weight)
    panels, scales = torch.ops.mmllm.int8_pack(weight)
    assert torch.equal(panels, kernels.panels(q)) and torch.equal(scales, scale[:, 0])
    assert torch.equal(kernels.rows_of_panels(panels, torch.arange(37)), q)
    assert torch.equal(torch.ops.mmllm.bf16_pack(weight), kernels.bf16_panels(weight.bfloat16()))
    packed, rounded = torch.ops.mmllm.int4_pack(weight), quantize_int4(weight)
    assert all(map(torch.equal, packed, kernels.int4_panels(*rounded)))
    assert all(map(torch.equal, kernels.rows_of_int4_panels(*packed, 37), rounded))


@needs_compiler
def test_shapes_that_do_not_fit_are_refused():
    panels, scale = torch.ops.mmllm.int8_pack(torch.randn(16, 32))
    with pytest.raises(RuntimeError, match="rows of 32 numbers are needed, these have 33"):
        torch.ops.mmllm.int8_linear(torch.randn(1, 33), panels, scale, None, 16)
    with pytest.raises(RuntimeError, match="float32 rows are needed"):
        torch.ops.mmllm.int8_linear(torch.randn(1, 32).double(), panels, scale, None, 16)


def test_without_a_compiler_or_a_folder_to_write_to_the_reason_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="cannot be made"):
        kernels.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no C\\+\\+ compiler; install g\\+\\+"):
        kernels.build()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'error: no such machine' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RunError, match="cannot compile cpu.cpp: error: no such machine"):
        kernels.build()
    assert not list((tmp_path / "cache").rglob("*.so")), "no half-made file is left"


def test_a_library_that_was_damaged_is_built_again(monkeypatch, tmp_path):
    compiler = tmp_path / "my compiler"  # stands for the real one, which takes seconds
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho the library > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"env LANG=C '{compiler}'")  # as "ccache g++": a command with arguments
    library = kernels.build()
    for damage in (b"", b"the lib"):
        library.write_bytes(damage)
        assert kernels.build() == library and library.read_bytes() == b"the library\n"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert kernels.build() == library, "a whole library is not built again"


def test_a_user_without_a_home_gets_one_line(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(RunError, match="no home folder for compiled code; set XDG_CACHE_HOME"):
        kernels.build()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_makes_its_output_so_in_every_precision(value):
    weight, x = torch.randn(37, 64), torch.randn(3, 64)
    weight[5, 7] = value
    q, scale = reference.quantize_int8(weight)
    results = [reference.int8_linear(x, q, scale[:, 0], None, 16)]
    results.append(x @ reference.int4_matrix(*reference.quantize_int4(weight)).T)
    if kernels.native():
        results.append(torch.ops.mmllm.int8_linear(x, kernels.panels(q), scale[:, 0].contiguous(), None, 16))
        for matrix in (weight, reference.int4_matrix(*reference.quantize_int4(weight))):
            results.append(torch.ops.mmllm.int4_linear(x, *torch.ops.mmllm.int4_pack(matrix), None, 37))
    for y in results:
        assert not y[:, 5].isfinite().any() and y[:, [4, 6]].isfinite().all()
