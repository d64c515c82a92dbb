"""The drawn world says what it shows, keeps what it holds out, and its backbones are official files."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModelWithProjection, Qwen2ForCausalLM

from examples.shapes import backbones as made
from examples.shapes import demo, sheet, world
from mmllm.data.samples import load_samples, share_images
from mmllm.evaluation.tasks import tasks_of
from mmllm.models.multimodal import MultimodalLLM


def scenes(n: int, **options) -> list[world.Scene]:
    rng = random.Random(0)
    return [world.any_scene(rng, **options) for _ in range(n)]


def test_nothing_held_out_is_drawn_for_training_and_always_for_the_test():
    assert not any(thing.is_held_out for scene in scenes(500) for thing in scene)
    assert all(any(thing.is_held_out for thing in scene) for scene in scenes(100, held_out=True))
    rng = random.Random(1)
    assert not any(thing.is_held_out for s in scenes(300) for thing in world.one_attribute_changed(s, rng))


def test_things_never_share_a_place_and_stand_in_reading_order():
    for scene in scenes(300):
        places = [list(world.PLACES).index(thing.place) for thing in scene]
        assert places == sorted(set(places)) and len(places) in (1, 2)


def test_every_thing_lies_within_one_patch():
    for scene in scenes(100):
        pixels = np.asarray(world.draw(scene)).astype(int)
        drawn = (np.abs(pixels - world.PAPER[0]).sum(-1) > 0).reshape(3, world.PATCH, 3, world.PATCH).any((1, 3))
        wanted = {(y // world.PATCH, x // world.PATCH) for x, y in (world.PLACES[thing.place] for thing in scene)}
        assert set(zip(*(axis.tolist() for axis in np.nonzero(drawn)), strict=True)) == wanted


def test_the_color_of_a_thing_is_the_color_of_its_middle():
    for scene in scenes(100):
        image = world.draw(scene)
        for thing in scene:
            x, y = world.PLACES[thing.place]
            assert image.getpixel((x + thing.dx, y + thing.dy)) == world.COLORS[thing.color]


def test_a_large_thing_is_larger_than_a_small_one_of_its_shape():
    for shape in world.SHAPES:
        small, large = (
            (np.asarray(world.draw((world.Thing("red", shape, size, "top left"),))) != world.PAPER[0]).sum()
            for size in ("small", "large")
        )
        assert large > 2 * small


def test_questions_have_one_answer_each():
    red, blue = world.Thing("red", "cross", "small", "top left"), world.Thing("blue", "cross", "large", "bottom right")
    asked = {q.text: (q.kind, q.answer) for q in world.questions((red, blue))}
    assert asked["How many shapes are there?"] == ("count", "two")
    assert asked["Where is the red one?"] == ("place", "top left")
    assert asked["Is the blue one small or large?"] == ("size", "large")
    assert "What color is the cross?" not in asked, "there are two"
    assert world.caption((red, blue)) == "a small red cross at the top left and a large blue cross at the bottom right"


def test_the_data_can_be_trained_on_and_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 5)
    monkeypatch.setattr(demo, "NEW_IMAGES", 4)
    demo.write_data(tmp_path / "data")
    samples = share_images(load_samples(tmp_path / "data" / "train.json", None))
    assert len(samples) == 5
    assert all(len(sample.shared) >= 4 for sample in samples)  # the caption, and every question with one answer
    for name in ("val", "held_out"):
        tasks = tasks_of(load_samples(tmp_path / "data" / f"{name}.json", None))
        assert sum(task.is_caption for task in tasks) == 4
        assert all(task.kind.startswith(("one: ", "two: ")) for task in tasks if not task.is_caption)
    demo.write_data(tmp_path / "again")
    assert (tmp_path / "again" / "val.json").read_text() == (tmp_path / "data" / "val.json").read_text()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Made in a few steps: they know nothing, but they are whole."""
    folder, recipe = tmp_path_factory.mktemp("shapes"), dict(made.RECIPE)
    made.RECIPE.update(clip_steps=2, clip_groups=2, text_steps=2, text_batch=2)
    made.make_backbones(folder)
    made.RECIPE.update(recipe)
    return folder


@torch.no_grad()
def test_the_backbones_are_official_folders(backbones):
    clip = CLIPVisionModelWithProjection.from_pretrained(backbones / "clip")
    qwen, loading = Qwen2ForCausalLM.from_pretrained(backbones / "qwen", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ours = MultimodalLLM.from_towers(backbones / "clip", backbones / "qwen")
    pixels = torch.randn(2, 3, world.SIDE, world.SIDE)
    wanted = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(ours.vision_tower.patches(pixels), wanted, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(backbones / "qwen")
    text = "a small red cross at the top left"
    assert tokenizer(text)["input_ids"] == ours.processor.tokenizer.encode(text)
    assert qwen.config.vocab_size == ours.processor.tokenizer.vocab_size


def test_each_word_of_the_world_is_one_token(backbones):
    encode = MultimodalLLM.from_towers(backbones / "clip", backbones / "qwen").processor.tokenizer.encode
    for word in (*world.COLORS, *world.SHAPES, *world.SIZES, "top", "left", "bottom", "right"):
        assert len(encode(f" {word}")) == 1, word


def test_accuracy_is_weighted_by_the_number_of_questions():
    kinds = {"one: color": {"count": 3, "accuracy": 1.0}, "one: size": {"count": 1, "accuracy": 0.0}}
    answers = {"by_kind": kinds | {"two: size": {"count": 9, "accuracy": 0.0}}}
    assert demo.by_number(answers, "one") == 0.75


def test_the_contact_sheet_shows_every_scene(backbones, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "NUM_SCENES", 4)
    MultimodalLLM.from_towers(backbones / "clip", backbones / "qwen").save_pretrained(tmp_path / "model")
    from PIL import Image

    with Image.open(sheet.contact_sheet(tmp_path / "model", tmp_path / "sheet.png")) as drawn:
        colors = {color for _, color in drawn.convert("RGB").getcolors(100_000)}
    assert set(world.COLORS.values()) & colors


def test_the_demo_stops_at_a_command_that_fails(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        demo.python("-c", "import sys; sys.exit(3)")
    assert caught.value.code == 3


def test_the_configuration_of_the_demo_trains_on_what_the_demo_writes():
    from mmllm.config import load

    config = load("configs/demo.py")
    assert config.data.train_data_path == "outputs/shapes/data/train.json"
    assert config.model.pretrained == "outputs/shapes/start"
    assert json.dumps(config.to_dict())
