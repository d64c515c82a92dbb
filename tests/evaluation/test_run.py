"""`mmllm evaluate` on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmllm.commands import evaluate
from mmllm.errors import DataError, RunError, UserError
from official import write_model

COLOURS = {"red.png": "#ff0000", "green.png": "#00ff00", "blue.png": "#0000ff"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model; three images, each with two captions and a question; and one question without an image."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "model")
    records = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 40), colour).save(folder / name)
        word = name.removesuffix(".png")
        records.append({"id": number, "image": name, "captions": [f"a {word} square", f"all is {word}"]})
        turns = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": word}]
        records.append({"id": 100 + number, "image": name, "conversations": turns, "kind": "color"})
    turns = [{"from": "human", "value": "Is it day?"}, {"from": "gpt", "value": "yes"}]
    records.append({"id": "day", "conversations": turns, "references": ["yes"] * 9 + ["no"], "kind": "yes/no"})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def test_an_evaluation_writes_predictions_and_scores_of_true_and_shuffled_images(folder, capsys):
    out = folder / "out"
    evaluate.main(
        [f"--model={folder / 'model'}", f"--data={folder / 'data.json'}", f"--out={out}", "--max-new-tokens=16"]
        + ["--slots=3", "--device=cpu", "--constant"]
    )
    captions = json.loads((out / "captions.json").read_text())
    assert [sorted(result) for result in captions] == [["caption", "image_id"]] * 3
    assert [result["image_id"] for result in captions] == [0, 1, 2]
    answers = json.loads((out / "answers.json").read_text())
    assert [result["question_id"] for result in answers] == [100, 101, 102, "day"]
    shuffled = json.loads((out / "captions_shuffled.json").read_text())
    assert [result["image_id"] for result in shuffled] == [0, 1, 2]
    said = [result["caption"] for result in captions]
    assert len(set(said)) == 3  # red, green, blue
    assert [result["caption"] for result in shuffled] == [said[1], said[2], said[0]]
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert list(scores) == ["true images", "shuffled images", "best constant"]
    assert scores["true images"]["captions"]["count"] == 3
    assert scores["true images"]["answers"]["by_kind"]["color"]["count"] == 3
    assert scores["best constant"]["answers"]["accuracy"] == pytest.approx(1 / 3)
    assert scores["best constant"]["vqa"]["vqa_accuracy"] == 1
    printed = capsys.readouterr().out
    assert "captions (3)" in printed and "answers (3)" in printed and "vqa (1)" in printed
    assert "shuffled images" in printed


def test_the_answers_do_not_depend_on_the_batch_size(folder):
    said = []
    for size in ("1", "7"):
        out = folder / f"batch-{size}"
        evaluate.main(
            [f"--model={folder / 'model'}", f"--data={folder / 'data.json'}", f"--out={out}", "--max-new-tokens=3"]
            + ["--slots", size, "--device=cpu", "--no-shuffled", "--limit=4"]
        )
        said.append([(out / name).read_text() for name in ("captions.json", "answers.json")])
        assert not (out / "captions_shuffled.json").exists()
    assert said[0] == said[1]


def test_missing_images_are_named_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"image": "gone.png", "text": "a cat"}]))
    with pytest.raises(DataError, match=r"1 images cannot be used, the first is .*gone\.png"):
        evaluate.main([f"--model={tmp_path / 'no-model'}", f"--data={tmp_path / 'data.json'}", f"--out={tmp_path}"])


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder with --out"):
        evaluate.main(
            [f"--model={tmp_path / 'no-model'}", f"--data={folder / 'data.json'}", f"--out={tmp_path / 'file' / 'x'}"]
        )


def test_help_comes_without_torch():
    code = "import sys, mmllm.commands.evaluate; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_an_image_that_breaks_in_the_middle_is_left_out_and_the_other_answers_are_kept(folder, tmp_path, capsys):
    for name in COLOURS:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    Image.effect_noise((40, 40), 64).save(tmp_path / "green.png")
    content = bytearray((tmp_path / "green.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "green.png").write_bytes(content)
    (tmp_path / "data.json").write_text((folder / "data.json").read_text())
    options = [f"--model={folder / 'model'}", f"--data={tmp_path / 'data.json'}", f"--out={tmp_path}"]
    with pytest.raises(RunError, match="2 of 7 were left out because an image cannot be decoded"):
        evaluate.main([*options, "--max-new-tokens=2", "--device=cpu", "--no-shuffled"])
    assert f"warning: 101 is left out: {tmp_path / 'green.png'}: broken or cut off" in capsys.readouterr().err
    assert [result["image_id"] for result in json.loads((tmp_path / "captions.json").read_text())] == [0, 2]
    assert [result["question_id"] for result in json.loads((tmp_path / "answers.json").read_text())] == [
        100,
        102,
        "day",
    ]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["unreadable"] == ["1", "101"] and scores["scores"]["true images"]["captions"]["count"] == 2
