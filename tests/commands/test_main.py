"""`mmllm NAME` and `python -m mmllm NAME`: what both show, and that nothing loads torch to answer `--help`."""

import subprocess
import sys
import tomllib

import pytest

from conftest import ROOT
from mmllm import __main__
from mmllm.errors import UserError

SCRIPTS = {"train.py": "train", "sample.py": "sample", "serve.py": "serve", "convert_weights.py": "convert"}


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_help_lists_every_command(capsys):
    modules = {path.stem for path in (ROOT / "mmllm" / "commands").glob("*.py")} - {"__init__"}
    assert set(__main__.COMMANDS) == modules
    assert __main__.main([]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")} == modules


@pytest.mark.parametrize("name, hint", [("trian", "did you mean train?"), ("xyz", "see mmllm --help")])
def test_an_unknown_command_is_offered_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"^unknown command '{name}'; {hint}".replace("?", r"\?")):
        __main__.main([name])


def test_every_command_shows_its_help_without_torch():
    program = """
import importlib, sys
from mmllm.__main__ import COMMANDS
for name in COMMANDS:
    try:
        importlib.import_module(f"mmllm.commands.{name}").main(["--help"])
    except SystemExit as left:
        assert left.code == 0
sys.exit("torch" in sys.modules)
"""
    result = python("-c", program)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("usage: ") == len(__main__.COMMANDS)


@pytest.mark.parametrize("script, command", SCRIPTS.items())
def test_a_script_is_its_command_and_shows_itself_as_it_was_typed(script, command):
    result = python(script, "--help")
    assert result.returncode == 0 and f"usage: python {script} " in result.stdout
    assert f"mmllm {command}" not in result.stdout and f"python {script}" in result.stdout.partition("\n\n")[2]


def test_a_module_shows_itself_as_it_was_typed():
    result = python("-m", "mmllm", "train", "--help")
    assert "usage: python -m mmllm train " in result.stdout and "\npython -m mmllm train full " in result.stdout


def test_importing_serve_py_does_nothing():
    result = python("-c", "import sys, serve; print('torch' in sys.modules, hasattr(serve, 'nothing'))")
    assert (result.stdout, result.stderr) == ("False False\n", "")


def test_bad_input_is_one_line_and_exit_code_2_before_torch():
    result = python("-X", "importtime", "-m", "mmllm", "train", "full", "learning_rte=1")
    assert result.returncode == 2 and " torch" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: command line: unknown setting 'learning_rte'")


def test_every_package_travels_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mmllm").rglob("__init__.py")}
    assert set(listed) == folders | {"mmllm.configs"}
