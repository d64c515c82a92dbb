"""What makes a training step cheaper leaves its numbers as they are."""

import math
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from mmllm.config.schema import LoraConfig
from mmllm.data.batches import BatchLoader, make_batch, read_rows
from mmllm.data.chat import assistant, user
from mmllm.data.order import sample_order
from mmllm.data.samples import Sample, load_samples
from mmllm.errors import UserError
from mmllm.layers.lora import add_lora_
from mmllm.models.loss import cross_entropy_sum
from mmllm.models.multimodal import MultimodalLLM
from mmllm.storage import checkpoint as disk
from mmllm.training.experiment import train
from mmllm.training.prepare import cast_, compile_blocks_, frozen_weights, train_only_
from mmllm.training.step import accumulate_gradients
from tiny_run import write_world

HAS_COMPILER = any(map(shutil.which, [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """As published models are: the language model's weights are bfloat16 numbers, CLIP's are not."""
    world = write_world(tmp_path_factory.mktemp("world"))
    file = world.folder / "qwen" / "model.safetensors"
    save_file({name: value.bfloat16().float() for name, value in load_file(file).items()}, file, {"format": "pt"})
    return world


@pytest.fixture
def model(world):
    return MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")


def batches_of(world, model, sizes=(4, 4)):
    samples = load_samples(world.folder / "train.json", world.folder / "images")
    rows = [read_rows(sample, model.processor)[0] for sample in samples]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [make_batch(rows[end - size : end], model.processor) for end, size in zip(ends, sizes, strict=True)]


def gradients(model, batches, bf16=False):
    model.zero_grad()
    loss = accumulate_gradients(model, batches, bf16)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Frozen weights in bfloat16


@pytest.mark.parametrize("parts", [["multi_modal_projector"], ["multi_modal_projector", "language_model"]])
def test_frozen_weights_held_in_bfloat16_change_no_bit_of_a_bfloat16_step(world, model, parts):
    if "language_model" in parts:
        add_lora_(model.language_model, LoraConfig(r=4, lora_dropout=0.0))
    train_only_(model, parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, plain = gradients(model, batches_of(world, model), bf16=True)
    held = frozen_weights(model)
    cast_(held, torch.bfloat16)
    layers = model.language_model.config.num_hidden_layers
    assert len(held) == 7 * layers + 1  # the head is the embedding
    assert {p.dtype for p in model.vision_tower.parameters()} == {torch.float32}  # would lose something
    held_loss, found = gradients(model, batches_of(world, model), bf16=True)
    assert torch.equal(held_loss, loss)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    cast_(held, torch.float32)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


def test_trained_weights_are_never_held_in_less(model):
    train_only_(model, ["multi_modal_projector", "language_model"])
    assert frozen_weights(model) == []


def test_a_bfloat16_run_saves_frozen_weights_as_they_were_and_trains_them_in_float32(world, tmp_path):
    config = world.config(tmp_path, bf16=True, save_steps=5)
    assert train(config) == 0
    begin = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen").state_dict()
    first, second = (load_file(path / "model.safetensors") for path in disk.checkpoints(tmp_path / "tiny"))
    assert {value.dtype for value in [*first.values(), *second.values()]} == {torch.float32}
    moved = [{n.partition(".")[0] for n in saved if not torch.equal(saved[n], begin[n])} for saved in (first, second)]
    assert moved == [{"multi_modal_projector"}, {"multi_modal_projector", "language_model"}]
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(second[name], second[name].bfloat16().float())


# What is not computed


def test_a_frozen_model_keeps_nothing_of_weights_and_passes_the_gradient_to_the_projector(world, model):
    """Stage 1 must go back through the language model, but makes no gradient of its weights and none in the tower."""
    train_only_(model, ["multi_modal_projector"])
    kept: list[torch.Tensor] = []
    batch = batches_of(world, model)[0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower = model.vision_features(batch.pixels_N3SS)
        assert not tower.requires_grad and kept == []
        x_BTD = model.embed(batch.ids_BT, batch.pixels_N3SS)
        kept.clear()
        linear = model.language_model.model.layers[0].mlp.down_proj
        linear(torch.ones(1, linear.in_features, requires_grad=True))
        assert [tuple(tensor.shape) for tensor in kept] == [tuple(linear.weight.shape)] or [
            tuple(tensor.shape) for tensor in kept
        ] == [tuple(linear.weight.T.shape)]  # the weight, for the gradient of the input; not the input
    assert x_BTD.requires_grad
    _, found = gradients(model, [batch])
    assert {name.partition(".")[0] for name in found} == {"multi_modal_projector"}


def test_nothing_is_kept_or_made_below_the_first_adapter_and_no_frozen_part_has_a_gradient(world, model):
    add_lora_(model.language_model, LoraConfig(lora_dropout=0.0, target_modules=("o_proj",)))
    train_only_(model, ["language_model"])
    batch, first = batches_of(world, model)[0], model.language_model.model.layers[0].self_attn
    kept: list[torch.Tensor] = []
    before_first: list[int] = []
    first.o_proj.register_forward_pre_hook(lambda *_: before_first.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss, _ = model(batch.ids_BT, batch.labels_BT, batch.pixels_N3SS)
    assert before_first == [0] and kept
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"language_model.model.layers.{i}.self_attn.o_proj.lora_{matrix}"
        for i in range(len(model.language_model.model.layers))
        for matrix in "AB"
    }


def test_nothing_below_a_frozen_projector_is_differentiated(world, model):
    train_only_(model, ["language_model"])
    assert not model.encode_images(batches_of(world, model)[0].pixels_N3SS).requires_grad


# Batches by length


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_by_length_hold_the_samples_of_their_step_with_less_padding(model, world_size):
    samples = [Sample(str(i), (), (user("a"), assistant("x" * (7 * i % 48)))) for i in range(48)]
    order = sample_order(48, seed=0, epoch=0)

    def steps(group_by_length):
        loaders = [
            BatchLoader(
                samples,
                model.processor,
                4,
                rank=rank,
                world_size=world_size,
                accumulation=3,
                group_by_length=group_by_length,
                num_workers=0,
            )
            for rank in range(world_size)
        ]
        per_step = [[loader.indices(order, n) for n in range(3 * s, 3 * s + 3) for loader in loaders] for s in range(2)]
        tokens = sum(batch.ids_BT.numel() for loader in loaders for batch in loader.batches(0))
        return per_step, tokens

    (plain, plain_tokens), (grouped, tokens) = steps(False), steps(True)
    for mine, theirs in zip(grouped, plain, strict=True):
        assert sorted(i for part in mine for i in part) == sorted(i for part in theirs for i in part)
        assert [len(part) for part in mine] == [4] * 3 * world_size
    assert tokens < 0.92 * plain_tokens
    lengths = [[len(samples[i].messages[1].parts[0]) for i in part] for part in grouped[0]]
    assert all(max(first) <= min(second) for first, second in pairwise(lengths))


def test_a_batch_is_no_longer_than_its_longest_row(world, model):
    for batch in batches_of(world, model, sizes=(1, 2, 3)):
        assert (batch.ids_BT[:, -1] != model.processor.tokenizer.pad_id).any()


@pytest.mark.slow
def test_a_run_by_length_is_the_run_without(world, tmp_path):
    configs = [world.config(tmp_path / str(grouped)) for grouped in (False, True)]
    configs[1].data.group_by_length = True
    for config in configs:
        assert train(config) == 0
    weights = [load_file(disk.newest(Path(c.output_dir) / "tiny") / "model.safetensors") for c in configs]
    for name in weights[0]:
        assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-5)


# Chunked loss


def test_the_loss_in_pieces_is_the_formula(model, monkeypatch):
    model.requires_grad_(False)
    x_MD = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    targets_M = torch.arange(20) * 7
    scores_MV = (x_MD @ model.language_model.lm_head.weight.T).double()
    wanted = sum(math.log(row.exp().sum()) - row[t] for row, t in zip(scores_MV, targets_M.tolist(), strict=True))
    for rows in (1, 3, 20, 100):
        monkeypatch.setattr("mmllm.models.multimodal.LOGITS_AT_ONCE", rows * 512)
        assert model.loss_sum(x_MD, targets_M).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_the_gradient_made_with_the_loss_is_that_of_autograd(rows):
    rng = torch.Generator().manual_seed(0)
    x_MD, weight_VD = (torch.randn(n, 8, generator=rng, dtype=torch.float64, requires_grad=True) for n in (20, 50))
    targets_M = torch.arange(20) * 2
    wanted = torch.autograd.grad(3 * cross_entropy(x_MD @ weight_VD.T, targets_M, reduction="sum"), [x_MD, weight_VD])
    got = torch.autograd.grad(3 * cross_entropy_sum(x_MD, weight_VD, targets_M, rows), [x_MD, weight_VD])
    assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_gradient_made_with_the_loss_is_that_of_autograd_in_bfloat16():
    rng = torch.Generator().manual_seed(0)
    x_MD, weight_VD = (torch.randn(n, 64, generator=rng, requires_grad=True) for n in (20, 50))
    targets_M = torch.arange(20) * 2
    with torch.autocast("cpu", torch.bfloat16):
        plain = cross_entropy((x_MD @ weight_VD.T).float(), targets_M, reduction="sum")
        ours = cross_entropy_sum(x_MD, weight_VD, targets_M, 7)
    assert_close(ours, plain)
    wanted, got = (torch.autograd.grad(loss, [x_MD, weight_VD]) for loss in (plain, ours))
    assert_close(got, wanted, rtol=0.01, atol=0.02)


def test_few_rows_added_to_a_tied_gradient_make_the_whole_one(world, model):
    batches = batches_of(world, model)
    embedding = model.language_model.model.embed_tokens
    (_, whole), is_sparse = gradients(model, batches), embedding.sparse
    embedding.sparse = True
    _, added = gradients(model, batches)
    assert not is_sparse and embedding.weight.grad.layout == torch.strided
    assert_close(added, whole)


# Compiled blocks


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_blocks_give_the_gradient_of_plain_ones_at_any_length(world, model):
    train_only_(model, ["multi_modal_projector", "language_model"])
    batches = [*batches_of(world, model, (2, 3)), *batches_of(world, model, (4,))]
    loss, plain = gradients(model, batches)
    compile_blocks_(model.language_model.model.layers[:1])
    compiled_loss, found = gradients(model, batches)
    assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    worst = max(((found[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain)
    assert worst <= 3e-6


def test_compiling_without_a_compiler_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="training.compile needs a C.. compiler, and there is no no-such-compiler"):
        compile_blocks_([nn.Linear(1, 1)])
