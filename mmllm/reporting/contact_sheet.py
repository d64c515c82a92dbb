"""Images with their texts on one sheet: what a data set holds, at a glance. matplotlib is imported when it is drawn."""

import textwrap
from pathlib import Path

from PIL import Image

COLUMNS, LINES, CHARACTERS = 6, 6, 34  # of the sheet; lines and characters of a text below an image


def draw_contact_sheet(path: Path, images: list[tuple[Image.Image, str]]) -> None:
    """Writes a PNG of `images` with the text of each below it, six in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 3.6 * rows))
    FigureCanvasAgg(figure)
    for number, (image, text) in enumerate(images, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.imshow(image)
        axes.axis("off")
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, CHARACTERS)]
        short = lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1] + " ..."]
        axes.text(0, -0.03, "\n".join(short), transform=axes.transAxes, va="top", fontsize=8, parse_math=False)
    figure.tight_layout(h_pad=6)
    figure.savefig(path, dpi=100)
