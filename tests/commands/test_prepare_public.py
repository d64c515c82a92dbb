"""`mmllm prepare coco` and the like, from a host that serves small archives in the official layouts."""

import json

import pytest
from public_data import KEPT, LEFT_OUT, SPLITS, host, write_public

from mmllm.commands import prepare
from mmllm.data.public import BUILDERS, SHORT, TABLE, read_table
from mmllm.data.samples import load_samples
from mmllm.errors import DataError, RunError, UserError
from mmllm.evaluation.tasks import tasks_of


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    with host(folder) as server:
        server.table = write_public(folder, server.url)
        yield server


def run(public, name, out, *options):
    assert prepare.main([name, "--out", str(out), "--table", str(public.table), *map(str, options)]) == 0
    read = {}
    for split in ("train", "val", "test"):
        if (out / f"{split}.jsonl").exists():
            images = next((option for option in options if "images" in str(option)), out / "images")
            read[split] = load_samples(out / f"{split}.jsonl", images)
            assert all(path.is_file() for sample in read[split] for path in sample.images)
    return read


def numbers(samples) -> set[int]:
    return {int(sample.images[0].stem[-12:]) for sample in samples}


def test_coco_is_split_as_karpathy_split_it(public, tmp_path):
    splits = run(public, "coco", tmp_path / "coco")
    assert {split: numbers(samples) for split, samples in splits.items()} == {
        "train": {n for n, split in SPLITS.items() if split in ("train", "restval")},
        "val": {5},
        "test": {6, 9},
    }
    assert len(splits["train"]) == 12  # a sample for each caption
    task, _ = tasks_of(splits["test"])
    assert (task.id, task.is_caption, task.references) == ("6", True, ("a blue square", "all is blue"))
    names = {path.name for path in (tmp_path / "coco").iterdir()}
    assert names == {"images", "source", "train.jsonl", "val.jsonl", "test.jsonl", "contact_sheet.png"}


def test_a_question_is_in_the_split_of_its_image_and_images_are_downloaded_once(public, tmp_path):
    run(public, "coco", tmp_path / "coco")
    asked = len(public.requests)
    splits = run(public, "vqav2", tmp_path / "vqav2", "--image-dir", tmp_path / "coco" / "images")
    assert [name for name, _ in public.requests[asked:] if "2014.zip" in name] == []
    assert (
        numbers(splits["train"]) == {1, 2, 3, 4, 7, 8}
        and numbers(splits["val"]) == {5}
        and numbers(splits["test"]) == {6, 9}
    )
    (task,) = tasks_of(splits["val"])
    assert task.id == "5000" and task.references == ("green",) * 10 and task.kind == "other" and not task.is_caption
    assert task.messages[-1].text == f"<image>\nWhat color is it?{SHORT}"


def test_no_image_of_an_evaluation_split_is_in_llavas_mixture(public, tmp_path, capsys):
    (train,) = run(public, "llava-instruct", tmp_path / "out").values()
    printed = capsys.readouterr().out
    assert f"llava-instruct: {LEFT_OUT} training samples are left out: they show an image of an evaluation" in printed
    assert "1 training samples are left out: they are about OCR-VQA's images, which have no archive" in printed
    names = [str(path.relative_to(tmp_path / "out" / "images")) for sample in train for path in sample.images]
    assert names == [
        "train2014/COCO_train2014_000000000001.jpg",
        "val2014/COCO_val2014_000000000004.jpg",
        "gqa/images/32.jpg",
        "vg/VG_100K_2/34.jpg",
        "textvqa/train_images/open1.jpg",
    ]
    assert len(train) == KEPT and train[-1].images == ()  # one of text alone


@pytest.mark.parametrize(
    "name, counts",
    [
        ("flickr30k", {"train": 12, "val": 2, "test": 4}),
        ("llava-pretrain", {"train": 6}),
        ("textvqa", {"train": 2, "val": 1}),
        ("easy-vqa", {"train": 36, "val": 4, "test": 10}),
        ("vqav2-test", {"test": 2}),
    ],
)
def test_the_others_have_their_samples(name, counts, public, tmp_path):
    assert {split: len(samples) for split, samples in run(public, name, tmp_path / "out").items()} == counts


def test_a_preparation_that_broke_off_continues_and_its_folder_is_refused_until_then(public, tmp_path):
    out = tmp_path / "out"
    public.faults["karpathy-caption_datasets.zip"] = ["404"]
    with pytest.raises(RunError, match="the host answers 404"):
        run(public, "coco", out)
    assert len(list((out / "images").rglob("*.jpg"))) == len(SPLITS)
    (out / "train.tmp.jsonl").write_text('{"image": "1.jpg", "text": "x"}\n')
    with pytest.raises(DataError, match="out: `mmllm prepare` has not finished there; run it again"):
        load_samples(out / "train.tmp.jsonl")
    with pytest.raises(UserError, match="holds other files"):
        run(public, "vqav2", out)
    asked = len(public.requests)
    run(public, "coco", out)
    assert [name for name, _ in public.requests[asked:]] == ["karpathy-caption_datasets.zip"]
    with pytest.raises(UserError, match="holds a data set already"):
        run(public, "coco", out)


def test_a_preparation_that_broke_off_among_its_splits_continues(public, tmp_path, monkeypatch):
    out, write = tmp_path / "out", prepare.write_split
    monkeypatch.setattr(prepare, "write_split", lambda path, *rest: (write(path, *rest), 1 / (path.stem != "train")))
    with pytest.raises(ZeroDivisionError):
        run(public, "coco", out)
    assert (out / "train.jsonl").exists()
    monkeypatch.undo()
    run(public, "coco", out)
    assert load_samples(out / "train.jsonl", out / "images")


def test_a_folder_with_other_files_and_a_table_of_another_form_are_refused(public, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; name an empty folder with --out"):
        run(public, "coco", tmp_path)
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(DataError, match="no table of datasets"):
        prepare.main(["coco", "--out", str(tmp_path / "x"), "--table", str(tmp_path / "table.json")])


def test_an_image_that_an_archive_lacks_is_counted(public, tmp_path, capsys):
    for name, missing in (("some", ["open1"]), ("all", ["open1", "open2"])):
        out = tmp_path / name
        run(public, "textvqa", out)
        images = out / "images" / "textvqa" / "train_images"
        for image in missing:
            (images / f"{image}.jpg").unlink()
        (out / "unfinished").write_text("textvqa")
        for split in ("train", "val"):
            (out / f"{split}.jsonl").unlink()
        if name == "all":
            with pytest.raises(DataError, match="no sample is left for train; .*bad_train_samples.jsonl says why"):
                run(public, "textvqa", out)
        else:
            assert len(run(public, "textvqa", out)["train"]) == 1
            assert "1 samples, 1 images; 1 bad ones left out" in capsys.readouterr().out


def test_the_table_names_every_dataset_and_its_hosts():
    table = read_table(TABLE)
    assert table.keys() == BUILDERS.keys()
    files = {name: file for dataset in table.values() for name, file in dataset["files"].items()}
    assert files.keys() == json.loads(TABLE.read_text())["files"].keys()  # none is left over
    assert all(len(file.get("sha256", "0" * 64)) == 64 for file in files.values())
    assert all(dataset["licence"] and dataset["page"] for dataset in table.values())
