"""The contact sheet of the demo: new scenes with what the model says of them."""

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.shapes.world import SIDE, any_scene, caption, draw, questions
from mmllm.data.records import CAPTION_PROMPT
from mmllm.inference.pipeline import load_pipeline

NUM_SCENES, COLUMNS, SCALE = 12, 4, 1.2
WIDTH, HEIGHT = 360, 315  # of a scene with its answers, in pixels


def contact_sheet(model: Path, file: Path) -> Path:
    """Draws new scenes with the model's caption and answers; wrong ones are red, with the right one behind. The last row
    holds combinations of color and shape that training never showed."""
    rng, pipeline, font = random.Random(2), load_pipeline(model), ImageFont.load_default(13)
    rows = -(-NUM_SCENES // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, rows * HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(NUM_SCENES):
        scene = any_scene(rng, held_out=i >= NUM_SCENES - COLUMNS)
        x, y, side = i % COLUMNS * WIDTH + 16, i // COLUMNS * HEIGHT + 16, round(SCALE * SIDE)
        image = draw(scene)
        sheet.paste(image.resize((side, side)), (x, y))
        lines = [(CAPTION_PROMPT, caption(scene))]
        lines += [(q.text, q.answer) for q in rng.sample(questions(scene), 3)]
        below = y + side + 8
        for n, (question, truth) in enumerate(lines):
            answer = pipeline.answer_question(image, question)
            text = answer if n == 0 else f"{question} {answer}"
            text += "" if answer == truth else f" (no: {truth})"
            for line in wrapped(text, font, WIDTH - 24):
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
