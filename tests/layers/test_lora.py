"""Adapters against peft, in both directions; their gradient, their files, and a run that is resumed with them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, Qwen2ForCausalLM

from mmllm.config.schema import LoraConfig
from mmllm.data.batches import make_batch, read_rows
from mmllm.data.chat import assistant, user
from mmllm.data.samples import load_samples
from mmllm.errors import CheckpointError, ConfigError
from mmllm.layers.lora import adapters, add_lora_, load_adapter_, merge_lora_
from mmllm.layers.quantized import count_parameters
from mmllm.models.config import MultimodalConfig
from mmllm.models.loading import ModelForm
from mmllm.models.multimodal import MultimodalLLM
from mmllm.storage import checkpoint as disk
from mmllm.training.experiment import train
from mmllm.training.prepare import train_only_
from mmllm.training.step import accumulate_gradients
from official import write_model
from tiny_run import write_world

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
NAMES = ("q_proj", "v_proj", "k_proj", "o_proj")


def randomise_adapters_(model: MultimodalLLM, config: LoraConfig) -> None:
    """Adapters that change every answer: B is not zero."""
    add_lora_(model.language_model, config, seed=1)
    model.form = ModelForm(lora=config)
    rng = torch.Generator().manual_seed(2)
    for layer in adapters(model.language_model).values():
        layer.lora_B.data = 0.05 * torch.randn(layer.lora_B.shape, generator=rng)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture
def ours(directory):
    return MultimodalLLM.from_pretrained(directory)


def inputs(model: MultimodalLLM) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = model.processor.encode([user("what is it?", images=1), assistant("a cat on the mat")])
    return torch.tensor([encoded.ids]), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_new_adapters_change_no_logit_and_trained_ones_do(ours):
    before = ours.logits(*inputs(ours))
    add_lora_(ours.language_model, LoraConfig())
    assert torch.equal(ours.logits(*inputs(ours)), before)
    assert set(adapters(ours.language_model)) == {
        f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in NAMES
    }
    for layer in adapters(ours.language_model).values():
        layer.lora_B.data.fill_(0.01)
    assert (ours.logits(*inputs(ours)) - before).abs().max() > 0.01


def test_adapters_of_the_published_model_have_two_million_parameters():
    with torch.device("meta"):
        model = MultimodalLLM(MultimodalConfig())
    add_lora_(model.language_model, LoraConfig())
    train_only_(model, ["language_model"])
    assert count_parameters(model, only_trainable=True) == 2_162_688


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [NAMES, ("all-linear",)])
@torch.no_grad()
def test_peft_loads_what_is_saved_and_gives_the_same_logits(ours, directory, tmp_path, targets, rslora):
    randomise_adapters_(ours, LoraConfig(r=4, target_modules=targets, use_rslora=rslora))
    ours.multi_modal_projector.linear_1.bias.data += 1
    ours.save_pretrained(tmp_path / "saved")
    base = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids, pixels = inputs(ours)
    wanted = theirs(input_ids=ids, pixel_values=pixels).logits
    assert (ours.logits(ids, pixels) - wanted).abs().max() < 1e-4 * wanted.std()
    again = MultimodalLLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.logits(ids, pixels), ours.logits(ids, pixels))
    assert again.form.lora.r == 4 and again.form.lora.use_rslora == rslora


@torch.no_grad()
def test_an_adapter_that_peft_made_for_qwen_is_read(tmp_path, ours, directory):
    sources = directory.parent / "model-sources"
    theirs = Qwen2ForCausalLM.from_pretrained(sources / "qwen", dtype=torch.float32)
    theirs = get_peft_model(theirs, PeftConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter_(ours, tmp_path / "adapter")
    ids = torch.randint(0, 280, (1, 20))
    got = ours.language_model.logits(ours.language_model(ours.language_model.embed(ids)))
    wanted = theirs.eval()(ids).logits
    assert (got - wanted).abs().max() < 1e-4 * wanted.std()


@torch.no_grad()
def test_merged_adapters_give_the_same_logits_and_leave_plain_layers(ours):
    before = set(ours.state_dict())
    randomise_adapters_(ours, LoraConfig(r=4))
    ids, pixels = inputs(ours)
    wanted = ours.logits(ids, pixels)
    merge_lora_(ours.language_model)
    assert set(ours.state_dict()) == before and not adapters(ours.language_model)
    assert (ours.logits(ids, pixels) - wanted).abs().max() < 1e-4 * wanted.std()


def test_a_target_that_is_not_there_is_named(ours):
    with pytest.raises(ConfigError, match="no layer query; there are down_proj, gate_proj, k_proj"):
        add_lora_(ours.language_model, LoraConfig(target_modules=("q_proj", "query")))


@pytest.fixture
def saved(ours, tmp_path):
    randomise_adapters_(ours, LoraConfig(r=4))
    ours.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"use_dora": True}, "use_dora is True; only False is supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; it must be 'LORA'"),
        ({"r": 8}, r"lora_A is \[4, 64\], but \[8, 64\] is needed"),
    ],
)
def test_an_adapter_with_unsupported_settings_is_refused(saved, about, words):
    content = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(content | about))
    with pytest.raises(CheckpointError, match=words):
        MultimodalLLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(next(n for n in t if "layers.2" in n and "lora_B" in n)), "layers.2.*is missing"),
        (lambda t: t.update({"base_model.model.x.weight": torch.zeros(1)}), "belongs to no layer"),
        (
            lambda t: t.update({n.replace("layers.1.", "layers.9."): t[n].clone() for n in list(t)}),
            "layers.9.*has no layer here",
        ),
    ],
)
def test_every_tensor_of_an_adapter_must_have_its_layer(saved, change, words):
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        MultimodalLLM.from_pretrained(saved)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def config_with_lora(world, folder, **training):
    config = world.config(folder, **training)
    config.model.use_lora = True
    config.model.lora_config.r = 4
    return config


def test_any_split_gives_the_same_gradient_of_the_adapters(world):
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    randomise_adapters_(model, LoraConfig(r=4, lora_dropout=0.0))
    model = model.to(torch.float64)
    train_only_(model, ["multi_modal_projector", "language_model"])
    rows = [
        read_rows(s, model.processor)[0] for s in load_samples(world.folder / "train.json", world.folder / "images")[:8]
    ]
    found = []
    for size in (8, 3, 1):
        model.zero_grad()
        accumulate_gradients(model, [make_batch(rows[i : i + size], model.processor) for i in range(0, 8, size)])
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(".lora_" in name or name.startswith("multi_modal_projector") for name in found[0])
    assert any(".lora_A" in name for name in found[0])
    for split in found[1:]:
        assert max((split[name] - whole).norm() / whole.norm() for name, whole in found[0].items()) <= 1e-12


@pytest.fixture(scope="module")
def whole_run(world, tmp_path_factory):
    config = config_with_lora(world, tmp_path_factory.mktemp("whole"), save_steps=1, keep_checkpoints=100)
    assert train(config) == 0
    return config


def run_directory(config):
    from pathlib import Path

    return Path(config.output_dir) / config.experiment_name


def tensors_of(checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{file.name} {name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def test_stage_2_moves_the_adapters_and_never_the_base(world, whole_run):
    first, last = (tensors_of(disk.checkpoints(run_directory(whole_run))[i]) for i in (4, -1))
    moved = {name for name in last if name in first and not torch.equal(first[name], last[name])}
    base = {name for name in moved if name.startswith("model.safetensors language_model")}
    assert not base
    assert {name for name in last if "adapter_model" in name and ".lora_B" in name} <= moved


@pytest.mark.parametrize("step", [5, 8], ids=["between the stages", "inside stage 2"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_with_dropout(world, whole_run, tmp_path, step):
    config = config_with_lora(world, tmp_path, save_steps=1, keep_checkpoints=100)
    shutil.copytree(run_directory(whole_run), run_directory(config), symlinks=True)
    for checkpoint in disk.checkpoints(run_directory(config)):
        if disk.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    assert train(config, resume="auto") == 0
    mine, theirs = (tensors_of(disk.checkpoints(run_directory(c))[-1]) for c in (config, whole_run))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_a_run_is_not_resumed_with_other_adapters(world, whole_run, tmp_path):
    config = config_with_lora(world, tmp_path)
    shutil.copytree(run_directory(whole_run), run_directory(config), symlinks=True)
    config.model.lora_config.r = 8
    with pytest.raises(CheckpointError, match=r"model.lora_config.r: 4 at the checkpoint, 8 now"):
        train(config, resume="auto")


def test_a_run_without_adapters_merges_those_of_the_model_it_starts_from(world, whole_run, tmp_path, capsys):
    source = run_directory(whole_run) / "best_model"
    config = world.config(tmp_path)
    config.model.pretrained = str(source)
    config.training.stage1.epochs = 0
    config.training.stage2.learning_rate = 0.0
    assert train(config) == 0
    assert "they are added to its weights" in capsys.readouterr().out
    before, after = (MultimodalLLM.from_pretrained(path) for path in (source, run_directory(config) / "best_model"))
    assert after.form.lora is None
    ids, pixels = inputs(before)
    with torch.no_grad():
        torch.testing.assert_close(after.logits(ids, pixels), before.logits(ids, pixels), rtol=0, atol=1e-4)


def test_adapters_of_another_size_are_not_replaced_silently(world, whole_run, tmp_path):
    config = config_with_lora(world, tmp_path)
    config.model.pretrained = str(run_directory(whole_run) / "best_model")
    config.model.lora_config.r = 8
    with pytest.raises(ConfigError, match="but the model came with"):
        train(config)
