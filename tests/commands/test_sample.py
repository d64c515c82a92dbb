"""The command line of sample.py: what it prints, and with which exit code it leaves."""

import io
import subprocess
import sys

import pytest
from PIL import Image

from conftest import ROOT
from mmllm.commands import sample
from mmllm.errors import run
from official import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "x.png"
    Image.radial_gradient("L").save(path)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """A function: arguments -> (exit code, stdout, stderr) of sample.py."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run(lambda: sample.main([str(argument) for argument in arguments]))
        return left.value.code, *capsys.readouterr()

    return call


def test_one_image_gives_one_caption(call, folder, image):
    code, out, err = call("--model", folder, "--image", image, "--max-new-tokens", 5, "--device", "cpu")
    assert (code, err) == (0, "") and out.endswith("\n")


def test_several_images_are_named_and_a_bad_one_does_not_stop_the_others(call, folder, image, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("not a image")
    code, out, err = call("--model", folder, "--image", image, bad, image, "--max-new-tokens", 5, "--device", "cpu")
    assert code == 1 and out.count(f"{image}: ") == 2
    assert err.startswith("error: ") and "bad.jpg" in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text", "truncated"])
def test_an_image_that_cannot_be_read_is_one_line_and_exit_code_2(call, folder, image, tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": image.read_bytes()[:200]}[kind])
    code, out, err = call("--model", folder, "--image", path, "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and path.name in err and "0x" not in err and err.count("\n") == 1


def test_sampling_repeats_by_seed(call, folder, image):
    options = ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.9", "--device", "cpu"]
    arguments = ("--model", folder, "--image", image, *options)
    answers = [call(*arguments, "--max-new-tokens", 8, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_ends_before_a_string_that_is_named(call, folder, image):
    arguments = ("--model", folder, "--image", image, "--max-new-tokens", 30, "--device", "cpu", "--temperature", 1)
    whole = call(*arguments)[1]
    assert call(*arguments, "--stop", whole[8:10], "--stop", "not there")[1] == whole[: whole.index(whole[8:10])] + "\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--max-new-tokens", "0"), "max-new-tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "2"), "top_p"),
        (("--min-p", "-1"), "min_p"),
        (("--stop", ""), "stop"),
        (("--device", "tpu"), "tpu"),
        (("--model", "/nowhere"), "/nowhere"),
        (("--max-new-tokens", "9999999"), "positions"),
    ],
)
def test_a_wrong_setting_is_named_with_exit_code_2(call, folder, image, arguments, named):
    code, _, err = call("--model", folder, "--device", "cpu", "--image", image, *arguments)
    assert code == 2 and named in err


def test_without_any_trained_model_the_command_that_makes_one_is_named(call, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("--image", image)
    assert code == 2 and "make demo" in err


def test_the_model_that_was_not_named_is_told_on_stderr(call, folder, image, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    (tmp_path / "outputs" / "mine" / "best_model").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("--image", image, "--max-new-tokens", 2, "--device", "cpu")
    assert (code, err) == (0, "model: outputs/mine/best_model, the last one trained here; --model names another\n")


def test_a_conversation_reads_lines_until_an_empty_one(call, folder, image, monkeypatch):
    lines = iter(["What is this?", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, _ = call("--model", folder, "--chat", "--image", image, "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0 and out.count("\n") >= 2


def test_ctrl_c_in_the_middle_of_an_answer_ends_its_line_and_leaves_with_130(call, folder, image, monkeypatch):
    pieces = []

    def interrupt(piece):
        pieces.append(piece)
        print(piece, end="")
        if len(pieces) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write", interrupt)
    code, out, err = call("--model", folder, "--image", image, "--device", "cpu")
    assert (code, out, err) == (130, "".join(pieces) + "\n", "") and len(pieces) == 2


def test_ctrl_c_ends_the_line_and_leaves_with_130(call, folder, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    code, out, err = call("--model", folder, "--chat", "--device", "cpu")
    assert (code, out, err) == (130, "\n", "")


@pytest.mark.slow
def test_from_the_command_to_the_answer_nothing_is_imported_that_is_not_needed(folder, image):
    """torch's compiler alone takes as long to import as all the rest."""
    command = [sys.executable, "-X", "importtime", "sample.py", "--model", folder, "--image", image]
    result = subprocess.run(
        [*command, "--max-new-tokens", "2", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch" in imported and "mmllm.inference.engine" in imported
    assert not imported & {"torch._dynamo", "sympy", "huggingface_hub", "transformers", "starlette"}


def test_a_question_that_is_not_unicode_is_one_line_and_exit_code_2(call, folder, image, monkeypatch):
    common = ("--model", folder, "--image", image, "--max-new-tokens", 3, "--device", "cpu")
    code, out, err = call(*common, "--prompt", "caf\udce9")  # how Python passes on an argument in Latin-1
    assert (code, out) == (2, "") and err.endswith("error: the text after 'caf' is not Unicode; write it as UTF-8\n")
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
        code, _, err = call(*common, "--chat")
        assert code == 2 and "is not Unicode; write it as UTF-8" in err
