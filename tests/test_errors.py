"""The exit code rules that all command lines share."""

import subprocess
import sys

import pytest

from conftest import ROOT
from mmllm.errors import GenerationError, ImageError, RunError, UserError, run


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("x.json: no such file"), 2, "error: x.json: no such file\n"),
        (ImageError("x.jpg: too large", code="image_too_large"), 2, "error: x.jpg: too large\n"),
        (RunError("no space left"), 1, "error: no space left\n"),
        (GenerationError("logits are not finite"), 1, "error: logits are not finite\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_went_wrong_decides_the_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as left:
        run(lambda: fail(error))
    assert left.value.code == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_debugging_shows_the_traceback_of_bad_input_too(monkeypatch):
    monkeypatch.setenv("MMLLM_DEBUG", "1")
    with pytest.raises(UserError):
        run(lambda: fail(UserError("x")))


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_a_reader_that_leaves_is_no_error():
    program = "from mmllm.errors import run; run(lambda: print('\\n'.join(map(str, range(10**6)))))"
    result = shell(f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}')
    assert (result.stdout, result.stderr) == ("0\n141\n", "")


def test_a_terminal_without_utf8_shows_escapes_and_does_not_fail():
    program = "from mmllm.errors import run; run(lambda: print(chr(29483)))"
    result = shell(f'PYTHONIOENCODING=ascii {sys.executable} -c "{program}"')
    assert (result.stdout, result.returncode) == ("\\u732b\n", 0)


def test_one_of_several_processes_ends_at_once_with_all_it_said():
    program = (
        "import atexit; from mmllm.errors import run; atexit.register(print, 'late'); run(lambda: print('said') or 3)"
    )
    for size, said in (("1", "said\nlate\n"), ("2", "said\n")):
        result = shell(f'WORLD_SIZE={size} {sys.executable} -c "{program}"')
        assert (result.stdout, result.stderr, result.returncode) == (said, "", 3)


def test_importing_the_package_does_not_import_torch():
    program = "import sys, mmllm, mmllm.errors; print('torch' in sys.modules)"
    assert shell(f'{sys.executable} -c "{program}"').stdout == "False\n"
