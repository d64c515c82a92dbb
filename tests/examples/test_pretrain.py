"""The small backbones learn, and the command writes two official folders that train.py takes."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from examples.pretrain import __main__ as command
from examples.pretrain import training
from examples.pretrain.backbones import question_of
from examples.pretrain.folders import CONTROL_TOKENS, build_tokenizer
from examples.pretrain.guide import Guide, pretrain_guide
from examples.pretrain.images import CaptionedImages
from examples.pretrain.training import blended, half_of_the_patches, initialise_, pretrain_clip, pretrain_qwen, rows_of
from mmllm.data.chat import IGNORED
from mmllm.data.image import ImageProcessor
from mmllm.data.samples import load_samples
from mmllm.errors import UserError
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Qwen2

COLORS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}


@pytest.fixture
def photographs(tmp_path):
    """Sixteen plain images with two captions each, and their data file."""
    records = []
    for i in range(16):
        name = list(COLORS)[i % 4]
        Image.new("RGB", (40, 40), COLORS[name]).save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", "captions": [f"a {name} wall", f"only {name}, picture {i}"]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "captions.jsonl"


def tiny_tower() -> CLIPVisionTower:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionTower(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16), True)
    initialise_(tower, 0)
    return tower


@pytest.mark.parametrize("word_loss", [0.0, 0.1])
def test_clip_learns_to_match_images_and_captions(word_loss):
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    captions = [[[i, 8 + i], [i]] for i in range(8)]
    matched = pretrain_clip(
        tiny_tower(), lambda step: (pixels, captions), 20, steps=60, learning_rate=3e-3, word_loss=word_loss
    )
    assert matched > 0.9


def test_the_target_of_a_word_is_the_share_of_captions_that_hold_it(monkeypatch):
    """The target of the second task is the share of the captions that hold a token."""
    targets = []
    real = torch.nn.functional.binary_cross_entropy_with_logits

    def spy(logits, target, **options):
        targets.append(target)
        return real(logits, target, **options)

    monkeypatch.setattr(training.F, "binary_cross_entropy_with_logits", spy)
    captions = [[[1, 2, 2], [1], [3], [1]], [[0]]]
    pretrain_clip(
        tiny_tower(), lambda step: (torch.randn(2, 3, 16, 16), captions), 5, steps=1, learning_rate=0, word_loss=1
    )
    assert targets[0].tolist() == [[0, 0.75, 0.25, 0.25, 0], [1, 0, 0, 0, 0]]


def test_captions_longer_than_the_text_tower_reads_are_cut():
    captions = [[[1] * 200, [2] * 200], [[3]]]
    pretrain_clip(
        tiny_tower(), lambda step: (torch.randn(2, 3, 16, 16), captions), 5, steps=1, learning_rate=0, word_loss=1
    )


def test_qwen_learns_only_what_is_labelled():
    config = Qwen2Config(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rope_theta=1e4, max_position_embeddings=32,
    )  # fmt: skip
    lm = Qwen2(config)
    initialise_(lm, 0)
    rng = torch.Generator().manual_seed(0)

    def copies(step: int):
        """The noise in front has no targets; the answer repeats its first token."""
        ids = torch.randint(0, 16, (16, 4), generator=rng)
        rows = torch.cat([ids, ids[:, :1]], 1)
        labels = torch.full_like(rows, IGNORED)
        labels[:, -1] = rows[:, -1]
        return rows, labels

    assert pretrain_qwen(lm, copies, steps=150, learning_rate=5e-3) < 0.3


def test_initialisation_is_a_function_of_the_seed():
    first, second, third = tiny_tower(), tiny_tower(), tiny_tower()
    initialise_(third, 1)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same) and not torch.equal(next(first.parameters()), next(third.parameters()))


def test_the_tokenizer_is_made_like_qwens():
    tokenizer = build_tokenizer(["a red wall, a red door"] * 5, 300)
    size = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(name) for name in CONTROL_TOKENS] == list(range(size - len(CONTROL_TOKENS), size))
    assert tokenizer.decode(tokenizer.encode("été 12 日本\n").ids) == "été 12 日本\n"
    digits = tokenizer.encode("2026").tokens
    assert digits == list("2026"), "Qwen2.5 never joins digits"


def test_an_image_is_mirrored_only_where_no_caption_says_left_or_right(photographs):
    lines = [json.loads(line) for line in photographs.read_text().split("\n")]
    lines[0]["captions"] = ["something on the Left"]
    photographs.write_text("\n".join(map(json.dumps, lines)))
    images = CaptionedImages(load_samples(photographs, None), lambda text: [len(text)], ImageProcessor(16))
    assert images.can_flip == [False] + [True] * 15
    pixels, captions = images.batch(16, random.Random(0))
    assert pixels.shape == (16, 3, 16, 16) and sorted(map(len, captions)) == [1] + [2] * 15
    assert np.allclose(pixels.std(), 1, atol=0.5)


def test_augmented_images_are_other_parts_and_colors_in_the_usual_range(photographs):
    images = CaptionedImages(
        load_samples(photographs, None), lambda text: [len(text)], ImageProcessor(16), augment=True
    )
    (first, _), (second, _) = images.batch(16, random.Random(0)), images.batch(16, random.Random(1))
    assert images.pixels.shape == (16, 3, 24, 24) and first.shape == (16, 3, 16, 16)
    assert not torch.equal(first, second) and first.abs().max() < 3
    colors = first.mean((2, 3))
    assert (first - colors[:, :, None, None]).abs().max() < 1e-4, "a wall of one color stays one"
    assert len({tuple(color) for color in colors.tolist()}) == 16


def test_half_of_the_patches_are_kept_and_found_again():
    kept = half_of_the_patches(3, 8, random.Random(0))
    assert kept.shape == (3, 4) and all(len(set(row)) == 4 for row in kept.tolist())
    numbers = torch.arange(8.0).expand(3, 8)[:, :, None].expand(3, 8, 2)
    assert torch.equal(rows_of(numbers, kept)[:, :, 1], kept.float())


def test_a_blend_has_its_share_of_both_images():
    assert blended(torch.tensor([[0.0, 8.0], [4.0, 0.0]]), 0.75).tolist() == [[1, 6], [3, 2]]


def test_a_guide_learns_the_words_and_a_tower_learns_from_it(monkeypatch):
    """What the guide says of an image is to be seen at each place; it is frozen when the tower learns."""
    rng = random.Random(0)
    bright = torch.tensor([[[-2.0]], [[2.0]]]).expand(2, 3, 16)[:, :, :, None].expand(2, 3, 16, 16)

    def next_batch(step):
        shown = [rng.randrange(2) for _ in range(8)]
        return bright[shown] + 0.1 * torch.randn(8, 3, 16, 16), [[[i]] for i in shown]

    torch.manual_seed(0)
    guide = Guide(8, 32, 2, width=8)
    pretrain_guide(guide, next_batch, steps=60, learning_rate=1e-2)
    features, logits = guide(bright)
    assert features.shape == (2, 4, 32)
    assert (logits.sigmoid() - torch.eye(2)).abs().max() < 0.25
    before, losses = [x.clone() for x in guide.state_dict().values()], []
    real = training.distance
    monkeypatch.setattr(training, "distance", lambda *features: losses.append(real(*features)) or losses[-1])
    options = {"guide": guide, "word_loss": 0.1}
    pretrain_clip(tiny_tower(), next_batch, 2, steps=40, learning_rate=3e-3, text_layers=0, **options)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.equal(a, b) for a, b in zip(before, guide.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [[], ["--guide-steps", "2"]])
def test_the_command_writes_two_folders_that_can_be_joined(photographs, tmp_path, options):
    sizes = "--image-size 16 --patch-size 8 --vision-width 64 --vision-layers 2 --vocab-size 320 --text-width 64"
    steps = "--text-layers 1 --clip-steps 3 --clip-batch 4 --qwen-steps 3 --device cpu"
    arguments = ["--data", str(photographs), "--out", str(tmp_path / "out"), *sizes.split(), *steps.split()]
    command.main(arguments + options)
    model = MultimodalLLM.from_towers(tmp_path / "out" / "clip", tmp_path / "out" / "qwen")
    assert model.config.num_image_tokens == 4
    assert Tokenizer.from_file(str(tmp_path / "out" / "qwen" / "tokenizer.json")).get_vocab_size() <= 320


def test_questions_with_their_answers_are_learned_from_too(photographs, tmp_path):
    """The answers about an image are its captions; the language model learns which answers go with which question."""
    records = [json.loads(line) for line in photographs.read_text().split("\n")]
    asked = [{"image": r["image"], "question": q, "answer": r["captions"][0].split()[i]} for r in records
             for i, q in enumerate(("What article?", "What color?", "What is it?"))]  # fmt: skip
    photographs.write_text("\n".join(map(json.dumps, asked)))
    samples = load_samples(photographs, None)
    assert question_of(samples[1]) == "What color?"
    images = CaptionedImages(samples, lambda text: [text], ImageProcessor(16))
    assert images.captions[0] == [["a"], ["red"], ["wall"]]


def test_too_few_images_for_a_batch_are_refused(photographs, tmp_path):
    with pytest.raises(UserError, match="fewer images than --clip-batch 64; lower it"):
        command.main(["--data", str(photographs), "--out", str(tmp_path / "out")])
