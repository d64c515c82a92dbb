"""The Triton kernels against their formulas: on a GPU, interpreted on a CPU, and compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from mmllm.errors import RunError
from mmllm.kernels import gpu
from mmllm.kernels.gpu import int8_linear

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative_error(rows: int, device: str, dtype: torch.dtype) -> float:
    """The error of an int8 product of so many rows in float32."""
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 300, generator=rng).to(dtype)
    q = torch.randint(-127, 128, (37, 300), generator=rng, dtype=torch.int8)
    scale, bias = torch.rand(37, generator=rng), torch.randn(37, generator=rng)
    wanted = x.double() @ (q * scale[:, None]).double().T + bias
    got = int8_linear(*(tensor.to(device) for tensor in (x, q, scale, bias)))
    assert got.dtype == dtype
    return float((got.cpu() - wanted).norm() / wanted.norm())


def test_torchs_product_of_int8_applies_the_scale_to_exact_integers():
    assert relative_error(20, "cpu", torch.bfloat16) < 0.005, "rounded to bfloat16, and the integers are exact there"


def test_a_kernel_that_does_not_compile_or_is_wrong_is_not_used_and_one_line_says_so(monkeypatch, capsys):
    def does_not_compile(*arguments):
        raise ValueError("no such target\nand much more")

    monkeypatch.setattr(gpu, "self_test", does_not_compile)
    assert not gpu.native.__wrapped__(torch.device("cuda"))
    assert capsys.readouterr().err == "kernels: torch's own on cuda (ValueError: no such target)\n"
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "attend_and_formula", lambda *_, **__: [("attention", torch.ones(2), torch.ones(2) * 0.9)])
    monkeypatch.setattr(gpu, "project_and_formula", lambda *_: [])
    with pytest.raises(RunError, match="attention is wrong by 1.1e-01"):
        gpu.self_test(CPU)
    monkeypatch.setattr(gpu, "attend_and_formula", lambda *_, **__: [])
    wrong = [("a product", torch.ones(2), torch.ones(2) * 0.9)]
    monkeypatch.setattr(gpu, "project_and_formula", lambda *given: wrong if torch.bfloat16 in given else [])
    with pytest.raises(RunError, match="a product is wrong by 1.1e-01"):
        gpu.self_test(CPU)


INTERPRETED = """
import torch
from mmllm.kernels import gpu

cpu = torch.device("cpu")
for rows in (1, 5, 16, 65):
    attention = gpu.attend_and_formula(rows, cpu) + gpu.attend_and_formula(rows, cpu, is_alone=False)
    for what, got, wanted in gpu.project_and_formula(rows, cpu) + attention:
        error = float((got.double() - wanted).norm() / wanted.norm())
        assert error < 1e-6, (rows, what, error)
"""


def interpreted(program: str) -> None:
    """Runs a program whose Triton kernels are interpreted, in a process of its own, for Triton decides it on import."""
    pytest.importorskip("triton", minversion="3.7")  # earlier interpreters fail with NumPy 2.4
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_interpreted_kernels_give_their_formulas_for_any_number_of_rows_and_every_remainder():
    interpreted(INTERPRETED)


STEP = """
import itertools

import torch

from mmllm.inference import static_step
from mmllm.inference.static_step import StaticStep
from mmllm.kernels import gpu
from mmllm.layers import packed
from mmllm.models.config import Qwen2Config, Qwen3Config
from mmllm.models.kv_cache import KVCache, PerSlot
from mmllm.models.qwen import Qwen2
from mmllm.models.qwen3 import Qwen3

gpu.native = lambda device: True
static_step.PIECES = 3, 8  # an interpreted row takes long
packed.is_native = lambda tensor: False
cpu, shape = torch.device("cpu"), dict(head_dim=16, max_position_embeddings=2048)


def check(model, is_int8, slots, bound):
    "Prompts, the first in two pieces, and steps in which now and then a slot takes no part, against the ordinary passes."
    config = model.config
    for name, parameter in model.named_parameters():
        parameter.detach().normal_(1 if "norm" in name else 0, 0.2)
    if is_int8:
        packed.pack_(model, packed.Int8Packed.of, packed.Int8Packed.of)
    caches = [KVCache(config, slots, 256, device=cpu, dtype=torch.float32) for _ in range(2)]
    step = StaticStep(model, caches[1], slots)
    assert step.ours is not None
    ids = torch.randint(0, config.vocab_size, (slots, 256))
    starts = [9, 5][:slots]

    def read(cache, rows, ids_BT, begin):
        positions = torch.tensor(begin)[:, None] + torch.arange(ids_BT.shape[1])
        x = model(model.embed(ids_BT), positions, cache=PerSlot(cache, rows, begin))
        return model.logits(x[:, -1])

    for slot, cuts in enumerate([(0, 3, 9), (0, 5)][:slots]):
        for begin, end in itertools.pairwise(cuts):
            wanted = read(caches[0], [slot], ids[slot : slot + 1, begin:end], [begin])
            got = step.read(slot, begin, model.embed(ids[slot, begin:end]))
            assert (got - wanted).norm() < bound * wanted.norm(), (config, slot, begin)
    for number in range(slots):
        rows = [slot for slot in range(slots) if slots == 1 or number != 1 + slot]
        tokens, positions = [int(ids[slot, starts[slot]]) for slot in rows], [starts[slot] for slot in rows]
        wanted = read(caches[0], rows, torch.tensor(tokens)[:, None], positions)
        got = step(rows, tokens, positions)
        starts = [start + (slot in rows) for slot, start in enumerate(starts)]
        assert (got - wanted).norm() < bound * wanted.norm(), (config, slots, number)
    for one, other in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
        assert (one - other).norm() < bound * one.norm(), "the slots that took no part are as they were"


with torch.inference_mode(False), torch.no_grad():
    torch.manual_seed(0)
    two, three = Qwen2Config(37, 48, 44, 1, 6, 2, **shape), Qwen3Config(37, 48, 44, 1, 4, 2, **shape)
    check(Qwen3(three), False, 2, 1e-5)
    check(Qwen2(two), True, 1, 1e-3)  # the ordinary step rounds its activations to 16 bits
"""


@pytest.mark.slow
def test_an_interpreted_step_gives_the_logits_and_the_cache_of_the_ordinary_one():
    interpreted(STEP)


UPDATE = """
import torch
from mmllm.training import adamw8bit
from mmllm.training.adamw8bit import BLOCK, AdamW8bit

adamw8bit.PIECE["cpu"] = adamw8bit.FUSED_NOISE = 2048


def after(steps, is_fused):
    "Of a matrix in pieces, with a last block that is shorter, and of a bias; an optimizer of each."
    adamw8bit.native = lambda device: is_fused
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (33 * BLOCK + 17, 300)]
    optimizers = [AdamW8bit([{"params": [p], "weight_decay": 0.1}], (0.9, 0.95), 1e-8) for p in parameters]
    for step in range(steps):
        for p, optimizer in zip(parameters, optimizers):
            p.grad = torch.randn(p.shape) * (torch.arange(p.numel()) > 100 * step)  # some gradients become zero
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    return [(p.detach(), optimizer.state[p]) for p, optimizer in zip(parameters, optimizers)]


for steps in (1, 3):
    for (p, wanted), (q, found) in zip(after(steps, False), after(steps, True)):
        whole = slice(p.numel() if steps == 1 or p.numel() < BLOCK * 16 else 33 * BLOCK)  # a short block has other noise
        torch.testing.assert_close(q[whole], p[whole], atol=1e-6, rtol=0)
        assert found.keys() == wanted.keys()
        for name in ("exp_avg", "exp_avg_sq"):
            codes = [state[name][: 33 * BLOCK].float() for state in (found, wanted)]
            assert ((codes[0] - codes[1]).abs() > 1e-6).float().mean() < 1e-3, "at most where sums round differently"
            assert (codes[0] - codes[1]).abs().max() <= 1 and codes[1].unique().numel() > 100
"""


@pytest.mark.slow
def test_an_interpreted_update_of_8_bit_moments_is_that_of_torchs_operators():
    interpreted(UPDATE)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])  # A100, RTX 4090, H100, B200, RTX 5090
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(capability, rows, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if capability == 100 and rows > 1:
        pytest.importorskip("triton", minversion="3.7")  # 3.6 fails, which the self test finds on such a card
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmllm.kernels import triton_kernels as kernels

    def compile_(function, types: dict, constants: dict) -> None:
        types = {name: types.get(name, "*fp32") for name in function.arg_names} | dict.fromkeys(constants, "constexpr")
        made = triton.compile(ASTSource(function, types, constants), target=GPUTarget("cuda", capability, 32))
        assert f"sm_{capability}" in made.asm["ptx"] and made.asm["cubin"]
        assert made.metadata.shared <= (99 if capability in (89, 120) else 163) * 1024, "what a block has"

    count = dict.fromkeys(("rows", "outs", "width", "capacity"), "i32") | dict.fromkeys(("eps", "scale"), "fp32")
    parts = 64 // rows
    names = {torch.bfloat16: "*bf16", torch.int8: "*i8", torch.float32: "*fp32"}
    forms = [  # what is left out, the types of the weights and of the products' inputs, outputs and inputs
        (("scale", "scale2"), torch.bfloat16, torch.bfloat16, 4864, 896),
        (("scale", "scale2"), torch.float32, torch.float32, 4864, 896),
        (("bias",), torch.int8, torch.bfloat16, 4864, 896),
        (("norm", "scale", "bias", "w2", "scale2"), torch.bfloat16, torch.bfloat16, 896, 4864),
        (("norm", "scale", "bias", "w2", "scale2"), torch.float32, torch.float32, 896, 4864),
    ]
    for absent, held, dtype, outs, width in forms:
        weights = dict.fromkeys(("w", "w2"), names[held]) | dict.fromkeys(("norm", "bias"), names[dtype])
        types = count | weights | {"scale": "*fp32", "x": names[dtype] if "norm" in absent else "*fp32"}
        sizes = zip(("ROWS", "OUTS", "WIDTH"), gpu.blocks(rows, outs, width, held, dtype)[:3], strict=True)
        form = dict.fromkeys(absent) | {"ADD": "norm" in absent, "DTYPE": gpu.triton_dtype(dtype)}
        compile_(kernels.project, types, form | dict(sizes))
    shape = {"HEADS": 14, "GROUPS": 2, "HEAD": 64, "PARTS": parts, "QUERIES": 16, "KEYS": gpu.KEYS}
    types = count | {"keys": "*bf16", "values": "*bf16", "slots": "*i64", "positions": "*i64"}
    for stores in (True, False):
        compile_(kernels.attend, types, shape | {"q_norm": None, "k_norm": None, "STORES": stores})
    types = dict.fromkeys(("numel", "noises"), "i32") | {"first": "*i8", "second": "*u8"}
    types |= dict.fromkeys(("beta1", "beta2", "eps", "kept", "correction", "rate"), "fp32")
    compile_(kernels.adamw8bit, types, {"OCTAVES": 24, "BLOCK": 256, "BLOCKS": 4})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64, 65])
def test_int8_products_give_the_formula(rows, dtype):
    assert relative_error(rows, "cuda", dtype) < 0.005


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_are_used_on_this_gpu(capsys):
    assert gpu.native.__wrapped__(torch.device("cuda"))
    assert capsys.readouterr().err == "kernels: our own on cuda (Triton)\n"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("slots", [1, 4, 40])
def test_a_step_in_bfloat16_is_no_further_from_float32_than_torchs(slots):
    """At the true shape of a layer, where rounding is all that differs."""
    from mmllm.inference.static_step import StaticStep
    from mmllm.models.config import Qwen2Config
    from mmllm.models.kv_cache import KVCache
    from mmllm.models.qwen import Qwen2

    torch.manual_seed(0)
    config, cuda = Qwen2Config(num_hidden_layers=3, vocab_size=2000), torch.device("cuda")
    model = Qwen2(config).requires_grad_(False).to(cuda)
    model.lm_head.weight.normal_(0, 0.1)
    logits = []
    for kind, is_ours in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        step = StaticStep(model.to(kind), KVCache(config, slots, 256, device=cuda, dtype=kind), slots)
        step.ours = step.ours if is_ours else None
        with torch.inference_mode():
            for position in range(5):
                tokens = [(37 * position + 11 * slot) % 2000 for slot in range(slots)]
                logits_SV = step(list(range(slots)), tokens, [position] * slots).double()
        logits.append(logits_SV)
    exact, torchs, ours = logits
    assert 0 < (ours - exact).norm() < 1.1 * (torchs - exact).norm()
