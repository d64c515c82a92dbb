"""README.md of a model on the Hugging Face hub: what it is, what it was trained on, how it scored, how to run it."""

from pathlib import Path

from mmllm.reporting.metrics import read_settings
from mmllm.reporting.report import scores_tables
from mmllm.runtime.files import read_json

HEAD = """\
---
license: {license}
pipeline_tag: image-text-to-text
library_name: {library}
tags: [mmllm]
{bases}---

# {name}

A CLIP image encoder and a Qwen2.5 language model, joined by a projector and trained with mmllm.
"""
USE = """\
## Use

    mmllm sample --model {name} --image x.jpg
    mmllm serve --model {name}
"""
TRANSFORMERS = "`LlavaForConditionalGeneration` and `AutoProcessor` of transformers read it too.\n"
LICENCES = """\
## Licence

The weights started from published models, whose licences hold for this one too (OpenAI's CLIP: MIT; Qwen2.5-0.5B:
Apache-2.0), and so do the terms of the training data.
"""


def write_card(folder: Path, run: Path, name: str, licence: str) -> None:
    """Writes `folder`/README.md for the model of the run directory `run`, from the files that are there."""
    is_llava = read_json(folder / "config.json").get("model_type") == "llava"
    settings = read_settings(run) if (run / "experiment.json").exists() else {}
    towers = [] if settings.get("model.pretrained") else ["clip", "qwen"]
    bases = [settings.get(f"model.{tower}") for tower in towers]
    bases = "".join(f"- {base}\n" for base in bases if base and not Path(base).exists())
    head = HEAD.format(
        license=licence,
        library="transformers" if is_llava else "mmllm",
        bases=f"base_model:\n{bases}" if bases else "",
        name=name,
    )
    sections = [head, USE.format(name=name) + (f"\n{TRANSFORMERS}" if is_llava else "")]
    if (run / "run.json").exists():
        sections.append(_training(read_json(run / "run.json")["starts"][-1]))
    sections += [scores_tables(run) or "## Scores\n\nNot measured.", LICENCES]
    (folder / "README.md").write_text("\n\n".join(part.rstrip() for part in sections) + "\n", encoding="utf-8")


def _training(start: dict) -> str:
    data = "".join(f"- {line}\n" for line in start.get("data", []))
    made = f"{start['time'][:10]}, {start['device']}; commit {start['commit']}; torch {start['versions']['torch']}"
    return f"## Training\n\n    {start['command']}\n\n{data}\n{made}"
