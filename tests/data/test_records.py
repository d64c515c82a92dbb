"""Records in other projects' words, absent fields, keys that nobody reads, and marks and answers that are refused."""

import json
from pathlib import Path

import pytest

from mmllm.data.chat import IMAGE, Message, assistant, user
from mmllm.data.prepared import to_record
from mmllm.data.records import CAPTION_PROMPT
from mmllm.data.samples import Sample, read_samples
from mmllm.errors import DataError

A_BUS = [("user", "<image>\nWhat?"), ("assistant", "A bus.")]
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]
MARKED = [{"from": "human", "value": "<image>\nWhat?"}, TURNS[1]]


def samples_of(folder: Path, *records) -> list[Sample]:
    """The samples of a data file with these records and its images beside it."""
    (folder / "data.json").write_text(json.dumps(records))
    return read_samples(folder / "data.json")


def sample_of(folder: Path, record) -> Sample:
    (sample,) = samples_of(folder, record)
    assert not sample.fault, sample.fault
    return sample


def said(sample: Sample) -> list[tuple[str, str]]:
    """Its turns as (role, text), with a mark for each image."""
    return [(m.role, "".join("<image>" if part is IMAGE else part for part in m.parts)) for m in sample.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"image": "0.png", "conversations": TURNS},
        {
            "images": ["0.png"],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bus."}],
        },
        {
            "image": "0.png",
            "conversations": [
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": "A bus."},
            ],
        },
        {
            "images": ["0.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "\nWhat?"}]},
                {"role": "assistant", "content": ["A bus."]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "0.png"}}, "What?"]},
                {"role": "assistant", "content": "A bus."},
            ]
        },
        {"images": ["0.png"], "texts": [{"user": "What?", "assistant": "A bus.", "source": "x"}]},
        {"images": [{"path": "0.png", "bytes": None}], "query": "What?", "response": "A bus."},
        {"file_name": "0.png", "question": "What?", "answer": "A bus."},
        {"Image": "0.png", "instruction": "What?", "output": "A bus."},
        {"image": "0.png", "prompt": "What?", "text": "A bus."},
    ],
)
def test_a_question_and_its_answer_in_the_words_of_many_projects(record, tmp_path):
    sample = sample_of(tmp_path, record)
    assert (sample.images, said(sample), sample.references) == ((tmp_path / "0.png",), A_BUS, ("A bus.",))


@pytest.mark.parametrize(
    "key", ["image", "images", "image_path", "file_name", "filename", "img", "image_url", "IMG_PATH"]
)
def test_an_image_may_have_any_of_the_usual_names(key, tmp_path):
    sample = sample_of(tmp_path, {key: "0.png", "caption": "A bus."})
    assert (sample.images, sample.messages) == (
        (tmp_path / "0.png",),
        (user(CAPTION_PROMPT, images=1), assistant("A bus.")),
    )


def test_of_several_answers_the_most_common_is_the_target_and_all_are_references(tmp_path):
    answers = ["a bus", "bus", {"answer": "bus"}]
    sample = sample_of(tmp_path, {"question_id": 7, "image": "0.png", "question": "What?", "answers": answers})
    assert (sample.id, sample.messages[1], sample.references) == ("7", assistant("bus"), ("a bus", "bus", "bus"))


# absent fields


@pytest.mark.parametrize(
    "extra",
    [
        {"images": None},
        {"images": []},
        {"id": None, "kind": None, "references": None, "system": None, "text": None, "captions": []},
        {"images": float("nan"), "text": float("nan"), "prompt": None},
    ],
)
def test_null_nan_and_empty_lists_mean_absent(extra, tmp_path):
    for turns in (TURNS, MARKED):
        sample = sample_of(tmp_path, {"image": "0.png", "conversations": turns} | extra)
        assert (sample.id, sample.images, said(sample), sample.kind) == ("0", (tmp_path / "0.png",), A_BUS, "")


def test_a_null_prompt_is_the_default_one(tmp_path):
    sample = sample_of(tmp_path, {"image": "0.png", "prompt": None, "text": "A bus."})
    assert sample.messages[0] == user(CAPTION_PROMPT, images=1)


# one bad row among good ones


def test_a_bad_caption_is_one_bad_sample_and_the_others_are_kept(tmp_path):
    good, bad, other = samples_of(tmp_path, {"id": 3, "image": "0.png", "captions": ["A bus.", None, "A red bus."]})
    assert (good.id, bad.id, other.id) == ("3#0", "3#1", "3#2")
    assert bad.fault == "has the answer None; it must be a text"
    assert good.references == other.references == ("A bus.", "A red bus.")


def test_a_null_caption_of_coco_is_one_bad_sample(tmp_path):
    content = {
        "images": [{"id": 9, "file_name": "0.png"}, None, {"id": 7}],
        "annotations": [
            {"image_id": 9, "caption": None},
            {"image_id": 9, "caption": "A bus. "},
            {"image_id": 7, "caption": "A cat."},
            {"caption": "Lost."},
            None,
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    samples = read_samples(tmp_path / "captions.json")
    assert [sample.id for sample in samples] == ["9#0", "9#1", "1", "2", "3"]
    assert samples[0].fault == "has the answer None; it must be a text"
    assert (samples[1].references, samples[1].fault) == (("A bus.",), "")
    for number, sample in enumerate(samples[2:], 2):
        assert sample.fault.startswith(
            f"annotations[{number}] needs a `caption` and the `image_id` of one of `images`: "
        )


def test_a_bad_row_of_karpathys_and_of_vqas_files_is_one_bad_sample(tmp_path):
    good = {"filename": "0.png", "split": "train", "sentences": [{"raw": "A bus."}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [good, {"filename": "1.png", "split": "train"}]}))
    first, second = read_samples(tmp_path / "dataset.json", split="train")
    assert (
        first.references == ("A bus.",)
        and "train images[1] needs `filename`, and `sentences` with `raw`: KeyError" in second.fault
    )
    question = {"question_id": 1, "image_id": 2, "question": "What?"}
    content = {
        "data_subtype": "train2014",
        "questions": [question, {"question_id": 2}, None, question | {"question": None}],
    }
    (tmp_path / "questions.json").write_text(json.dumps(content))
    faults = [bool(sample.fault) for sample in read_samples(tmp_path / "questions.json")]
    assert faults == [False, True, True, True]


def test_a_line_that_is_not_json_is_one_bad_sample(tmp_path):
    line = json.dumps({"image": "0.png", "text": "A bus."})
    (tmp_path / "data.jsonl").write_text(f'{line}\n{{"image": "0.png",\n\n{line}\n')
    faults = [sample.fault for sample in read_samples(tmp_path / "data.jsonl")]
    assert faults[0] == faults[2] == "" and faults[1].startswith("line 2: ")


# what nobody reads


def test_keys_that_are_not_read_are_reported_once_with_the_nearest_that_would_be(tmp_path, capsys):
    record = {"image": "0.png", "text": "A bus.", "tags": ["bus"], "systen": "Be brief."}
    turns = {"image": "0.png", "conversations": [TURNS[0], TURNS[1] | {"tools": "none"}]}
    samples_of(tmp_path, record, record, turns, record | {"tags": None})
    assert capsys.readouterr().err == (
        f"{tmp_path}/data.json: not read: `conversations[].tools` of 1, `systen` (did you mean system?) of 3, "
        "`tags` of 2 records\n"
    )


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"weight": 0.0}])
def test_an_answer_without_loss_or_weight_is_not_trained_on(mark, tmp_path):
    others = [TURNS[0] | {"weight": 1}, TURNS[1] | {"loss": True}]
    sample = sample_of(tmp_path, {"image": "0.png", "conversations": [TURNS[0], TURNS[1] | mark, *others]})
    assert [turn.is_target for turn in sample.messages] == [True, False, True, True]
    assert to_record(sample, {sample.images[0]: "0.png"})["conversations"][1] == TURNS[1] | {"weight": 0}


def test_a_weight_between_0_and_1_is_refused(tmp_path):
    (sample,) = samples_of(tmp_path, {"image": "0.png", "conversations": [TURNS[0], TURNS[1] | {"weight": 0.5}]})
    assert sample.fault == "conversations[1].weight is 0.5; it can be 0 or 1, false or true"


def test_system_is_the_first_turn(tmp_path):
    for record in ({"conversations": MARKED}, {"prompt": "What?", "text": "A bus."}):
        sample = sample_of(tmp_path, {"image": "0.png", "system": "Be brief."} | record)
        assert said(sample) == [("system", "Be brief."), *A_BUS]


# marks, answers, names


@pytest.mark.parametrize(
    "record, fault",
    [
        (
            {"conversations": [MARKED[0], {"from": "gpt", "value": "<image> A bus."}]},
            "turn 1 has an answer with <image> in it; images can only be in user turns",
        ),
        ({"caption": "<image> A bus."}, "has an answer with <image> in it; images can only be in user turns"),
        (
            {"conversations": [{"from": "system", "value": "<image>"}, *TURNS]},
            "turn 0 has <image>, but is a system turn; images can only be in user turns",
        ),
        ({"prompt": "<image1> What?", "text": "A bus."}, "turn 0 has <image1>; write <image> where each image belongs"),
        ({"prompt": "<|image_2|>?", "text": "A bus."}, "turn 0 has <|image_2|>; write <image> where"),
        ({"prompt": "<|image_pad|>?", "text": "A bus."}, "turn 0 has <|image_pad|>; write <image> where"),
        ({"conversations": [MARKED[0], {"from": "gpt", "value": ""}]}, "turn 1 has an empty answer"),
        ({"conversations": [*MARKED, TURNS[0], {"from": "gpt", "value": " \n"}]}, "turn 3 has an empty answer"),
        ({"caption": "\t"}, "has an empty answer"),
        (
            {"system": "a", "conversations": [{"from": "system", "value": "b"}, *TURNS]},
            "has `system` and also a system",
        ),
        ({"answer": "A bus.", "messages": TURNS}, "has `messages` and also `answer`; keep one of them"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0] has a part that is neither a text nor an image: {'type': 'video'}",
        ),
        ({"question": 4, "answer": "a"}, "`question` is 4; it must be a text"),
        ({"question": "What?", "answer": 4}, "has the answer 4; it must be a text"),
    ],
)
def test_a_record_that_cannot_be_trained_on_says_why(record, fault, tmp_path):
    (sample,) = samples_of(tmp_path, {"image": "0.png"} | record)
    assert sample.fault.startswith(fault)


def test_an_empty_caption_is_refused_and_its_neighbour_kept(tmp_path):
    good, bad = samples_of(tmp_path, {"image": "2.png", "captions": ["A bus.", ""]})
    assert (good.fault, bad.fault) == ("", "has an empty answer")


def test_a_text_about_image_tags_without_an_image_stays_a_text(tmp_path):
    sample = sample_of(tmp_path, {"prompt": "Which tag shows one in SVG?", "text": "<image> does."})
    assert sample.messages == (user("Which tag shows one in SVG?"), assistant("<image> does."))


def test_numbered_marks_would_lose_their_order(tmp_path):
    record = {"images": ["0.png", "1.png"], "prompt": "<image> or <image>?", "text": "The first."}
    assert sample_of(tmp_path, record).messages[0] == Message("user", (IMAGE, " or ", IMAGE, "?"))
    (sample,) = samples_of(tmp_path, record | {"prompt": "<image 2> or <image 1>?"})
    assert "<image 2>" in sample.fault


@pytest.mark.parametrize(
    "name", ["data:image/png;base64," + "A" * 100_000, "iVBORw0KGgo" * 5000, "https://example.org/x.jpg"]
)
def test_an_image_that_is_no_file_is_refused_in_a_short_line(name, tmp_path):
    (sample,) = samples_of(tmp_path, {"image": name, "text": "A bus."})
    assert "it must be a file name: nothing is downloaded or decoded here" in sample.fault
    assert len(sample.fault) < 200


def test_paths_are_resolved_before_they_are_compared(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.json").write_text(json.dumps([{"image": str(tmp_path / "images" / "0.png"), "text": "a"}]))
    for image_dir in ("images", "~/images", tmp_path / "images", "./images/../images"):
        (sample,) = read_samples("~/data.json", image_dir)
        assert not sample.fault and sample.images[0].resolve() == tmp_path / "images" / "0.png"
    (tmp_path / "data.json").write_text(json.dumps([{"image": "../0.png", "text": "a"}]))
    (sample,) = read_samples("data.json", ".")
    assert "is outside the image directory" in sample.fault
    with pytest.raises(DataError, match="no such data file"):
        read_samples("~/none.json")
