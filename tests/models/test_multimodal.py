"""The whole model: logits, loss, gradients and greedy tokens are those of transformers' LLaVA."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from mmllm.data.chat import IGNORED, assistant, user
from mmllm.inference.engine import generate
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.layers.quantized import count_parameters
from mmllm.models.config import MultimodalConfig
from mmllm.models.multimodal import MultimodalLLM
from official import write_model, write_qwen3, write_siglip


@pytest.fixture(
    scope="module", params=[{}, {"vision": write_siglip, "text": write_qwen3}], ids=["clip-qwen2", "siglip-qwen3"]
)
def directory(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", **request.param)


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
        assert (got - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize(
    ("features", "total", "trained"), [("patch", 582_981_504, 495_525_504), ("pooled", 583_145_344, 495_296_128)]
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(features, total, trained):
    with torch.device("meta"):
        model = MultimodalLLM(MultimodalConfig(features=features))
    assert count_parameters(model) == total
    assert count_parameters(model.multi_modal_projector) + count_parameters(model.language_model) == trained


def test_text_alone_needs_no_image(ours):
    ids = torch.tensor([ours.processor.encode_prompt([user("hello")])])
    assert ours.logits(ids, torch.zeros(0, 3, 32, 32)).isfinite().all()


def test_a_number_of_images_other_than_in_the_text_is_refused(ours):
    ids = torch.tensor([ours.processor.encode_prompt([user("hello", images=1)])])
    with pytest.raises(ValueError, match="16 image places in the text for 2 images"):
        ours.logits(ids, some_pixels(2))


def test_the_loss_in_pieces_equals_the_loss_at_once(ours, monkeypatch):
    x, targets = torch.randn(50, 64, requires_grad=True), torch.arange(50)
    whole = ours.loss_sum(x, targets)
    (wanted,) = torch.autograd.grad(whole, x)
    monkeypatch.setattr("mmllm.models.multimodal.LOGITS_AT_ONCE", 7 * 512)
    pieces = ours.loss_sum(x, targets)
    (got,) = torch.autograd.grad(pieces, x)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_padding_on_the_right_does_not_change_the_loss(ours):
    encoded = ours.processor.encode([user("what is it?", images=1), assistant("a cat")])
    ids, labels = torch.tensor([encoded.ids]), torch.tensor([encoded.labels])
    alone, count = ours(ids, labels, some_pixels(1))
    pads = torch.full((1, 9), ours.processor.tokenizer.pad_id)
    longer = torch.cat([ids, pads], 1), torch.cat([labels, torch.full((1, 9), IGNORED)], 1)
    padded, same = ours(*longer, some_pixels(1))
    assert count == same
    torch.testing.assert_close(alone, padded)


def test_a_frozen_tower_records_no_graph_and_the_projector_does(ours):
    ours.vision_tower.requires_grad_(False)
    features = ours.encode_images(some_pixels(1))
    graph = [features.grad_fn]
    for node in graph:
        graph += [next_node for next_node, _ in node.next_functions if next_node]
    leaves = {id(node.variable) for node in graph if hasattr(node, "variable")}
    ours.vision_tower.requires_grad_(True)
    assert leaves == {id(p) for p in ours.multi_modal_projector.parameters()}
