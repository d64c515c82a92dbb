"""`mmllm evaluate` on a tiny model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from mmllm.commands import evaluate
from mmllm.errors import DataError, RunError, UserError
from mmllm.evaluation import predictions
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


def run(folder, out, *options) -> dict:
    evaluate.main([f"--data={folder / 'data.json'}", f"--out={out}", *map(str, options)])
    return json.loads((out / "scores.json").read_text())


def with_model(folder) -> list[str]:
    return [f"--model={folder / 'model'}", "--max-new-tokens=4", "--device=cpu"]


def test_stored_predictions_score_the_same_without_a_model(folder, tmp_path):
    found = run(folder, tmp_path / "model", *with_model(folder), "--no-shuffled")
    files = [tmp_path / "model" / name for name in ("captions.json", "answers.json")]
    again = run(folder, tmp_path / "stored", "--predictions", *files, "--constant")
    assert again["scores"]["true images"] == found["scores"]["true images"]
    assert list(again["scores"]) == ["true images", "best constant"]


def test_a_prediction_that_is_missing_is_named_and_the_others_are_scored(folder, tmp_path, capsys):
    (tmp_path / "captions.json").write_text(json.dumps([{"image_id": 0, "caption": "a red square"}]))
    with pytest.raises(RunError, match="6 of 7 were left out because they have no prediction"):
        run(folder, tmp_path, "--predictions", tmp_path / "captions.json")
    assert "no prediction for 6 of 7, the first is 100" in capsys.readouterr().err
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["true images"]["captions"]["count"] == 1


def test_blank_images_are_a_row_of_their_own(folder, tmp_path):
    scores = run(folder, tmp_path, *with_model(folder), "--no-shuffled", "--blank")["scores"]
    assert list(scores) == ["true images", "blank images"]
    said = [result["caption"] for result in json.loads((tmp_path / "captions_blank.json").read_text())]
    assert len(said) == 3 and len(set(said)) == 1


def test_an_evaluation_that_was_interrupted_continues_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    asked = []

    def interrupted(*arguments):
        for number, answer in enumerate(predict(*arguments)):
            asked.append(answer)
            if number == 3 and len(asked) == 4:
                raise KeyboardInterrupt
            yield answer

    predict = predictions.predict
    monkeypatch.setattr(predictions, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", *with_model(folder))
    assert not (tmp_path / "out" / "scores.json").exists()
    found = run(folder, tmp_path / "out", *with_model(folder))
    assert "3 answers of an interrupted evaluation are kept" in capsys.readouterr().err
    assert len(asked) == 4 + 2 * 7 - 3
    whole = run(folder, tmp_path / "whole", *with_model(folder))
    assert found["scores"] == whole["scores"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()} and not any("unfinished" in n for n in names)
    for name in names - {"scores.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_answers_to_other_questions_are_not_continued(folder, tmp_path, capsys):
    tmp_path.joinpath("unfinished.jsonl").write_text('"of another model"\n["true images", 0, "kept?"]\n')
    run(folder, tmp_path, *with_model(folder), "--no-shuffled")
    assert "kept" not in capsys.readouterr().err and "kept?" not in (tmp_path / "captions.json").read_text()


def test_short_answers_are_asked_for_in_the_words_of_llava(folder, tmp_path, monkeypatch):
    asked, predict = [], predictions.predict
    monkeypatch.setattr(predictions, "predict", lambda p, tasks, *more: asked.extend(tasks) or predict(p, tasks, *more))
    run(folder, tmp_path, *with_model(folder), "--no-shuffled", "--short")
    captions, questions = ([task for task in asked if task.is_caption is kind] for kind in (True, False))
    assert len(captions) == 3 and len(questions) == 4
    assert all(
        task.messages[-1].text.endswith("\nAnswer the question using a single word or phrase.") for task in questions
    )
    assert not any("single word" in task.messages[-1].text for task in captions)


def test_scores_of_other_data_are_not_overwritten(folder, tmp_path):
    run(folder, tmp_path / "out", *with_model(folder), "--no-shuffled")
    before = (tmp_path / "out" / "scores.json").read_text()
    other = shutil.copy(folder / "data.json", folder / "other.json")
    with pytest.raises(UserError, match=r"out: holds the scores of .*data.json; name another folder with --out"):
        evaluate.main([f"--data={other}", f"--out={tmp_path / 'out'}", *with_model(folder), "--device=cpu"])
    assert (tmp_path / "out" / "scores.json").read_text() == before


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder, tmp_path):
    found = run(folder, tmp_path / "one", *with_model(folder))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mmllm"]
    options = [f"--data={folder / 'data.json'}", f"--out={tmp_path / 'two'}", *with_model(folder)]
    subprocess.run([*command, "evaluate", *options], check=True, cwd=ROOT, capture_output=True, timeout=60)
    assert json.loads((tmp_path / "two" / "scores.json").read_text())["scores"] == found["scores"]
    for name in ("captions.json", "answers.json", "captions_shuffled.json", "samples.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_sheet_shows_images_and_answers_and_escapes_them(folder, tmp_path):
    results = [{"image_id": number, "caption": f"<b>{number}</b> square"} for number in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match="no prediction"):
        run(folder, tmp_path, "--predictions", tmp_path / "captions.json")
    page = (tmp_path / "samples.html").read_text()
    assert page.count("<img src=") == 9 and "&lt;b&gt;1&lt;/b&gt;" in page and "<b>1" not in page
    assert [part for part in ("captions: best", "captions: worst", "captions: random") if part not in page] == []
