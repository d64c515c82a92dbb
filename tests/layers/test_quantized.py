"""The int8 and int4 bases against the matrices they stand for: products, gradients, files, and a run with adapters."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from mmllm.config.schema import ExperimentConfig, LoraConfig
from mmllm.data.batches import make_batch, read_rows
from mmllm.data.samples import load_samples
from mmllm.errors import ConfigError
from mmllm.layers.lora import add_lora_, merge_lora_
from mmllm.layers.quantized import Int4Linear, Int8Linear, count_weights, quantize_
from mmllm.models.loading import ModelForm
from mmllm.models.multimodal import MultimodalLLM
from mmllm.storage import checkpoint as disk
from mmllm.training.experiment import train
from mmllm.training.prepare import train_only_
from mmllm.training.step import accumulate_gradients
from official import write_model
from tiny_run import write_world


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_rounded_matrix(bias, kind):
    layer = nn.Linear(64, 50, bias=bias)
    int8 = kind(layer)
    rounded = int8.dequantized()
    x = torch.randn(4, 6, 64, requires_grad=True)
    wanted, got = F.linear(x, rounded, layer.bias), int8(x)
    pull = torch.randn_like(wanted)
    (want_gradient,), (gradient,) = (torch.autograd.grad(y, x, pull) for y in (wanted, got))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_bfloat16():
    layer = nn.Linear(33, 50)
    x, int8 = torch.randn(5, 33), Int8Linear(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got = int8(x)
    scale, bias = int8.scale[:, 0].bfloat16(), layer.bias.bfloat16()
    assert torch.equal(got, F.linear(x.bfloat16(), int8.weight.bfloat16()) * scale + bias)


@pytest.mark.parametrize("kind, bits", [(Int8Linear, 8), (Int4Linear, 4.5)])
def test_only_the_rounded_weight_is_kept_for_the_backward_pass(kind, bits):
    layer = nn.Linear(416, 300, bias=False).requires_grad_(False)
    int8, kept = kind(layer), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        int8(torch.randn(2, 416, requires_grad=True))
    assert sum(kept) <= 300 * 416 * bits / 8 + 4 * 300


@pytest.fixture
def model(tmp_path) -> MultimodalLLM:
    return MultimodalLLM.from_pretrained(write_model(tmp_path / "model"))


def some_logits(model) -> torch.Tensor:
    ids = torch.randint(0, 280, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.logits(ids, torch.zeros(0, 3, 32, 32))


@pytest.mark.parametrize("rounding", ["int8", "int4"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_saved_model_comes_back_bit_for_bit_and_transformers_reads_it(model, tmp_path, with_lora, rounding):
    weights = count_weights(model)
    quantize_(model.language_model, rounding)
    assert count_weights(model) == weights
    if with_lora:
        add_lora_(model.language_model, LoraConfig(r=2))
    model.form = ModelForm(LoraConfig(r=2) if with_lora else None, rounding)
    model.save_pretrained(tmp_path / "saved")
    again = MultimodalLLM.from_pretrained(tmp_path / "saved")
    assert again.form.rounding == rounding and torch.equal(some_logits(again), some_logits(model))
    if not with_lora:
        theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        ids = torch.randint(0, 280, (1, 20), generator=torch.Generator().manual_seed(0))
        assert (theirs(input_ids=ids).logits - some_logits(model)).abs().max() < 1e-4
    half = MultimodalLLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    for mine, other in zip(model.language_model.buffers(), half.language_model.buffers(), strict=True):
        assert torch.equal(mine, other), "rounded to int8 before anything else"


def test_the_head_and_the_embedding_stay_one_float_matrix(model):
    quantize_(model.language_model)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


def test_adapters_are_not_merged_into_int8(model):
    quantize_(model.language_model)
    add_lora_(model.language_model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="cannot be added to int8 or int4 weights"):
        merge_lora_(model.language_model)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def small_config(world, folder, rounding: str = "int8", **training) -> ExperimentConfig:
    """The settings of configs/small.py on the tiny run."""
    config = world.config(folder, **training)
    config.model.use_lora = True
    config.model.load_in_8bit, config.model.load_in_4bit = rounding == "int8", rounding == "int4"
    config.model.lora_config.r = 4
    return config


def run_directory(config) -> Path:
    return Path(config.output_dir) / config.experiment_name


def test_any_split_gives_the_same_gradient_of_adapters_beside_int8(world):
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    quantize_(model.language_model)
    add_lora_(model.language_model, LoraConfig(r=4, lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.fill_(0.02)
    model = model.to(torch.float64)
    train_only_(model, ["multi_modal_projector", "language_model"])
    rows = [
        read_rows(s, model.processor)[0] for s in load_samples(world.folder / "train.json", world.folder / "images")[:8]
    ]
    found = []
    for size in (8, 3):
        model.zero_grad()
        accumulate_gradients(model, [make_batch(rows[i : i + size], model.processor) for i in range(0, 8, size)])
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    whole, split = found
    assert any(".lora_A" in name for name in whole)
    assert max((split[name] - whole[name]).norm() / whole[name].norm() for name in whole) <= 1e-12


@pytest.mark.parametrize("rounding", ["int8", "int4"])
@pytest.mark.slow
def test_a_run_with_adapters_on_integers_is_resumed_bit_for_bit(world, tmp_path, rounding):
    whole = small_config(world, tmp_path / "whole", rounding, save_steps=1, keep_checkpoints=100)
    assert train(whole) == 0
    config = small_config(world, tmp_path / "again", rounding, save_steps=1, keep_checkpoints=100)
    shutil.copytree(run_directory(whole), run_directory(config), symlinks=True)
    for checkpoint in disk.checkpoints(run_directory(config))[8:]:
        shutil.rmtree(checkpoint)
    assert train(config, resume="auto") == 0
    last = [disk.checkpoints(run_directory(c))[-1] for c in (whole, config)]
    for name in ("model.safetensors", "adapter_model.safetensors", "training/optimizer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name


@pytest.mark.slow
def test_the_loss_stays_near_that_of_a_float_base(world, tmp_path):
    losses = []
    for folder, is_int8 in ((tmp_path / "a", False), (tmp_path / "b", True)):
        config = small_config(world, folder)
        config.model.load_in_8bit = is_int8
        assert train(config) == 0
        state = disk.read_state(disk.checkpoints(run_directory(config))[-1])
        losses.append(state["best"]["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.002)


@pytest.mark.parametrize("rounding", ["int8", "int4"])
def test_an_integer_base_cannot_be_trained_itself(world, rounding):
    config = small_config(world, world.folder, rounding)
    config.model.use_lora = False
    with pytest.raises(ConfigError, match="keeps the language model frozen: set model.use_lora=true"):
        config.check()
    config.training.stage2.epochs = 0
    config.check()


def test_a_float_base_is_not_exchanged_under_trained_adapters(world, tmp_path):
    config = small_config(world, tmp_path)
    config.model.load_in_8bit = False
    assert train(config) == 0
    following = small_config(world, tmp_path / "next")
    following.model.pretrained = str(run_directory(config) / "best_model")
    with pytest.raises(ConfigError, match="came with adapters beside a float base"):
        train(following)
