"""A small drawn world and `make demo`: the whole product from two official-format folders to answers, within minutes.

    python -m examples.shapes.toy demo

draws the world, makes a small CLIP (from pictures with captions) and a small Qwen2 (from text alone) as the real ones
were made, and then runs the product's own commands on them: convert, train, evaluate, sample.

The surprising fact: whether so small a model learns to see within minutes is decided by the drawing. Shapes must be
centred on patches; an object across the border of two patches is told apart from no other. And CLIP must be shown the
same scene with one attribute changed, else it tells its pictures apart without ever looking at the shape.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from examples.pretrain.pretrain import (
    build_tokenizer,
    initialise_,
    pretrain_clip,
    pretrain_qwen,
    write_clip,
    write_qwen,
)
from mmllm.data.batches import collate
from mmllm.data.chat import ChatProcessor, assistant, user
from mmllm.data.image import ImageProcessor
from mmllm.data.samples import CAPTION_PROMPT
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import run
from mmllm.inference.pipeline import load_pipeline
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.qwen import Qwen2
from mmllm.runtime.console import duration, print_rank0
from mmllm.storage.atomic import atomic_directory

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 12, "large": 21}  # half the side, in pixels: both fit into one patch
PLACES = {"top left": (24, 24), "top right": (120, 24), "bottom left": (24, 120), "bottom right": (120, 120)}
NUMBERS = ("no", "one", "two")
HELD_OUT = {("red", "triangle"), ("blue", "circle"), ("green", "cross"), ("yellow", "square")}  # never in training
KINDS = ("count", "color", "shape", "size", "place")
SIDE, PATCH = 144, 48  # 9 patches; the places above are the centres of those in the corners
PAPER = (238, 238, 238)
TWO_THINGS = 0.6  # share of the scenes with two
NUM_QUESTIONS = 3  # of a conversation
CAPTION_SHARE = 0.3  # of the conversations
SHIFT = 2  # pixels that a thing may lie off its place


@dataclass(frozen=True)
class Thing:
    """One drawn shape; `dx`, `dy` are the pixels it lies off its place."""

    color: str
    shape: str
    size: str
    place: str
    dx: int = 0
    dy: int = 0

    @property
    def is_held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape} at the {self.place}"


Scene = tuple[Thing, ...]  # in reading order


@dataclass(frozen=True)
class Question:
    """A question about a scene, its only right answer, and its kind (one of KINDS)."""

    kind: str
    text: str
    answer: str


def random_scene(rng: random.Random, num_things: int, *, held_out: bool = False) -> Scene:
    """A scene without held-out combinations, or with at least one of them."""
    while True:
        places = sorted(rng.sample(sorted(PLACES), num_things), key=list(PLACES).index)
        scene = tuple(
            Thing(
                rng.choice(list(COLORS)),
                rng.choice(SHAPES),
                rng.choice(list(SIZES)),
                place,
                rng.randint(-SHIFT, SHIFT),
                rng.randint(-SHIFT, SHIFT),
            )
            for place in places
        )
        if any(thing.is_held_out for thing in scene) == held_out:
            return scene


def any_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A scene of one thing or of two."""
    return random_scene(rng, 2 if rng.random() < TWO_THINGS else 1, held_out=held_out)


def one_attribute_changed(scene: Scene, rng: random.Random) -> Scene:
    """Another scene of the training world that differs in one attribute of one thing; shape as often as the rest."""
    while True:
        i = rng.randrange(len(scene))
        attribute = rng.choice(("color", "shape", "shape", "size", "place"))
        values = {"color": COLORS, "shape": SHAPES, "size": SIZES, "place": PLACES}[attribute]
        changed = replace(scene[i], **{attribute: rng.choice(list(values))})
        others = scene[:i] + scene[i + 1 :]
        is_free = changed.place not in [thing.place for thing in others]
        if changed != scene[i] and is_free and not changed.is_held_out:
            return tuple(sorted((*others, changed), key=lambda thing: list(PLACES).index(thing.place)))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, SIDE x SIDE."""
    picture = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(picture)
    for thing in scene:
        left, top = PLACES[thing.place]
        x, y, half, color = left + thing.dx, top + thing.dy, SIZES[thing.size], COLORS[thing.color]
        if thing.shape == "circle":
            pen.ellipse((x - half, y - half, x + half, y + half), fill=color)
        elif thing.shape == "square":
            inner = round(0.9 * half)
            pen.rectangle((x - inner, y - inner, x + inner, y + inner), fill=color)
        elif thing.shape == "triangle":
            base = y + round(0.8 * half)
            pen.polygon([(x, y - half), (x + half, base), (x - half, base)], fill=color)
        else:
            arm = half // 3
            pen.rectangle((x - half, y - arm, x + half, y + arm), fill=color)
            pen.rectangle((x - arm, y - half, x + arm, y + half), fill=color)
    return picture


def caption(scene: Scene) -> str:
    return " and ".join(map(str, scene))


def questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one answer in `scene`, without regard to their order."""
    found = [Question("count", "How many shapes are there?", NUMBERS[len(scene)])]
    colors, shapes = [thing.color for thing in scene], [thing.shape for thing in scene]
    for thing in scene:
        if shapes.count(thing.shape) == 1:
            found.append(Question("color", f"What color is the {thing.shape}?", thing.color))
        if colors.count(thing.color) == 1:
            found.append(Question("shape", f"What shape is the {thing.color} one?", thing.shape))
            found.append(Question("size", f"Is the {thing.color} one small or large?", thing.size))
            found.append(Question("place", f"Where is the {thing.color} one?", thing.place))
    return found


def conversation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Some questions with their answers in random order, now and then with the caption among them."""
    asked = questions(scene)
    turns = [(q.text, q.answer) for q in rng.sample(asked, min(NUM_QUESTIONS, len(asked)))]
    if rng.random() < CAPTION_SHARE:
        turns.insert(rng.randint(0, len(turns)), (CAPTION_PROMPT, caption(scene)))
    return turns


# The backbones --------------------------------------------------------------------------------------------------------

RECIPE = {
    "clip_steps": 300,
    "clip_groups": 16,
    "clip_rate": 1.5e-3,
    "text_steps": 400,
    "text_batch": 16,
    "text_rate": 2e-3,
}
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
    projection_dim=128,
)


def make_backbones(out: Path) -> None:
    """Trains a CLIP and a Qwen2 of this world and writes them to `out`/clip and `out`/qwen, official files both."""
    rng = random.Random(0)
    scenes = [any_scene(rng) for _ in range(4000)]
    texts = [text for scene in scenes for q in questions(scene) for text in (caption(scene), q.text, q.answer)]
    inner = build_tokenizer(
        [*texts, CAPTION_PROMPT, "system\nYou are a helpful assistant.", "user\n", "assistant\n"], 450
    )
    images = ImageProcessor(SIDE)
    clip = CLIPVisionTower(VISION, with_projection=True)
    initialise_(clip, seed=0)

    def groups(step: int) -> tuple[torch.Tensor, list[list[list[int]]]]:
        """Scenes, each with three of one attribute changed: what must be told apart."""
        batch = []
        for _ in range(RECIPE["clip_groups"]):
            group = [any_scene(rng)]
            while len(group) < 4:
                if (other := one_attribute_changed(group[0], rng)) not in group:
                    group.append(other)
            batch += group
        pixels = torch.stack([images(draw(scene)) for scene in batch])
        return pixels, [[inner.encode(caption(scene)).ids] for scene in batch]

    print_rank0("a small CLIP, from pictures with captions")
    steps, rate = RECIPE["clip_steps"], RECIPE["clip_rate"]
    pretrain_clip(clip, groups, inner.get_vocab_size(), steps=steps, learning_rate=rate)
    write_clip(out / "clip", clip, images)

    config = Qwen2Config(
        vocab_size=inner.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e4,
        max_position_embeddings=512,
    )
    qwen = Qwen2(config)
    initialise_(qwen, seed=0)
    write_qwen(out / "qwen", qwen, inner)
    processor = ChatProcessor(Tokenizer(out / "qwen"), images, VISION.num_patches)

    def written(scene: Scene):
        """A conversation about a description in place of the picture."""
        (first, answer), *others = conversation(scene, rng)
        if first == CAPTION_PROMPT:
            return processor.encode([user(first), assistant(answer)])
        messages = [user(f"{caption(scene)}\n{first}"), assistant(answer)]
        for question, answer in others:
            messages += [user(question), assistant(answer)]
        return processor.encode(messages)

    def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [written(rng.choice(scenes)) for _ in range(RECIPE["text_batch"])]
        batch = collate(rows, [], processor.tokenizer.pad_id, SIDE)
        return batch.ids_BT, batch.labels_BT

    print_rank0("a small Qwen2, from text alone")
    steps, rate = RECIPE["text_steps"], RECIPE["text_rate"]
    pretrain_qwen(qwen, rows, steps=steps, learning_rate=rate)
    write_qwen(out / "qwen", qwen, inner)


# The demo -------------------------------------------------------------------------------------------------------------

TRAIN_PICTURES, NEW_PICTURES, SHEET_PICTURES = 2400, 200, 12


def write_data(out: Path) -> None:
    """Writes train.json, val.json (new pictures), held_out.json (combinations never seen) and images/ to `out`."""
    rng = random.Random(1)
    with atomic_directory(out, replace=True) as folder:
        (folder / "images").mkdir()

        def picture(name: str, scene: Scene) -> str:
            draw(scene).save(folder / "images" / f"{name}.png")
            return f"images/{name}.png"

        train = []
        for i in range(TRAIN_PICTURES):
            scene = any_scene(rng)
            image = picture(f"train{i:04}", scene)
            for turn in [(CAPTION_PROMPT, caption(scene)), *((q.text, q.answer) for q in questions(scene))]:
                train.append(record(len(train), image, [turn]))  # those of a picture share its row
        write_json(folder / "train.json", train)
        for name, held_out in (("val", False), ("held_out", True)):
            records = []
            for i in range(NEW_PICTURES):
                scene = any_scene(rng, held_out=held_out)
                image = picture(f"{name}{i:03}", scene)
                records.append(record(len(records), image, [(CAPTION_PROMPT, caption(scene))], "caption"))
                for q in rng.sample(asked := questions(scene), min(3, len(asked))):
                    things = "two" if len(scene) == 2 else "one"
                    records.append(record(len(records), image, [(q.text, q.answer)], f"{things}: {q.kind}"))
            write_json(folder / f"{name}.json", records)


def record(number: int, image: str, turns: list[tuple[str, str]], kind: str = "") -> dict:
    """A sample in LLaVA's format; `kind` is for the scores."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": str(number), "image": image, "conversations": said} | ({"kind": kind} if kind else {})


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def demo(out: Path, run_directory: Path) -> None:
    """Everything from nothing to `run_directory`/contact_sheet.png; backbones that are there already are used again."""
    start = time.perf_counter()
    recipe = {"recipe": RECIPE, "vision": VISION.to_dict(), "world": [SIDE, PATCH, SHIFT, TWO_THINGS]}
    noted = out / "backbones" / "recipe.json"
    if noted.is_file() and json.loads(noted.read_text()) == recipe:
        print_rank0(f"the backbones in {noted.parent} are those of an earlier demo")
    else:
        noted.unlink(missing_ok=True)
        make_backbones(noted.parent)
        write_json(noted, recipe)
    print_rank0(f"drawing {TRAIN_PICTURES} pictures to train on, {2 * NEW_PICTURES} to ask about")
    write_data(data := out / "data")
    clip, qwen, joined = out / "backbones" / "clip", out / "backbones" / "qwen", out / "start"
    python("convert_weights.py", "--clip", clip, "--qwen", qwen, "--out", joined, "--force")
    python("train.py", "configs/demo.py", "--overwrite")
    model = run_directory / "best_model"
    scores = {}
    for name in ("val", "held_out"):
        results = run_directory / "evaluation" / name
        options = ["--constant"] if name == "val" else ["--no-shuffled"]
        python(
            "-m",
            "mmllm",
            "evaluate",
            "--model",
            model,
            "--data",
            data / f"{name}.json",
            "--out",
            results,
            *options,
        )
        scores[name] = json.loads((results / "scores.json").read_text())["scores"]
    pictures = sorted((data / "images").glob("held_out*.png"))[:3]
    python("sample.py", "--model", model, "--image", *pictures)
    sheet = contact_sheet(model, run_directory / "contact_sheet.png")
    accuracy = {name: scores["val"][name]["answers"] for name in scores["val"]}
    held_out = scores["held_out"]["true images"]["answers"]
    print_rank0(f"\n{'right answers':34}{'one shape':>12}{'two shapes':>12}{'together':>12}")
    for name, answers in (*accuracy.items(), ("never seen together", held_out)):
        one, two = (by_number(answers, things) for things in ("one", "two"))
        print_rank0(f"{name:34}{one:>12.1%}{two:>12.1%}{answers['accuracy']:>12.1%}")
    print_rank0(f"look at {sheet}; all of it took {duration(time.perf_counter() - start)}")
    print_rank0("next: talk to it:")
    print_rank0(f"  python sample.py --image {pictures[0]} --chat")
    print_rank0("  python serve.py")
    print_rank0("then your own pictures, with the published models:")
    print_rank0("  python train.py configs/full.py data.train_data_path=... data.val_data_path=... data.image_dir=...")


def python(*arguments: str | Path) -> None:
    """Runs one of the product's commands, shown as it would be typed; ends the demo when it fails."""
    print_rank0("\n$ python " + " ".join(map(str, arguments)))
    code = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    if code:
        sys.exit(code)


def by_number(answers: dict, things: str) -> float:
    """Accuracy over the kinds of question on scenes of one thing, or of two."""
    parts = [part for kind, part in answers["by_kind"].items() if kind.startswith(things)]
    return sum(part["count"] * part["accuracy"] for part in parts) / sum(part["count"] for part in parts)


def contact_sheet(model: Path, file: Path) -> Path:
    """Draws new scenes with what the model says of them; what is wrong is red, with the truth behind it."""
    rng, pipeline, font = random.Random(2), load_pipeline(model), ImageFont.load_default(13)
    width, height, columns, scale = 360, 315, 4, 1.2
    rows = -(-SHEET_PICTURES // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(SHEET_PICTURES):
        scene = any_scene(rng, held_out=i >= SHEET_PICTURES - columns)
        x, y, side = i % columns * width + 16, i // columns * height + 16, round(scale * SIDE)
        picture = draw(scene)
        sheet.paste(picture.resize((side, side)), (x, y))
        lines = [(CAPTION_PROMPT, caption(scene))]
        lines += [(q.text, q.answer) for q in rng.sample(questions(scene), 3)]
        below = y + side + 8
        for n, (question, truth) in enumerate(lines):
            answer = pipeline.answer_question(picture, question)
            text = answer if n == 0 else f"{question} {answer}"
            text += "" if answer == truth else f" (no: {truth})"
            for line in wrapped(text, font, width - 24):
                pen.text((x, below), line, "black" if answer == truth else "#c00", font)
                below += 17
    sheet.save(file)
    return file


def wrapped(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes.toy", description="The demo, or only its parts.")
    parser.add_argument("command", choices=["demo", "backbones", "data"])
    parser.add_argument("--out", default="outputs/toy", metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args()
    out = Path(options.out)
    if options.command == "demo":
        demo(out, Path("outputs/demo"))
    elif options.command == "backbones":
        make_backbones(out / "backbones")
    else:
        write_data(out / "data")


if __name__ == "__main__":
    run(main)
