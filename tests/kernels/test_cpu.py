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
from mmllm.models.qwen import rotate
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
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "bfloat16", "int4", "norm", "attention"])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    x, weight, bias = a_case(21, 200, 896)
    ops = torch.ops.mmllm
    keys, values = torch.randn(2, 21, 1, 30, 64)  # a slot a row
    turns = torch.randn(2, 21, 64)

    def product(first: int, last: int) -> torch.Tensor:
        rows = x[first:last]
        if kind == "bfloat16":
            return ops.bf16_linear(rows, ops.bf16_pack(weight), bias, 200)
        if kind == "int4":
            return ops.int4_linear(rows, *ops.int4_pack(weight), bias, 200)
        if kind == "norm":
            return ops.rms_norm(rows, torch.ones(896), 1e-6)
        if kind == "attention":
            slots = starts = list(range(first, last))
            return ops.attend_token(rows, *turns[:, first:last], keys, values, slots, starts)
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
    panels, scales = torch.ops.mmllm.int4_pack(weight)
    q, scale = quantize_int4(weight)
    halves = torch.stack([panels & 15, panels >> 4], dim=3).view(
        3, 2, 4, 2, 16, 4
    )  # panel, group, piece, half, row, byte
    assert torch.equal(halves.permute(0, 4, 1, 2, 3, 5).reshape(48, 64)[:37].int() - 8, q.int())
    assert torch.equal(scales.transpose(1, 2).reshape(48, 2)[:37], scale)


@needs_compiler
def test_several_matrices_in_one_call_give_what_each_gives():
    x, first, bias = a_case(9, 37, 64)
    packed = [torch.ops.mmllm.int8_pack(w) for w in (first, first[:20].neg())]
    wanted = torch.cat(
        [torch.ops.mmllm.int8_linear(x, *p, b, 16) for p, b in zip(packed, (bias, None), strict=True)], -1
    )
    panels, scales = zip(*packed, strict=True)
    assert torch.equal(torch.ops.mmllm.int8_linears(x, panels, scales, [bias, None], 16), wanted)


@needs_compiler
def test_norm_gate_and_attention_of_a_decoding_step_are_torchs():
    x = torch.cat([torch.randn(5, 64) * 5, torch.linspace(-120, 120, 320).view(5, 64)], -1)
    wanted = torch.nn.functional.silu(x[:, :64].double()) * x[:, 64:].double()
    assert (torch.ops.mmllm.swiglu(x) / wanted - 1).abs().max() < 1e-6
    wanted = torch.nn.functional.silu(x[:, 64:].double()) * x[:, :64].double()
    assert (torch.ops.mmllm.swiglu(x.roll(64, -1)) - wanted).abs().max() < 1e-4
    x, weight = torch.randn(5, 896), torch.randn(896)
    wanted = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
    assert (torch.ops.mmllm.rms_norm(x, weight, 1e-6) - wanted).abs().max() < 1e-5
    keys, values = torch.randn(2, 3, 2, 40, 64)
    before = keys.clone(), values.clone()
    qkv, angles = torch.randn(2, 18, 64), torch.rand(2, 1, 1, 32)
    cos, sin = (
        torch.cat([angles.cos(), angles.cos()], -1),
        torch.cat([-angles.sin(), angles.sin()], -1),
    )
    turned = rotate(qkv[:, :16, None], cos, sin)[:, :, 0]
    got = torch.ops.mmllm.attend_token(qkv.flatten(1), cos, sin, keys, values, [2, 0], [16, 39])
    for row, slot, start in ((0, 2, 16), (1, 0, 39)):
        before[0][slot, :, start], before[1][slot, :, start] = turned[row, 14:], qkv[row, 16:]
        k, v = (t[slot, :, : start + 1].repeat_interleave(7, dim=0) for t in before)
        wanted = torch.nn.functional.scaled_dot_product_attention(turned[row, :14, None], k, v)[:, 0]
        assert (got[row].view(14, 64) - wanted).abs().max() < 1e-5
    assert (keys - before[0]).abs().max() < 1e-6 and torch.equal(values, before[1]), "nothing else was written"


@needs_compiler
def test_shapes_that_do_not_fit_are_refused():
    panels, scale = torch.ops.mmllm.int8_pack(torch.randn(16, 32))
    with pytest.raises(RuntimeError, match="rows of 32 numbers are needed, these have 33"):
        torch.ops.mmllm.int8_linear(torch.randn(1, 33), panels, scale, None, 16)
    with pytest.raises(RuntimeError, match="float32 rows are needed"):
        torch.ops.mmllm.int8_linear(torch.randn(1, 32).double(), panels, scale, None, 16)


@needs_compiler
def test_the_operators_tell_torch_compile_their_shapes():
    panels, scale = torch.ops.mmllm.int8_pack(torch.randn(37, 64))
    x = torch.randn(2, 3, 64)
    torch.library.opcheck(
        torch.ops.mmllm.int8_linear.default, (x, panels, scale, None, 16), test_utils="test_faketensor"
    )
    panels = torch.ops.mmllm.bf16_pack(torch.randn(37, 64))
    torch.library.opcheck(torch.ops.mmllm.bf16_linear.default, (x, panels, None, 37), test_utils="test_faketensor")


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
