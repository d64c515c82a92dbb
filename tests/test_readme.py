"""What the README promises exists: files, configurations, commands, settings, and the Python it shows."""

import re

import pytest

from conftest import ROOT
from mmllm import MultimodalEvaluator, MultimodalInferencePipeline, MultimodalLLM
from mmllm.config.schema import ExperimentConfig
from official import write_model

README = (ROOT / "README.md").read_text()


def test_every_link_to_a_file_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_script_and_module_that_is_run_exists():
    scripts = set(re.findall(r"python (\w+\.py)", README)) | set(re.findall(r"configs/\w+\.py", README))
    modules = set(re.findall(r"python -m ((?:mmllm|benchmarks|examples)[\w.]+)", README))
    assert scripts and modules
    files = [*scripts, *(f"{module.replace('.', '/')}.py" for module in modules)]
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_make_target_exists():
    targets = set(re.findall(r"^make (\w+)", README, re.M))
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def test_every_setting_that_is_named_exists():
    config = ExperimentConfig()
    names = set(re.findall(r"\b((?:data|model|training)\.\w+)=", README))
    assert len(names) > 4
    for name in names:
        config.get(name)


def test_every_option_that_is_named_exists(capsys):
    from mmllm.commands import sample, train

    for module in (train, sample):
        with pytest.raises(SystemExit):
            module.parse(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for line in re.findall(r"^python (?:train|sample)\.py.*$", README, re.M):
        assert set(re.findall(r"--[\w-]+", line)) <= known, line


def test_the_python_that_is_shown_runs(tmp_path, monkeypatch):
    from PIL import Image

    write_model(tmp_path / "outputs" / "full" / "best_model")
    Image.new("RGB", (40, 40)).save(tmp_path / "x.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})  # the project's own text
    assert MultimodalInferencePipeline and MultimodalLLM and MultimodalEvaluator
