"""The joined model: against LLaVA of transformers, its sizes, its loss, and its directory."""

import json

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from mmllm.data.chat import IGNORED, assistant, user
from mmllm.errors import CheckpointError
from mmllm.inference.generate import generate
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.layers.quantized import count_parameters
from mmllm.models.config import MultimodalConfig
from mmllm.models.multimodal import MultimodalLLM
from official import write_clip, write_model, write_qwen


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def ours(directory):
    return MultimodalLLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    model, info = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def some_pixels(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_and_loss_are_those_of_llava(ours, theirs):
    encoded = ours.processor.encode([user("what is it?", images=2), assistant("a cat on the mat")])
    ids, labels = torch.tensor([encoded.ids]), torch.tensor([encoded.labels])
    pixels = some_pixels(2)
    wanted = theirs(input_ids=ids, pixel_values=pixels, labels=labels)
    got = ours.logits(ids, pixels)
    assert wanted.logits.std() > 2
    assert (got - wanted.logits).abs().max() < 1e-4
    loss_sum, count = ours(ids, labels, pixels)
    assert count == sum(label != IGNORED for label in encoded.labels)
    assert abs(loss_sum / count - wanted.loss) < 2e-5


@torch.no_grad()
def test_greedy_tokens_are_those_of_llava(ours, theirs):
    prompt = ours.processor.encode_prompt([user("what is it?", images=1)])
    answer = next(generate(ours, [Prompt(tuple(prompt), some_pixels(1))], GenerationConfig(max_new_tokens=20)))
    ids = torch.tensor([prompt])
    wanted = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=some_pixels(1),
        max_new_tokens=20,
        do_sample=False,
    )
    wanted = [token for token in wanted[0, len(prompt) :].tolist() if token not in ours.processor.tokenizer.stop_ids]
    assert list(answer.ids)[: len(wanted)] == wanted and len(wanted) > 3


def test_gradients_are_those_of_llava(ours, theirs):
    encoded = ours.processor.encode([user("what is it?", images=1), assistant("a cat")])
    ids, labels = torch.tensor([encoded.ids]), torch.tensor([encoded.labels])
    wanted = theirs(input_ids=ids, pixel_values=some_pixels(1), labels=labels).loss
    loss_sum, count = ours(ids, labels, some_pixels(1))
    names = ("linear_1.weight", "linear_2.bias")
    mine = [dict(ours.multi_modal_projector.named_parameters())[name] for name in names]
    reference = [dict(theirs.model.multi_modal_projector.named_parameters())[name] for name in names]
    for got, want in zip(
        torch.autograd.grad(loss_sum / count, mine), torch.autograd.grad(wanted, reference), strict=True
    ):
        assert (got - want).abs().max() < 1e-3 * want.std()


def test_the_saved_processor_is_that_of_llava(ours, directory):
    """The ids that LlavaProcessor makes of the same turns with the saved template, and its pixels."""
    from PIL import Image

    processor = AutoProcessor.from_pretrained(directory)
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=text, images=[picture], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ours.processor.encode_prompt([user("what is it?", images=1)])
    assert torch.equal(inputs["pixel_values"][0], ours.processor.image_processor(picture))
    assert AutoTokenizer.from_pretrained(directory).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("features", "total", "trained"), [("patch", 582_981_504, 495_525_504), ("pooled", 583_145_344, 495_296_128)]
)
def test_the_published_sizes_have_the_parameters_of_the_design(features, total, trained):
    with torch.device("meta"):
        model = MultimodalLLM(MultimodalConfig(features=features))
    assert count_parameters(model) == total
    assert count_parameters(model.multi_modal_projector) + count_parameters(model.language_model) == trained


def test_text_alone_needs_no_picture(ours):
    ids = torch.tensor([ours.processor.encode_prompt([user("hello")])])
    assert ours.logits(ids, torch.zeros(0, 3, 32, 32)).isfinite().all()


def test_pictures_that_do_not_fit_their_places_are_refused(ours):
    ids = torch.tensor([ours.processor.encode_prompt([user("hello", images=1)])])
    with pytest.raises(ValueError, match="16 image places in the text for 2 images"):
        ours.logits(ids, some_pixels(2))


def test_the_loss_in_pieces_is_the_loss_at_once(ours, monkeypatch):
    x, targets = torch.randn(50, 64, requires_grad=True), torch.arange(50)
    whole = ours.loss_sum(x, targets)
    (wanted,) = torch.autograd.grad(whole, x)
    monkeypatch.setattr("mmllm.models.multimodal.LOGITS_AT_ONCE", 7 * 512)
    pieces = ours.loss_sum(x, targets)
    (got,) = torch.autograd.grad(pieces, x)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_padding_on_the_right_does_not_move_the_loss(ours):
    encoded = ours.processor.encode([user("what is it?", images=1), assistant("a cat")])
    ids, labels = torch.tensor([encoded.ids]), torch.tensor([encoded.labels])
    alone, count = ours(ids, labels, some_pixels(1))
    pads = torch.full((1, 9), ours.processor.tokenizer.pad_id)
    longer = torch.cat([ids, pads], 1), torch.cat([labels, torch.full((1, 9), IGNORED)], 1)
    padded, same = ours(*longer, some_pixels(1))
    assert count == same
    torch.testing.assert_close(alone, padded)


@pytest.mark.parametrize("features", ["patch", "pooled"])
def test_a_saved_model_is_the_same_model(tmp_path, features):
    first = MultimodalLLM.from_pretrained(write_model(tmp_path / "a", features=features))
    first.save_pretrained(tmp_path / "b")
    second = MultimodalLLM.from_pretrained(tmp_path / "b")
    ids = torch.tensor([first.processor.encode_prompt([user("hm", images=1)])])
    assert torch.equal(first.logits(ids, some_pixels(1)), second.logits(ids, some_pixels(1)))
    assert second.config == first.config and second.processor.system == first.processor.system
    for name in ("config.json", "mmllm.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_new_projector_is_drawn_by_its_seed(tmp_path):
    clip, qwen = write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen")
    weights = [
        MultimodalLLM.from_towers(clip, qwen, seed=seed).multi_modal_projector.linear_1.weight for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "blip"}, "model_type 'blip'"),
        ({"vision_feature_layer": -1}, "vision_feature_layer is -1"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'"),
        ({"image_token_index": None}, "image_token_index"),
    ],
)
def test_a_directory_of_another_architecture_is_refused(directory, tmp_path, change, named):
    config = json.loads((directory / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=named):
        MultimodalConfig.from_dict(config)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    clip, qwen = write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen", vocab_size=270)
    with pytest.raises(CheckpointError, match="280 tokens, but the model has 270 rows"):
        MultimodalLLM.from_towers(clip, qwen)


def test_pictures_of_another_size_are_refused(tmp_path):
    clip, qwen = write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen")
    images = json.loads((clip / "preprocessor_config.json").read_text()) | {"size": 48, "crop_size": 48}
    (clip / "preprocessor_config.json").write_text(json.dumps(images))
    with pytest.raises(CheckpointError, match="makes images of 48 pixels, but the vision tower takes 32"):
        MultimodalLLM.from_towers(clip, qwen)


def test_a_frozen_tower_keeps_no_graph_but_the_projector_does(ours):
    ours.vision_tower.requires_grad_(False)
    features = ours.encode_images(some_pixels(1))
    graph = [features.grad_fn]
    for node in graph:
        graph += [next_node for next_node, _ in node.next_functions if next_node]
    leaves = {id(node.variable) for node in graph if hasattr(node, "variable")}
    ours.vision_tower.requires_grad_(True)
    assert leaves == {id(p) for p in ours.multi_modal_projector.parameters()}
