"""Tables and folders of captioned images, known by their content whatever the file is called."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmllm.data.formats import content_files
from mmllm.data.records import CAPTION_PROMPT
from mmllm.data.samples import load_samples, read_samples
from mmllm.errors import DataError

TWO = [("0.png", ["A bus .", "A red bus , big ."]), ("1.png", ["A cat ."])]
CAPTIONS = {
    "Kaggle's captions.txt": 'image,caption\n0.png,A bus .\n0.png,"A red bus , big ."\n1.png,A cat .\n',
    "results.csv of Flickr30k": (
        "image_name| comment_number| comment\n0.png| 0| A bus .\n0.png| 1| A red bus , big .\n1.png| 0| A cat .\n"
    ),
    "Flickr8k.token.txt": "0.png#0\tA bus .\n1.png#0\tA cat .\n0.png#1\tA red bus , big .\n",
    "tab and header": "file_name\ttext\n0.png\tA bus .\n0.png\tA red bus , big .\n1.png\tA cat .\n",
    "semicolon": 'img;caption\n"0.png";A bus .\n0.png;A red bus , big .\n1.png;A cat .\n',
    "no header": "0.png|A bus .\n0.png|A red bus , big .\n1.png|A cat .\n",
    "byte order mark and CRLF": '\ufeffImage,Caption\r\n0.png,A bus .\r\n0.png,"A red bus , big ."\r\n1.png,A cat .\r\n',
    "metadata.jsonl": "".join(
        json.dumps({"file_name": name, "text": text}) + "\n"
        for name, text in (("0.png", ["A bus .", "A red bus , big ."]), ("1.png", "A cat ."))
    ),
}


def written(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def captions_of(path: Path, **options) -> list[tuple[str, list[str]]]:
    """The captions of each image, in their order."""
    found: dict[str, list[str]] = {}
    for sample in load_samples(path, **options):
        assert sample.messages[0].parts[-1] == CAPTION_PROMPT
        (image,) = sample.images
        found.setdefault(image.relative_to(path.parent).as_posix(), []).append(sample.messages[1].parts[0])
        assert sample.messages[1].parts[0] in sample.references
    return list(found.items())


@pytest.mark.parametrize("name", ["data.txt", "data.csv", "data.json", "data"])
@pytest.mark.parametrize("content", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_a_table_of_captions_is_read_whatever_its_file_is_called(content, name, tmp_path):
    assert captions_of(written(tmp_path / name, content)) == TWO


def test_captions_of_an_image_are_references_of_each_other(tmp_path):
    first, second, third = load_samples(written(tmp_path / "captions.txt", CAPTIONS["Kaggle's captions.txt"]))
    assert first.references == second.references == ("A bus .", "A red bus , big .")
    assert (first.id, second.id, third.id) == ("0.png#0", "0.png#1", "1.png")


def test_a_table_may_ask_questions_and_an_empty_cell_is_absent(tmp_path):
    content = "image,question,answer,system\n0.png,What?,A bus.,\n0.png,Where?,Here.,Be brief.\n,Who?,I.,\n"
    first, second, third = load_samples(written(tmp_path / "vqa.csv", content))
    assert (first.messages[0].parts[-1], first.references) == ("What?", ("A bus.",))
    assert second.messages[0].parts == ("Be brief.",)
    assert third.images == ()


def test_a_quote_at_the_beginning_of_a_caption_stays_in_tab_separated_files(tmp_path):
    content = '0.png#0\t" Hi " , he says .\n1.png#0\tA cat .\n'
    assert captions_of(written(tmp_path / "token", content))[0] == ("0.png", ['" Hi " , he says .'])


def test_a_row_that_does_not_fit_is_one_bad_sample(tmp_path):
    content = (
        "image_name| comment_number| comment\n0.png| 0| A bus .\n0.png| 4   A dog runs .\n1.png| 0|\n2.png| 0| Two .\n"
    )
    faults = [sample.fault for sample in read_samples(written(tmp_path / "results.csv", content))]
    assert faults == ["", "line 3 has 2 columns, the header has 3", "has an empty answer", ""]
    content = "0.png#0\tA bus .\n0.png#1 A dog .\n"
    faults = [sample.fault for sample in read_samples(written(tmp_path / "token", content))]
    assert faults == ["", "line 2: '0.png#1 A dog .' has no caption after '\\t'"]


def test_a_text_beside_each_image_of_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp"):
        image = tmp_path / "set" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(image)
        written(image.with_suffix(".txt"), f"\ufeffThis is {name}.\n")
    (tmp_path / "set" / "b.txt").unlink()
    first, second, third = read_samples(tmp_path / "set")
    assert (first.id, first.references, first.images) == ("a.JPG", ("This is a.JPG.",), (tmp_path / "set" / "a.JPG",))
    assert second.fault == "b.png has no b.txt beside it that can be read as UTF-8"
    assert third.references == ("This is sub/c.webp.",)
    assert [path.name for path in content_files(tmp_path / "set")] == ["a.txt", "c.txt"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata_is_an_image_folder_of_hugging_face(name, tmp_path):
    table = {
        "metadata.jsonl": '{"file_name": "0.png", "text": "A bus."}\n',
        "metadata.csv": "file_name,text\n0.png,A bus.\n",
    }
    written(tmp_path / name, table[name])
    written(tmp_path / "readme.txt", "not a caption")
    (sample,) = load_samples(tmp_path)
    assert (sample.images, sample.references) == ((tmp_path / "0.png",), ("A bus.",))
    assert content_files(tmp_path) == [tmp_path / name]


def test_several_files_are_joined_by_commas_and_each_has_its_images_beside_it(tmp_path):
    for name in ("a", "b, c"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "data.csv", "image,caption\n0.png,A bus.\n")
    both = load_samples(f"{tmp_path}/a/data.csv, {tmp_path}/a/data.csv")
    assert [sample.images[0] for sample in both] == [tmp_path / "a" / "0.png"] * 2
    (alone,) = load_samples(tmp_path / "b, c" / "data.csv")  # a name with a comma in it
    assert alone.images == (tmp_path / "b, c" / "0.png",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<html>\n", "neither JSON nor a table: it begins with '<html>'"),
        (b"name,size\n0.png,3\n", "neither JSON nor a table: it begins with 'name,size'"),
        (b"PAR1\xff", "is a parquet file; unpack it first"),
        (b"PK\x03\x04\xff", "is a zip or Excel file, which is not read"),
        (b"image,caption\n0.png,caf\xe9\n", "save it as UTF-8 text"),
    ],
)
def test_a_file_that_is_not_read_is_named_with_what_to_do(content, message, tmp_path):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match="data.csv: ") as caught:
        load_samples(tmp_path / "data.csv")
    assert message in str(caught.value)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(DataError, match="has neither images with a .txt beside each, nor metadata.jsonl"):
        load_samples(tmp_path)
