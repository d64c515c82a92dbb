"""`mmllm prepare`: what it writes is read back as the samples that were given."""

import csv
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.shapes.world import any_scene, draw
from examples.shapes.world import caption as caption_of
from mmllm.commands import caption, evaluate, prepare, train
from mmllm.data.image import ImageProcessor
from mmllm.data.samples import load_samples
from mmllm.errors import DataError, UserError
from official import write_model
from tiny_run import break_image


@pytest.fixture
def photos(tmp_path):
    """Ten images, of which 9.jpg has the bytes of 0.jpg, 3.jpg is damaged, and a table of captions."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    shutil.copyfile(folder / "0.jpg", folder / "9.jpg")
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "3.png")
    break_image(folder / "3.png")
    lines = [f"{number}.jpg,the number {number}" for number in range(10)] + ["3.png,broken", "2.jpg,"]
    (tmp_path / "captions.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    return tmp_path


def run(photos, *arguments):
    return prepare.main([str(photos / "captions.csv"), "--image-dir", str(photos / "photos"), *map(str, arguments)])


def test_a_table_becomes_two_splits_with_their_images(photos, capsys):
    out = photos / "out"
    assert run(photos, "--out", out, "--val-fraction", 0.3) == 0
    train, val = (load_samples(out / f"{split}.jsonl", out / "images") for split in ("train", "val"))
    images = [{path.name for sample in part for path in sample.images} for part in (train, val)]
    assert len(images[1]) == 3 and not images[0] & images[1] and len(images[0] | images[1]) >= 9
    assert all(path.is_file() for part in (train, val) for sample in part for path in sample.images)
    assert [sample.messages[-1].text for sample in train] == [f"the number {s.images[0].stem}" for s in train]
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["index"] for row in bad] == [3, 11]  # the captions of an image stand together
    assert "empty" in bad[0]["reason"] and "3.png" in bad[1]["file"]
    printed = capsys.readouterr().out
    assert "2 of 12 samples are bad" in printed and f"data.train_data_path={out / 'train.jsonl'}" in printed
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_an_image_of_the_validation_is_not_trained_on_under_another_name(photos, capsys):
    (photos / "val.csv").write_text("image,caption\n0.jpg,zero\n")
    run(photos, "--out", photos / "out", "--val", photos / "val.csv")
    names = {
        sample.images[0].name for sample in load_samples(photos / "out" / "train.jsonl", photos / "out" / "images")
    }
    assert names == {f"{number}.jpg" for number in range(1, 9)}
    assert "2 training samples left out" in capsys.readouterr().out


def test_cropped_images_have_the_pixels_of_the_originals(photos):
    run(photos, "--out", photos / "out", "--images", "crop")
    process = ImageProcessor()
    for sample in load_samples(photos / "out" / "train.jsonl", photos / "out" / "images"):
        (path,) = sample.images
        with Image.open(path) as image:
            assert path.suffix == ".png" and image.size == (224, 224)
        assert process(path).equal(process(photos / "photos" / path.name.removesuffix(".png")))


def test_conversations_come_back_as_they_were(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    records = [
        {"image": "a.png", "captions": ["one", "two\nlines"]},
        {"images": ["b.png", "a.png"], "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "In <image> and\n<image>: the same?"}, {"from": "gpt", "value": "No."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
        {"image": "b.png", "question": "What?", "answers": ["a", "b", "a"], "kind": "what"},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi \u2028 there"}]},
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    prepare.main([str(tmp_path / "data.json"), "--out", str(tmp_path / "out"), "--images", "link"])
    before = load_samples(tmp_path / "data.json")
    after = load_samples(tmp_path / "out" / "train.jsonl", tmp_path / "out" / "images")
    for one, other in zip(before, after, strict=True):
        assert [turn.text for turn in one.messages] == [turn.text for turn in other.messages]
        assert (one.id, one.references, one.kind) == (other.id, other.references, other.kind)
        assert [path.name for path in one.images] == [path.name for path in other.images]


def test_a_model_counts_the_tokens(photos, capsys):
    write_model(photos / "model")
    run(photos, "--out", photos / "out", "--model", photos / "model")
    printed = capsys.readouterr().out
    assert "tokens of a sample: median " in printed and "are trained on" in printed


def test_a_folder_that_holds_a_data_set_and_data_without_a_sample_are_refused(photos):
    run(photos, "--out", photos / "out")
    with pytest.raises(UserError, match="holds a data set already"):
        run(photos, "--out", photos / "out")
    (photos / "captions.csv").write_text("image,caption\nnone.jpg,nothing\n")
    with pytest.raises(DataError, match="no sample is left"):
        run(photos, "--out", photos / "other")


SHAPES = ("rectangle", "ellipse", "line")


@pytest.fixture
def drawn(tmp_path):
    """Six drawn images, every third of which has two captions: name to captions."""
    (tmp_path / "images").mkdir()
    captions = {}
    for number in range(6):
        image, shape = Image.new("RGB", (48, 40), "white"), SHAPES[number % 3]
        getattr(ImageDraw.Draw(image), shape)((4, 4, 20 + number, 30), fill="red" if number % 2 else "blue")
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        image.save(tmp_path / "images" / name)
        captions[name] = [f'a "{shape}", drawn in \u00fc'] + ["a shape"] * (number % 3 == 0)
    return captions


def export_csv(folder, captions):
    with open(folder / "data.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "image", "caption"))
        writer.writerows((Path(name).stem, name, text) for name, texts in captions.items() for text in texts)
    return [str(folder / "data.csv"), "--image-dir", str(folder / "images")]


def export_metadata(folder, captions):
    shutil.copytree(folder / "images", folder / "hf")
    rows = [{"id": Path(name).stem, "file_name": name, "captions": texts} for name, texts in captions.items()]
    (folder / "hf" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(folder / "hf")]


def export_tar(folder, captions):
    with tarfile.open(folder / "data.tar", "w") as archive:
        for name, texts in captions.items():
            archive.add(folder / "images" / name, name)
            text = "\n".join(texts) if len(texts) == 1 else json.dumps({"captions": texts})
            (folder / "text").write_text(text, encoding="utf-8")
            archive.add(folder / "text", f"{Path(name).stem}.{'txt' if len(texts) == 1 else 'json'}")
    return [str(folder / "data.tar")]


def export_parquet(folder, captions):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "id": Path(name).stem,
            "image": {"bytes": (folder / "images" / name).read_bytes(), "path": name},
            "captions": texts,
        }
        for name, texts in captions.items()
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "data.parquet")
    return [str(folder / "data.parquet")]


EXPORTS = [export_csv, export_metadata, export_tar, export_parquet]


@pytest.mark.parametrize("export", EXPORTS)
def test_the_same_data_in_any_format_becomes_the_same_data_set(export, drawn, tmp_path):
    out = tmp_path / "out"
    prepare.main([*export(tmp_path, drawn), "--out", str(out), "--val-fraction", "0.3"])
    records = [
        {
            "id": f"{name[0]}#{i}" if len(texts) > 1 else name[0],
            "images": [name],
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe this image."},
                {"from": "gpt", "value": text},
            ],
            "references": texts,
        }
        for name, texts in drawn.items()
        for i, text in enumerate(texts)
    ]
    split = [list(map(json.loads, (out / f"{part}.jsonl").read_text().splitlines())) for part in ("train", "val")]
    assert split[1] == [row for row in records if row["id"] in ("2", "4")]
    assert split[0] == [row for row in records if row["id"] not in ("2", "4")]
    for name in drawn:
        assert (out / "images" / name).read_bytes() == (tmp_path / "images" / name).read_bytes()
    assert not (out / "unpacked").exists()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with sixteen images of the drawn world and a model, and their captions."""
    folder, rng, captions = tmp_path_factory.mktemp("scenes"), random.Random(0), {}
    (folder / "images").mkdir()
    write_model(folder / "model", clip={"num_hidden_layers": 2}, num_hidden_layers=2)
    for number in range(16):
        scene = any_scene(rng)
        draw(scene).save(folder / "images" / f"{number:02}.png")
        captions[f"{number:02}.png"] = [caption_of(scene)]
    return folder, captions


@pytest.fixture(scope="module")
def from_csv(scenes):
    folder, captions = scenes
    return chain(export_csv(folder, captions), folder, folder / "csv")


@pytest.mark.slow
@pytest.mark.parametrize("export", EXPORTS[1:])
def test_any_format_leads_over_prepare_and_own_py_to_the_same_captions_and_scores(export, scenes, from_csv):
    folder, captions = scenes
    losses, rows, scores = chain(export(folder, captions), folder, folder / export.__name__)
    assert (losses, rows, scores) == from_csv
    assert losses[-1] < losses[0] and len(rows) == 16 and all("caption" in row for row in rows)
    assert scores["true images"]["captions"]["count"] == 3 and scores["true images"]["captions"]["bleu_1"] > 0


def chain(source, tmp_path, out):
    """What a user types: prepare, train own, caption a folder, evaluate. Validation losses, captions and scores."""
    assert prepare.main([*source, "--out", str(out), "--val-fraction", "0.2"]) == 0
    assert train.main(
        f"own data.train_data_path={out}/train.jsonl data.val_data_path={out}/val.jsonl data.image_dir={out}/images "
        f"model.pretrained={tmp_path}/model output_dir={out} device=cpu data.batch_size=2 data.num_workers=0 "
        "training.bf16=false training.num_sample_captions=0 eval_steps=99 "
        "learning_rate=1e-2 stage1.epochs=1 stage2.epochs=3".split()
    ) == 0  # fmt: skip
    common = ["--model", str(out / "own" / "best_model"), "--device", "cpu", "--max-new-tokens", "40"]
    assert caption.main([str(out / "images"), "--out", str(out / "captions.jsonl"), *common]) == 0
    evaluate.main(["--data", str(out / "val.jsonl"), "--image-dir", str(out / "images"), *common])
    metrics = map(json.loads, (out / "own" / "metrics.jsonl").read_text().splitlines())
    captions = map(json.loads, (out / "captions.jsonl").read_text().splitlines())
    scores = json.loads((out / "own" / "evaluation" / "val" / "scores.json").read_text())["scores"]
    return [row["val_loss"] for row in metrics if "val_loss" in row], list(captions), scores
