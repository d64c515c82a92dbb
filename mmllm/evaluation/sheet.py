"""samples.html: the best, the worst and some random answers with their images, in one file that needs no other."""

import base64
import io
import random
from html import escape
from pathlib import Path

from mmllm.data.image import decode
from mmllm.errors import ImageError
from mmllm.evaluation.results import Part
from mmllm.evaluation.tasks import Task

SHOWN, SIDE = 8, 224  # samples of each kind; pixels of the longer side of an image
PAGE = """<!doctype html><meta charset="utf-8"><title>Samples</title>
<style>body{font:14px sans-serif;margin:2em}section{display:flex;flex-wrap:wrap;gap:1em}
figure{width:224px;margin:0}figcaption b{display:block}i{color:#666}</style>
"""


def write_sheet(path: Path, parts: dict[str, Part], seed: int) -> None:
    page = [PAGE]
    for name, part in parts.items():
        order = part.values.argsort(kind="stable").tolist()
        drawn = random.Random(seed).sample(order, min(SHOWN, len(order)))
        for title, chosen in (("best", order[: -SHOWN - 1 : -1]), ("worst", order[:SHOWN]), ("random", drawn)):
            page.append(f"<h2>{name}: {title}</h2><section>")
            page += [figure(part.tasks[i], part.texts[i], part.values[i]) for i in chosen]
            page.append("</section>")
    path.write_text("\n".join(page), encoding="utf-8", errors="backslashreplace")


def figure(task: Task, text: str, value: float) -> str:
    asked = "" if task.is_caption else "".join(p for p in task.messages[-1].parts if isinstance(p, str)).strip()
    references = "<br>".join(map(escape, dict.fromkeys(task.references)))
    images = "".join(map(inline, task.images[:1]))
    return (
        f"<figure>{images}<figcaption>{escape(asked)}<b>{escape(text)}</b>{value:.2f}, {escape(task.id)}"
        f"<br><i>{references}</i></figcaption></figure>"
    )


def inline(path: Path) -> str:
    try:
        image = decode(path)
    except ImageError:
        return ""  # of predictions that another program made; ours are about images that can be decoded
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'
