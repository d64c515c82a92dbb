"""`make demo`: the whole product from nothing to answers. Drawn images and backbones of their own, then the commands."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from examples.shapes.backbones import RECIPE, VISION, make_backbones
from examples.shapes.sheet import contact_sheet
from examples.shapes.world import PATCH, SHIFT, SIDE, TWO_THINGS, Scene, any_scene, caption, draw, questions
from mmllm.data.records import CAPTION_PROMPT
from mmllm.runtime.console import duration, print_rank0
from mmllm.runtime.files import write_json
from mmllm.storage.atomic import atomic_directory

TRAIN_IMAGES, NEW_IMAGES = 2400, 200
NEXT = """next: talk to it:
  python sample.py --image {image} --chat
  python serve.py
then your own images, with the published models:
  python train.py configs/full.py data.train_data_path=... data.val_data_path=... data.image_dir=..."""


def write_data(out: Path) -> None:
    """Writes train.json, val.json (new images), held_out.json (combinations never seen) and images/ to `out`."""
    rng = random.Random(1)
    with atomic_directory(out, replace=True) as folder:
        (folder / "images").mkdir()

        def draw_to(name: str, scene: Scene) -> str:
            draw(scene).save(folder / "images" / f"{name}.png")
            return f"images/{name}.png"

        train = []
        for i in range(TRAIN_IMAGES):
            scene = any_scene(rng)
            image = draw_to(f"train{i:04}", scene)
            for turn in [(CAPTION_PROMPT, caption(scene)), *((q.text, q.answer) for q in questions(scene))]:
                train.append(record(len(train), image, [turn]))  # those of an image share its row
        write_json(folder / "train.json", train)
        for name, held_out in (("val", False), ("held_out", True)):
            records = []
            for i in range(NEW_IMAGES):
                scene = any_scene(rng, held_out=held_out)
                image = draw_to(f"{name}{i:03}", scene)
                records.append(record(len(records), image, [(CAPTION_PROMPT, caption(scene))], "caption"))
                for q in rng.sample(asked := questions(scene), min(3, len(asked))):
                    things = "two" if len(scene) == 2 else "one"
                    records.append(record(len(records), image, [(q.text, q.answer)], f"{things}: {q.kind}"))
            write_json(folder / f"{name}.json", records)


def record(number: int, image: str, turns: list[tuple[str, str]], kind: str = "") -> dict:
    """A sample in LLaVA's format; `kind` is for the scores."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": str(number), "image": image, "conversations": said} | ({"kind": kind} if kind else {})


def demo(out: Path, run_directory: Path) -> None:
    """Everything from nothing to `run_directory`/contact_sheet.png. Backbones of an earlier demo are used again."""
    start = time.perf_counter()
    backbones, data, model = out / "backbones", out / "data", run_directory / "best_model"
    recipe = {"recipe": RECIPE, "vision": VISION.to_dict(), "world": [SIDE, PATCH, SHIFT, TWO_THINGS]}
    noted = backbones / "recipe.json"
    if noted.is_file() and json.loads(noted.read_text()) == recipe:
        print_rank0(f"the backbones in {backbones} are those of an earlier demo")
    else:
        noted.unlink(missing_ok=True)
        make_backbones(backbones)
        write_json(noted, recipe)
    print_rank0(f"drawing {TRAIN_IMAGES} images to train on, {2 * NEW_IMAGES} to ask about")
    write_data(data)
    towers = ("--clip", backbones / "clip", "--qwen", backbones / "qwen")
    python("convert_weights.py", *towers, "--out", out / "start", "--force")
    python("train.py", "configs/demo.py", "--overwrite")
    answers = evaluate(model, data / "val.json", "--constant")
    held_out = evaluate(model, data / "held_out.json", "--no-shuffled")["true images"]
    images = sorted((data / "images").glob("held_out*.png"))[:3]
    python("sample.py", "--model", model, "--image", *images)
    sheet = contact_sheet(model, run_directory / "contact_sheet.png")
    print_rank0("\n".join(table(answers | {"never seen together": held_out})))
    print_rank0(f"look at {sheet}; all of it took {duration(time.perf_counter() - start)}")
    print_rank0(NEXT.format(image=images[0]))


def evaluate(model: Path, data: Path, *options: str) -> dict[str, dict]:
    """The scores of the answers by what was asked: the model with the true images, with others, the best constant."""
    out = model.parent / "evaluation" / data.stem
    python("-m", "mmllm", "evaluate", "--model", model, "--data", data, "--out", out, *options)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    return {name: parts["answers"] for name, parts in scores.items()}


def table(answers: dict[str, dict]) -> list[str]:
    lines = [f"\n{'right answers':34}{'one shape':>12}{'two shapes':>12}{'together':>12}"]
    for name, found in answers.items():
        one, two = by_number(found, "one"), by_number(found, "two")
        lines.append(f"{name:34}{one:>12.1%}{two:>12.1%}{found['accuracy']:>12.1%}")
    return lines


def python(*arguments: str | Path) -> None:
    """Runs a command, printed as a user would type it; ends the demo when it fails."""
    print_rank0("\n$ python " + " ".join(map(str, arguments)))
    code = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    if code:
        sys.exit(code)


def by_number(answers: dict, things: str) -> float:
    """Accuracy of the questions about scenes of "one" shape or of "two", over all kinds."""
    parts = [part for kind, part in answers["by_kind"].items() if kind.startswith(things)]
    return sum(part["count"] * part["accuracy"] for part in parts) / sum(part["count"] for part in parts)
