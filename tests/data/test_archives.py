"""Archives with images inside: what is unpacked, what it is called, and what is refused."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmllm.config.schema import ExperimentConfig
from mmllm.data.samples import load_samples, read_samples
from mmllm.errors import DataError
from mmllm.training.resume import data_sha256


def image_bytes(red: int, kind: str = "JPEG") -> bytes:
    Image.new("RGB", (20, 20), (red, 0, 0)).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            (info := tarfile.TarInfo(name)).size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def unpacked(path: Path, image_dir: Path | None = None) -> list:
    return read_samples(path, image_dir, unpack_to=path.parent / "unpacked")


@pytest.mark.parametrize("name", ["data.tar", "data.tar.gz", "data"])
def test_members_of_the_same_name_are_a_sample(name, tmp_path):
    more = json.dumps({"question": "What is it?", "answer": "A dog."}).encode()
    members = {"a/0.JPG": image_bytes(1), "a/0.txt": b"A cat.\n", "a/1.json": more, "a/1.png": image_bytes(2, "PNG")}
    first, second = unpacked(tar_of(tmp_path / name, members))
    assert [sample.id for sample in (first, second)] == ["a/0", "a/1"]
    assert [turn.text for turn in first.messages] == ["<image>\nDescribe this image.", "A cat."]
    assert [turn.text for turn in second.messages] == ["<image>\nWhat is it?", "A dog."]
    assert [sample.images[0].read_bytes() for sample in (first, second)] == [image_bytes(1), image_bytes(2, "PNG")]


def test_a_caption_that_is_in_both_files_is_read_once(tmp_path, capsys):
    fields = {"caption": "A cat.", "url": "https://example.org/x.jpg", "key": "0", "status": "success"}
    members = {"0.jpg": image_bytes(1), "0.txt": b"A cat.", "0.json": json.dumps(fields).encode(), "0.cls": b"3"}
    (sample,) = unpacked(tar_of(tmp_path / "data.tar", members))
    assert sample.references == ("A cat.",) and sample.images[0].name == "0.jpg"
    assert "not read: 1 files .cls" in capsys.readouterr().err


def test_a_member_cannot_leave_the_folder(tmp_path):
    members = {"../../up.jpg": image_bytes(1), "../../up.txt": b"up", "/tmp/top.jpg": image_bytes(2)}
    first, second = unpacked(tar_of(tmp_path / "data.tar", members))
    folder = tmp_path / "unpacked" / "0"
    assert first.images == (folder / "up.jpg",) and (folder / "tmp" / "top.jpg").exists()
    assert not (tmp_path / "up.jpg").exists() and second.fault


def test_an_archive_is_no_data_file_and_the_command_that_makes_one_is_named(tmp_path):
    path = tar_of(tmp_path / "data.tar", {"0.jpg": image_bytes(1), "0.txt": b"A cat."})
    config = ExperimentConfig()
    config.data.train_data_path = str(path)
    for read in (lambda: load_samples(path), lambda: data_sha256(config)):
        with pytest.raises(DataError, match=rf"is a tar file; unpack it first: mmllm prepare {path} --out DIR"):
            read()
    (tmp_path / "data.parquet").write_bytes(b"PAR1" + bytes(1000))
    with pytest.raises(DataError, match="is a parquet file; unpack it first"):
        load_samples(tmp_path / "data.parquet")


def test_a_damaged_archive_is_named(tmp_path):
    path = tar_of(tmp_path / "data.tar.gz", {"0.jpg": image_bytes(1), "1.jpg": image_bytes(2)})
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"data\.tar\.gz: is damaged"):
        unpacked(path)


def write_parquet(path: Path, rows: list[dict]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_the_images_of_parquet_keep_their_names_and_contents(tmp_path):
    images = [{"bytes": image_bytes(red), "path": path} for red, path in ((1, "a/b.jpg"), (2, "b.jpg"), (3, None))]
    rows = [{"image": image, "caption": str(number)} for number, image in enumerate(images)]
    samples = unpacked(write_parquet(tmp_path / "data", rows))
    assert [sample.images[0].name for sample in samples] == ["b.jpg", "00000001-image-0-b.jpg", "00000002-image-0.jpg"]
    assert [sample.images[0].read_bytes() for sample in samples] == [image["bytes"] for image in images]
    assert [sample.references for sample in samples] == [("0",), ("1",), ("2",)]


def test_conversations_and_several_images_of_parquet_are_read(tmp_path):
    row = {
        "images": [{"bytes": image_bytes(1, "PNG"), "path": None}, {"bytes": image_bytes(2), "path": None}],
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": " or "}] * 2},
            {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
        ],
    }
    (sample,) = unpacked(write_parquet(tmp_path / "data", [row]))
    assert [path.suffix for path in sample.images] == [".png", ".jpg"]
    assert [turn.text for turn in sample.messages] == ["<image>\n or <image>\n or ", "The first."]


def test_parquet_may_name_images_that_are_beside_it(tmp_path):
    rows = [{"image": {"bytes": None, "path": "x.jpg"}, "text": "A cat."}, {"image": None, "text": "A dog."}]
    first, second = unpacked(write_parquet(tmp_path / "data", rows), tmp_path / "images")
    assert first.images == (tmp_path / "images" / "x.jpg",) and second.fault


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data").write_bytes(b"PAR1" + bytes(1000))
    with pytest.raises(DataError, match="needs pyarrow: pip install pyarrow"):
        unpacked(tmp_path / "data")


def test_a_star_in_a_name_stands_for_all_parts(tmp_path):
    for number in range(2):
        tar_of(tmp_path / f"train-{number}.tar", {"0.jpg": image_bytes(number), "0.txt": b"A cat."})
    samples = read_samples(f"{tmp_path}/train-*.tar", unpack_to=tmp_path / "unpacked")
    assert [sample.images[0].read_bytes() for sample in samples] == [image_bytes(0), image_bytes(1)]
