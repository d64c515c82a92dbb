"""README and docs/ hold: every command line runs on tiny models, links lead somewhere, names and tables are the code's."""

import base64
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from examples.shapes.__main__ import OUT
from mmllm.config.schema import ExperimentConfig
from mmllm.serving.settings import Settings
from official import add_adapters, write_clip, write_model, write_qwen
from server_process import RealServer, wait_until

PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
ALL_TEXT = "\n".join(TEXT.values())

NOT_RUN = {  # the beginning of a command line: why it is not run here
    "git clone": "needs the network",
    "make": "sets up an environment first; .ci/run calls make",
    "source": "changes the shell; the lines after it run in the environment of the tests",
    "torchrun": "needs several processes; tests/training/test_distributed.py starts it",
    "python -m benchmarks": "minutes at full size; tests/benchmarks runs it on tiny models",
    "python -m mmllm prepare easy-vqa": "needs the network; tests/commands/test_prepare_public.py has a server of its own",
    "pip install": "needs the network",
    "python -m mmllm verify": "needs the official files; tests/commands/test_verify.py has stand-ins for them",
    "uvicorn serve:app": "starts several processes; tests/serving/test_workers.py does, too",
    "gunicorn serve:app": "starts several processes; tests/serving/test_workers.py does, too",
    "python -m mmllm prepare coco": "downloads 20 GB; tests/commands/test_prepare_public.py has a host of its own",
    "python -m mmllm prepare vqav2": "as prepare coco",
    "python -m examples.caption_with_ray": "needs Ray; tests/examples runs it where Ray is installed",
    "python -m examples.answer_with_vllm": "needs vLLM, in an environment of its own; docs/serving.md has a run's result",
    "vllm serve": "needs vLLM; several GPUs or machines",
    "python -m examples.crossval": "needs a table of embeddings; tests/examples runs it on a small one",
}
SCRIPTS = {
    "train.py": "mmllm.commands.train",
    "sample.py": "mmllm.commands.sample",
    "convert_weights.py": "mmllm.commands.convert",
}
TINY = {  # what is appended to a command line to make it small
    "train.py": shlex.split(
        "device=cpu data.num_workers=0 data.batch_size=2 training.bf16=false stage1.epochs=1 stage2.epochs=1 "
        "stage1.gradient_accumulation_steps=2 stage2.gradient_accumulation_steps=2 --overwrite"
    ),
    "examples.pretrain": shlex.split(
        "--image-size 32 --vision-width 64 --vision-layers 1 --vocab-size 300 --text-width 64 --text-layers 1 "
        "--clip-steps 2 --clip-batch 4 --qwen-steps 2 --guide-steps 1 --device cpu"
    ),
    "sample.py": ["--device", "cpu", "--max-new-tokens", "4"],
    "convert_weights.py": ["--force"],
    "serve.py": ["--device", "cpu", "--port", "0"],
    "evaluate": ["--device", "cpu", "--max-new-tokens", "4"],
    "caption": ["--device", "cpu", "--max-new-tokens", "4"],
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.S | re.M)


def command_lines(page: str) -> list[str]:
    """The command lines of a page as they are typed, without comments."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.split("\n")]
    return [line for line in lines if line]


def is_run(line: str) -> bool:
    return not line.startswith(tuple(NOT_RUN))


# Every command line runs -----------------------------------------------------------------------------------------------


def write_layout(folder: Path) -> None:
    """What the pages expect to find: two published models (tiny here), train.json, val.json, images/, x.jpg."""
    write_clip(folder / "openai" / "clip-vit-base-patch32", num_hidden_layers=1)
    write_qwen(folder / "Qwen" / "Qwen2.5-0.5B-Instruct", num_hidden_layers=1)
    (folder / "configs").symlink_to(ROOT / "configs")
    add_adapters(
        write_model(folder / "models" / "base", num_hidden_layers=1), folder / "outputs" / "own" / "best_model"
    )
    for place in (
        "images",
        "data/easy_vqa/images",
        "data/flickr8k/train",
        "data/flickr8k/dev",
        OUT / "data" / "images",
    ):
        (folder / place).mkdir(parents=True)
    shown = [json.loads(line) for line in blocks("README.md", "json")[0].strip().split("\n")]
    records = [shown[i % 3] | {"image": f"{i}.jpg"} for i in range(12)]
    captions = "\n".join(json.dumps({"image": f"{i}.jpg", "captions": ["A dog.", "The dog runs."]}) for i in range(6))
    for i in range(12):
        image = Image.new("RGB", (40, 32), (20 * i, 90, 200 - 10 * i))
        image.save(folder / "images" / f"{i}.jpg")
        image.save(folder / "data" / "easy_vqa" / "images" / f"{i}.png")
        for split in ("train", "dev"):
            image.save(folder / "data" / "flickr8k" / split / f"{i}.jpg")
            (folder / "data" / "flickr8k" / split / "captions.jsonl").write_text(captions)
    for split in ("train", "val"):
        asked = [{"image": f"{i}.png", "question": "is it red?", "answer": "yes"} for i in range(12)]
        (folder / "data" / "easy_vqa" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, asked)))
    image.save(folder / "x.jpg")
    image.save(folder / "image.jpg")
    image.save(folder / OUT / "data" / "images" / "held_out000.png")
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "val.json").write_text(json.dumps(records[:6]))
    (folder / "list.txt").write_text("3.jpg\n1.jpg\n")
    (folder / "questions.txt").write_text("What is it?\nWhere is it?\n")


class Shell:
    """Runs command lines as a reader types them, but in this process; a server runs in its own until `close`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.monkeypatch, self.folder = monkeypatch, folder
        self.server: subprocess.Popen | None = None
        self.port = 0
        monkeypatch.chdir(folder)

    def run(self, line: str) -> None:
        program, *words = shlex.split(line)
        if program == "curl":
            self.curl(line)
            return
        assert program == "python", line
        if words[0] == "-m":
            words = words[2:] if words[1] == "mmllm" else words[1:]
        name, *words = words
        if name == "serve.py":
            self.serve(words)
            return
        is_resumed = "--resume" in words  # such a run knows its settings
        small = [] if is_resumed else TINY.get(name, [])
        module = SCRIPTS.get(name) or (f"{name}.__main__" if "." in name else f"mmllm.commands.{name}")
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n\n"))
        assert importlib.import_module(module).main([*words, *small]) in (None, 0), line

    def serve(self, words: list[str]) -> None:
        self.close()
        log = self.folder / "serve.log"
        with log.open("w") as stderr:
            command = [sys.executable, str(ROOT / "serve.py"), *words, *TINY["serve.py"]]
            self.server = subprocess.Popen(command, stderr=stderr, env=os.environ)
        wait_until(lambda: "http://" in log.read_text() or self.server.poll() is not None, 300)
        self.port = int(log.read_text().partition("127.0.0.1:")[2].partition(" ")[0])
        RealServer(self.port, log).wait_until_loaded()

    def curl(self, line: str) -> None:
        if not shutil.which("curl"):
            return
        image = base64.b64encode((self.folder / "x.jpg").read_bytes()).decode()
        line = line.replace("localhost:8000", f"127.0.0.1:{self.port}").replace("base64,...", f"base64,{image}")
        line = line.replace("curl", "curl --silent --show-error --fail", 1)
        said = subprocess.run(line, shell=True, check=True, capture_output=True).stdout
        assert "DELETE" in line or json.loads(said)

    def close(self) -> None:
        if self.server:
            self.server.terminate()
            self.server.wait()
            self.server = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The layout after README's training line."""
    folder = tmp_path_factory.mktemp("reader")
    write_layout(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        line = next(line for line in command_lines("README.md") if line.startswith("python train.py configs/full.py"))
        Shell(monkeypatch, folder).run(line)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, command_lines(page)))])
def test_every_command_line_runs_as_it_is_typed(page, folder, monkeypatch):
    shell = Shell(monkeypatch, folder)
    try:
        for line in filter(is_run, command_lines(page)):
            shell.run(line)
    finally:
        shell.close()


def test_every_reason_not_to_run_a_line_is_needed():
    lines = [line for page in PAGES for line in command_lines(page)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_that_is_shown_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    shell = Shell(monkeypatch, folder)
    if "localhost:8000" in "".join(blocks(page, "python")):
        shell.serve([])
    monkeypatch.setenv("PATH", "")  # no Java: METEOR has a test of its own
    try:
        for block in blocks(page, "python"):
            exec(block.replace("localhost:8000", f"127.0.0.1:{shell.port}"), {})  # the project's own text
    finally:
        shell.close()


# What is named exists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page):
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", TEXT[page]) if "://" not in link]
    files = [(ROOT / page).parent / link for link, _, _ in links if link]
    assert [file for file in files if not file.exists()] == []


def test_every_make_target_exists():
    targets = set(re.findall(r"\bmake ([a-z]+)(?=`|\s*#)", ALL_TEXT))
    assert {"demo", "test", "check"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def test_every_setting_that_is_named_exists():
    config = ExperimentConfig()
    names = set(re.findall(r"\b((?:data|model|training)\.\w+)=", ALL_TEXT))
    assert len(names) > 10
    for name in names:
        config.get(name)


def test_every_test_that_the_table_of_formats_names_exists():
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", TEXT["docs/weights.md"])
    assert len(named) > 20
    assert [name for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()] == []


def test_readme_is_short():
    assert len(TEXT["README.md"].encode()) <= 9000


def test_the_model_can_be_read_in_an_evening():
    files = re.findall(r"^\d\. \[.*\]\(\.\./(mmllm/\S+)\)", TEXT["docs/reading.md"], re.M)
    assert len(files) == 8
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 1500


def test_readme_names_every_package():
    tree = TEXT["README.md"].partition("```\nmmllm/\n")[2].partition("```")[0]
    named = set(re.findall(r"^  (\w+)/", tree, re.M))
    assert named == {file.parent.name for file in (ROOT / "mmllm").glob("*/__init__.py")}


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", ALL_TEXT))
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert [name for name in sorted(named) if f"def {name}(" not in tests] == []


def test_the_page_on_serving_has_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `MMLLM_(\w+)` \| ([^|]+) \|", TEXT["docs/serving.md"], re.M))
    defaults = {name.upper(): default for name, default in vars(Settings()).items()}
    assert list(rows) == list(defaults)
    for name, default in defaults.items():
        assert default is None or rows[name] == str(default).removesuffix(".0")
