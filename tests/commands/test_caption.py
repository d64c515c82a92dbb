"""`mmllm caption`: a row for each image of a folder, in order, and a second run that continues the first."""

import csv
import io
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from mmllm.commands import caption
from mmllm.data.chat import user
from mmllm.inference.captioner import Row, RowFile
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig
from official import write_model
from tiny_run import break_image

SHORT = ["--max-new-tokens", "6", "--device", "cpu", "--dtype", "int8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caption") / "model"
    write_model(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Seven images in two folders; b.png is damaged in the middle, c.txt is no image."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "d.jpg", "e.webp", "more/f.png", "more/g.bmp", "more/z.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    break_image(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "c.txt").write_text("not an image")
    return tmp_path / "photos"


def run(model, *arguments):
    return caption.main([*map(str, arguments), "--model", str(model), *SHORT])


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_folder_becomes_sorted_rows_and_a_bad_image_a_row_with_its_error(model, photos, tmp_path, capsys):
    assert run(model, photos, "--out", tmp_path / "out.jsonl", "--slots", 3) == 1
    rows = rows_of(tmp_path / "out.jsonl")
    names = ["a.png", "b.png", "d.jpg", "e.webp", "more/f.png", "more/g.bmp", "more/z.png"]
    assert [row["image"] for row in rows] == names
    assert "b.png" in rows[1]["error"] and "caption" not in rows[1]
    pipeline = load_pipeline(model, device="cpu", dtype="int8")
    config = caption.generation_config(caption.parse([str(photos), "--out", "x.csv", *SHORT]))
    for row in rows[:1] + rows[2:]:
        assert row == {
            "image": row["image"],
            "caption": pipeline.caption_image(photos / row["image"], config=config).strip(),
        }
    assert "7 more, 1 rows with an error" in capsys.readouterr().err


def test_several_questions_are_answered_as_one_by_one(model, photos, tmp_path):
    (tmp_path / "questions.txt").write_text("What is it?\n\nWhere is it, please?\n")
    run(model, photos, "--out", tmp_path / "out.csv", "--questions", tmp_path / "questions.txt")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_bytes().decode(), newline="")))
    assert [row["question"] for row in rows] == ["What is it?", "Where is it, please?"] * 7
    pipeline = load_pipeline(model, device="cpu", dtype="int8")
    config = caption.generation_config(caption.parse([str(photos), "--out", "x.csv", *SHORT]))
    for row in [rows[0], rows[1], rows[-1]]:
        assert row["answer"] == pipeline.answer_question(photos / row["image"], row["question"], config).strip()
    assert rows[2]["error"] and rows[3]["error"] and not rows[2]["answer"]


def test_a_confidence_is_the_mean_probability_of_the_tokens(model, photos, tmp_path):
    run(model, photos, "--out", tmp_path / "out.jsonl", "--logprobs")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["image"] for row in rows if "confidence" not in row] == ["b.png"]
    pipeline = load_pipeline(model, device="cpu", dtype="int8")
    config = GenerationConfig(max_new_tokens=6, logprobs=True)
    answer = pipeline.generate(pipeline.prompt([user("Describe this image.", images=1)], [photos / "a.png"]), config)
    assert rows[0]["confidence"] == round(math.exp(sum(answer.logprobs) / len(answer.logprobs)), 4)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_second_run_does_only_what_is_missing_and_a_row_that_was_cut_off(model, photos, tmp_path, suffix, capsys):
    out = tmp_path / f"out{suffix}"
    run(model, photos, "--out", out)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    run(model, photos, "--out", out)
    assert out.read_bytes() == whole
    assert "0 of them done before" in capsys.readouterr().err
    run(model, photos, "--out", out)
    assert out.read_bytes() == whole
    assert "7 images, 7 of them done before" in capsys.readouterr().err


def test_text_files_lie_beside_the_images(model, photos):
    run(model, photos, "--out", "beside")
    assert sorted(path.stem for path in photos.rglob("*.txt")) == list("acdefgz")
    (photos / "a.txt").write_text("mine\n")
    run(model, photos, "--out", "beside")
    assert (photos / "a.txt").read_text() == "mine\n"


def test_a_list_keeps_its_order_and_names_a_missing_image(model, photos, tmp_path):
    (tmp_path / "list.txt").write_text("more/z.png\na.png\ngone.png\na.png\n")
    assert run(model, tmp_path / "list.txt", "--image-dir", photos, "--out", tmp_path / "out.jsonl") == 1
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["image"] for row in rows] == ["more/z.png", "a.png", "gone.png"]
    assert "gone.png" in rows[2]["error"]


@pytest.mark.slow
def test_two_processes_share_the_images_and_leave_one_file(model, photos, tmp_path):
    out, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    command = [
        sys.executable,
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mmllm", "caption"],
    ]
    command += [str(photos), "--out", str(out), "--model", str(model), *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    run(model, photos, "--out", alone)
    assert out.read_bytes() == alone.read_bytes(), done.stderr
    assert list(tmp_path.glob("*.part*")) == []


@pytest.mark.slow
def test_a_run_that_is_killed_loses_only_what_was_in_the_slots(model, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "mmllm", "caption", str(photos), "--out", str(out), "--slots", "1"]
    process = subprocess.Popen([*command, "--model", str(model), *SHORT], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(rows_of(out)) if out.read_bytes().endswith(b"\n") else out.read_bytes().count(b"\n")
    assert before >= 2
    run(model, photos, "--out", out)
    assert len(rows_of(out)) == 7


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_come_back_as_they_were_written(tmp_path, suffix):
    rows = [
        Row("a\udce9.png", "", 'a "cat",\nand\u2028more'),
        Row("b.png", "", "", "b.png: broken, \n2"),
        Row("c.png", "", "c", "", 0.5),
    ]
    file = RowFile(tmp_path / f"out{suffix}", has_questions=False)
    for row in rows:
        file.write(row)
    file.close()
    assert file.read() == rows


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere", "--out", "x.jsonl"], "nowhere: cannot be read as text"),
        (["{empty}", "--out", "x.jsonl"], "no image files in this folder"),
        (["{photos}", "--out", "{photos}/c.jsonl"], "holds no rows of image, caption, confidence, error"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_captioned_is_one_line_with_the_mend(photos, tmp_path, arguments, says):
    (tmp_path / "empty").mkdir()
    (photos / "c.jsonl").write_text('{"something": "else"}\n')
    arguments = [text.format(photos=photos, empty=tmp_path / "empty") for text in arguments]
    command = [sys.executable, "-m", "mmllm", "caption", *arguments, *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("out", ["captions.json", "captions"])
def test_an_output_of_another_kind_is_refused(out, capsys):
    with pytest.raises(SystemExit):
        caption.parse(["photos", "--out", out])
    assert "name a .jsonl or .csv file" in capsys.readouterr().err
