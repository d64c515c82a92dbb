"""The words of captions, against the Java tokenizer of the published scores."""

import json
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmllm.evaluation.ptb import words

HERE = Path(__file__).parent


def test_all_333_hard_lines_become_the_words_of_the_java_tokenizer():
    lines = json.loads((HERE / "ptb_golden.json").read_text())
    assert [words(text) for text, _ in lines] == [expected for _, expected in lines]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A man's T-shirt doesn't fit.", "a man 's t-shirt does n't fit"),
        ("two dogs, one (small) cat!!!", "two dogs one -lrb- small -rrb- cat !!!"),
        ("It’s 3:30 p.m. on Main St.", "it 's 3:30 p.m. on main st."),
        ("a cat\u2028on a mat", "a cat on a mat"),  # the official wrapper shifts all later captions by one here
        ("cat😀dog", "cat dog"),
        ("1½ cups", "1 1/2 cups"),
        ("", ""),
        ("?!.", "?!"),
    ],
)
def test_a_caption_becomes_its_words(caption, expected):
    assert words(caption) == expected


def test_the_coco_captions_become_the_words_of_the_java_tokenizer(shared):
    texts = defaultdict(list)
    for annotation in json.loads(shared("caption_metrics/en_captions_val2014.json").read_text())["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    expected = json.loads(shared("caption_metrics/en_captions_val2014_references_after_tokenization.json").read_text())
    assert {number: [words(text) for text in texts[int(number)]] for number in expected} == expected


@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="needs java")
def test_the_java_tokenizer_itself_makes_the_words_of_the_hard_lines(tmp_path):
    lines = json.loads((HERE / "ptb_golden.json").read_text())
    (tmp_path / "lines.txt").write_text("\n".join(text for text, _ in lines) + "\n", encoding="utf-8")
    jar = Path(find_spec("pycocoevalcap.tokenizer.ptbtokenizer").origin).with_name("stanford-corenlp-3.4.1.jar")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(tmp_path / "lines.txt")]
    output = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    removed = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    found = [" ".join(word for word in line.split() if word not in removed) for line in output.split("\n")]
    assert found[: len(lines)] == [words(text) for text, _ in lines]
