"""The drawn world: one or two colored shapes on grey paper, their captions, and questions about them.

Each shape lies within one patch of the vision tower. Across the border of two patches it would be told apart from no
other, and so small a model would not learn to see within minutes.
"""

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from mmllm.data.records import CAPTION_PROMPT

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
    """The image of a scene, SIDE x SIDE pixels."""
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(image)
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
    return image


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
