"""Several captions or questions about one image in one row: loss and gradient are those of separate rows."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmllm.data.batches import BatchLoader, make_batch, ordered_batches, read_rows
from mmllm.data.chat import IMAGE, Message, assistant, user
from mmllm.data.samples import Sample, share_images
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.shared_prefix import attention_of, positions_of, predictor_positions
from mmllm.training.step import accumulate_gradients, count_targets
from mmllm.training.validation import validation_losses
from tiny_run import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(world):
    return MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen").train()


@pytest.fixture(scope="module")
def samples(world) -> list[Sample]:
    """Two images with captions or questions, one with a single text, two images at once, one image behind different
    words, and text alone."""
    images = [(world.folder / "images" / f"{i}.png",) for i in range(4)]
    both = images[0] + images[1]
    return [
        *(caption(images[0], text) for text in ("a cat", "a cat on the mat", "a hat", "a cat", "in")),
        question(images[1], "what is it?", "a thing", "where?", "there"),
        question(images[2], "how many?", "one"),
        question(images[1], "what color?", "red"),
        question(images[1], "why?", "the thing is on the mat"),
        Sample("both", both, (user("which?", images=2), assistant("the one"))),
        Sample("both", both, (user("the other?", images=2), assistant("in"))),
        Sample("late", images[3], (Message("user", ("what is it?\n", IMAGE)), assistant("a cat"))),
        Sample("late", images[3], (Message("user", ("why?\n", IMAGE, "\nwhere?")), assistant("on the mat"))),
        question((), "hello", "one"),
    ]


def caption(images: tuple[Path, ...], text: str) -> Sample:
    return question(images, "Describe this image.", text)


def question(images: tuple[Path, ...], *turns: str) -> Sample:
    messages = [user(turns[0], images=len(images)), assistant(turns[1])]
    for i in range(2, len(turns), 2):
        messages += [user(turns[i]), assistant(turns[i + 1])]
    return Sample(turns[1], images, tuple(messages))


def gradients(model, batches):
    model.zero_grad()
    loss = accumulate_gradients(model, batches)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_one_row_per_image_has_the_targets_loss_and_gradient_of_separate_rows(model, samples, dtype, tolerance):
    model = model.to(dtype)
    process = model.processor
    separate = make_batch([read_rows(sample, process)[0] for sample in samples], process)
    shared = make_batch([row for sample in share_images(samples) for row in read_rows(sample, process)], process)
    assert (len(separate.ids_BT), len(separate.pixels_N3SS)) == (14, 15)
    assert (len(shared.ids_BT), len(shared.pixels_N3SS)) == (6, 6)
    assert count_targets([shared]) == count_targets([separate])
    assert shared.ids_BT.numel() < 0.7 * separate.ids_BT.numel()
    loss, wanted = gradients(model, [separate])
    shared_loss, found = gradients(model, [shared])
    model.to(torch.float32)
    assert_close(shared_loss, loss, rtol=tolerance, atol=0)
    # without RoPE a key's bias adds the same to all scores of a query: its true gradient is zero, and what is computed is noise
    names = [n for n in wanted if not (n.startswith("vision_tower") and n.endswith("k_proj.bias"))]
    worst = max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in names)
    assert worst <= tolerance


def test_positions_predictors_and_attention_of_a_row_written_out():
    segment_ids = torch.tensor([[0, 0, 1, 1, 2, -1], [0, 0, 0, -1, -1, -1]])
    assert positions_of(segment_ids)[:, :5].tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 4]]
    assert predictor_positions(segment_ids)[0].tolist() == [0, 0, 1, 2, 1, 4]
    assert attention_of(segment_ids)[0, :5].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]


def test_validation_and_training_batches_keep_the_texts_of_an_image_together(world, model, samples, tmp_path):
    groups = share_images(samples)
    config = world.config(tmp_path)
    scores = [validation_losses(model, some, config, 3)["val_loss"] for some in (samples, groups)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    loader = BatchLoader(groups, model.processor, 3, num_workers=0)
    batches = list(loader.batches(0))
    assert sum(count_targets([batch]) for batch in batches) == count_targets(
        list(ordered_batches(samples, model.processor, 14, num_workers=0))
    )
