"""Data files and records in every known layout, and what is refused."""

import json
from pathlib import Path

import pytest

from mmllm.config.schema import ExperimentConfig
from mmllm.data.chat import IMAGE, Message, assistant, user
from mmllm.data.samples import Sample, load_samples, read_samples
from mmllm.errors import DataError
from mmllm.training.resume import data_sha256

CAT = {"image": "cat.jpg", "text": "A cat.", "prompt": "What is this?"}


def written(folder: Path, content: object, name: str = "data.json") -> Path:
    path = folder / name
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_conversation_keeps_its_turns_and_the_places_of_its_images(tmp_path):
    record = {
        "id": "seven",
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "The first."},
            {"from": "user", "value": "Why?"},
            {"from": "assistant", "value": "It has a cat in it."},
        ],
    }
    assert load_samples(written(tmp_path, [record]), "images") == [
        Sample(
            id="seven",
            images=(Path("images/a.jpg"), Path("images/b.jpg")),
            messages=(
                Message("system", ("Be brief.",)),
                Message("user", (IMAGE, " or ", IMAGE, "?")),
                assistant("The first."),
                user("Why?"),
                assistant("It has a cat in it."),
            ),
            references=("It has a cat in it.",),
        )
    ]


def test_an_image_without_a_mark_comes_first(tmp_path):
    turns = [{"from": "human", "value": "What is this?"}, {"from": "assistant", "value": "A cat."}]
    (sample,) = load_samples(written(tmp_path, [{"image": "cat.jpg", "conversations": turns}]))
    assert sample.messages[0] == user("What is this?", images=1)
    assert sample.images == (tmp_path / "cat.jpg",)


def test_a_conversation_may_have_no_image(tmp_path):
    turns = [{"from": "human", "value": "Hello."}, {"from": "assistant", "value": "Hello!"}]
    (sample,) = load_samples(written(tmp_path, [{"conversations": turns}]))
    assert (sample.images, sample.messages) == ((), (user("Hello."), assistant("Hello!")))


def test_image_text_prompt_is_a_question_and_its_answer(tmp_path):
    first, second = load_samples(written(tmp_path, [CAT, {"image": "dog.jpg", "text": "A dog."}]))
    assert first.messages == (user("What is this?", images=1), assistant("A cat."))
    assert second.messages == (user("Describe this image.", images=1), assistant("A dog."))
    assert second.references == ("A dog.",)


def test_several_captions_are_several_samples_with_all_of_them_as_references(tmp_path):
    first, second = load_samples(written(tmp_path, [{"image": "cat.jpg", "captions": ["A cat.", "One cat."]}]))
    assert (first.id, second.id) == ("0#0", "0#1")
    assert (first.messages[1], second.messages[1]) == (assistant("A cat."), assistant("One cat."))
    assert first.references == second.references == ("A cat.", "One cat.")


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([CAT, CAT]),
        "\ufeff" + json.dumps([CAT, CAT]),
        json.dumps(CAT) + "\n" + json.dumps(CAT) + "\n\n",
        "\ufeff" + json.dumps(CAT) + "\r\n" + json.dumps(CAT),
    ],
    ids=["list", "list with BOM", "lines", "lines with BOM and CRLF"],
)
def test_a_list_and_lines_are_the_same_with_or_without_a_byte_order_mark(content, tmp_path):
    assert [sample.messages[1] for sample in load_samples(written(tmp_path, content))] == [assistant("A cat.")] * 2


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    lines = "\n".join(json.dumps({"prompt": "a", "text": f"{i}\u2028\x85"}, ensure_ascii=False) for i in range(2))
    assert [sample.references for sample in load_samples(written(tmp_path, lines))] == [
        ("0\u2028\x85",),
        ("1\u2028\x85",),
    ]


def test_a_single_line_with_several_images_is_a_sample(tmp_path):
    (sample,) = load_samples(written(tmp_path, {"images": ["a.jpg", "b.jpg"], "text": "Two."}))
    assert len(sample.images) == 2


def test_coco_captions(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "One. "},
            {"image_id": 7, "id": 2, "caption": "Two."},
            {"image_id": 8, "id": 3, "caption": "Three."},
        ],
    }
    found = load_samples(written(tmp_path, content))
    assert [(sample.id, sample.images[0].name, sample.references) for sample in found] == [
        ("8#0", "b.jpg", ("One.", "Three.")),
        ("8#1", "b.jpg", ("One.", "Three.")),
        ("7", "a.jpg", ("Two.",)),
    ]


def karpathy(folder: Path) -> Path:
    parts = ["train", "restval", "val", "test"]
    images = [
        {"filepath": "val2014", "filename": f"{i}.jpg", "cocoid": i, "split": part, "sentences": [{"raw": f"{part}. "}]}
        for i, part in enumerate(parts)
    ]
    return written(folder, {"dataset": "coco", "images": images}, "dataset_coco.json")


def test_karpathys_restval_is_for_training(tmp_path):
    found = load_samples(karpathy(tmp_path), split="train")
    assert [sample.references for sample in found] == [("train.",), ("restval.",)]
    assert found[0].images == (tmp_path / "val2014" / "0.jpg",)


def test_a_file_of_several_splits_is_never_read_whole(tmp_path):
    with pytest.raises(DataError, match="has the splits train, val, test, not None; choose one"):
        load_samples(karpathy(tmp_path))


def test_flickr8k_tokens(tmp_path):
    text = "a.jpg#0\tOne .\na.jpg#1\tTwo # 2 .\nb.jpg#0\tThree .\n"
    found = load_samples(written(tmp_path, text, "Flickr8k.token.txt"))
    assert [(sample.id, sample.references) for sample in found] == [
        ("a.jpg#0", ("One .", "Two # 2 .")),
        ("a.jpg#1", ("One .", "Two # 2 .")),
        ("b.jpg", ("Three .",)),
    ]


def test_vqa_questions_find_their_answers_in_the_file_beside_them(tmp_path):
    question = {"question_id": 5, "image_id": 458752, "question": "What is it?"}
    answers = [{"answer": "net"}, {"answer": "a net"}, {"answer": "net"}]
    annotation = {"question_id": 5, "answers": answers, "answer_type": "other"}
    content = {"data_subtype": "train2014", "questions": [question]}
    path = written(tmp_path, content, "v2_OpenEnded_mscoco_train2014_questions.json")
    (unanswered,) = load_samples(path)
    written(tmp_path, {"annotations": [annotation]}, "v2_mscoco_train2014_annotations.json")
    (sample,) = load_samples(path)
    assert unanswered.messages == (user("What is it?", images=1),)
    assert sample == Sample(
        id="5",
        images=(tmp_path / "COCO_train2014_000000458752.jpg",),
        messages=(user("What is it?", images=1), assistant("net")),
        references=("net", "a net", "net"),
        kind="other",
    )


TEXTVQA = {"question_id": 34602, "image_id": "0054c91397f2fe05", "question": "Which brand?"}
VIZWIZ = {"image": "VizWiz_train_00000001.jpg", "question": "What is it?", "answer_type": "other", "answerable": 1}
GQA = {"imageId": "2370799", "question": "Is it overcast?", "answer": "no", "types": {"structural": "verify"}}


@pytest.mark.parametrize(
    "content, sample_id, image, answers, kind",
    [
        ({"07333408": GQA, "07333409": GQA}, "07333408", "2370799.jpg", ("no",), "verify"),
        (
            {"dataset_name": "textvqa", "data": [TEXTVQA | {"answers": ["nokia", "dakota", "dakota"]}]},
            "34602",
            "0054c91397f2fe05.jpg",
            ("nokia", "dakota", "dakota"),
            "",
        ),
        (
            [VIZWIZ | {"answers": [{"answer": a, "answer_confidence": "yes"} for a in ("soda", "can", "can")]}],
            VIZWIZ["image"],
            VIZWIZ["image"],
            ("soda", "can", "can"),
            "other",
        ),
    ],
    ids=["GQA", "TextVQA", "VizWiz"],
)
def test_question_files_are_known_by_their_content(content, sample_id, image, answers, kind, tmp_path):
    sample = load_samples(written(tmp_path, content), "images")[0]
    assert (sample.id, sample.images, sample.references) == (sample_id, (Path("images") / image,), answers)
    assert (sample.messages[-1], sample.kind) == (assistant(answers[-1]), kind)


@pytest.mark.parametrize(
    "content",
    [{"1": {"imageId": "7", "question": "?"}}, {"data": [TEXTVQA]}, [VIZWIZ]],
    ids=["GQA", "TextVQA", "VizWiz"],
)
def test_the_questions_of_a_test_split_have_no_answer(content, tmp_path):
    (sample,) = load_samples(written(tmp_path, content))
    assert [message.role for message in sample.messages] == ["user"] and sample.references == ()


def test_records_about_images_of_vizwiz_are_read_as_any_others(tmp_path):
    (sample,) = load_samples(written(tmp_path, [{"image": VIZWIZ["image"], "question": "What?", "answer": "A can."}]))
    assert sample.messages[-1] == assistant("A can.")


def test_one_bad_question_is_named_among_good_ones(tmp_path):
    first, second = read_samples(written(tmp_path, {"1": GQA, "2": {"imageId": "7"}}))
    assert not first.fault and second.fault.startswith("questions[1] needs `question` and `imageId`")


def test_okvqa_has_the_format_of_vqa(tmp_path):
    question = {"image_id": 51606, "question": "What is the hairstyle?", "question_id": 516065}
    answers = [{"answer_id": i, "raw_answer": "ponytails", "answer": "pony tail"} for i in range(2)]
    annotation = {"question_id": 516065, "image_id": 51606, "answer_type": "other", "answers": answers}
    content = {"data_subtype": "train2014", "task_type": "Open-Ended", "questions": [question]}
    path = written(tmp_path, content, "OpenEnded_mscoco_train2014_questions.json")
    written(tmp_path, {"annotations": [annotation]}, "mscoco_train2014_annotations.json")
    (sample,) = load_samples(path)
    assert sample.images == (tmp_path / "COCO_train2014_000000051606.jpg",)
    assert sample.messages[-1] == assistant("pony tail") and sample.references == ("pony tail",) * 2


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "v2_mscoco_train2014_annotations.json",
            '{"annotations": [',
            "annotations.json: line 1: .*; is the file complete",
        ),
        (
            "v2_OpenEnded_mscoco_train2014_questions.json",
            '{"data_subtype": "train2014", "questions": [{"question_id": 1, "image_id": "x", "question": "?"}]}',
            r"sample 0: questions\[0\] needs `question_id`, .*: ValueError",
        ),
    ],
)
def test_a_vqa_file_that_is_not_whole_is_named(tmp_path, name, content, words):
    questions = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions.write_text('{"data_subtype": "train2014", "questions": []}')
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_samples(questions)


def test_the_answers_of_vqa_belong_to_what_a_run_was_trained_on(tmp_path):
    config = ExperimentConfig()
    config.data.train_data_path = str(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json")
    config.data.features_path = str(tmp_path / "features.safetensors")
    answers = tmp_path / "v2_mscoco_train2014_annotations.json"
    for path in (config.data.train_data_path, config.data.features_path, answers):
        Path(path).write_text("{}")
    before = data_sha256(config)
    answers.write_text("{ }")
    Path(config.data.features_path).write_text("{ }")
    after = data_sha256(config)
    assert before.keys() == after.keys() == {"train", "features"}
    assert all(before[name] != after[name] for name in before)


def test_the_real_vqa_files_are_read(shared):
    first = load_samples(shared("vqa/vqav2_questions_fixture.json"))[0]
    assert first.messages[1] == assistant("net")
    assert len(first.references) == 10
    assert first.images[0].exists()


@pytest.mark.parametrize("image_dir", [None, "", "train2014"])
def test_images_and_annotations_of_coco_are_found_in_the_folders_of_the_official_layout(image_dir, tmp_path):
    for folder in ("annotations", "Questions", "Annotations", "train2014", "val2014"):
        (tmp_path / folder).mkdir()
    for part in ("train2014", "val2014"):
        name = f"COCO_{part}_000000000009.jpg"
        (tmp_path / part / name).touch()
        captions = {"images": [{"id": 9, "file_name": name}], "annotations": [{"image_id": 9, "caption": "A bus."}]}
        (sample,) = load_samples(
            written(tmp_path / "annotations", captions), tmp_path / image_dir if image_dir is not None else None
        )
        assert sample.images == (tmp_path / part / name,)
    questions = {"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "What?", "question_id": 90}]}
    answers = {"annotations": [{"question_id": 90, "answers": [{"answer": "bus"}]}]}
    written(tmp_path / "Annotations", answers, "v2_mscoco_train2014_annotations.json")
    path = written(tmp_path / "Questions", questions, "v2_OpenEnded_mscoco_train2014_questions.json")
    (sample,) = load_samples(path, tmp_path / image_dir if image_dir is not None else None)
    assert (sample.images[0].parent, sample.references) == (tmp_path / "train2014", ("bus",))


# what is refused


@pytest.mark.parametrize(
    "record, message",
    [
        ("A cat.", "a JSON object is needed, not str"),
        ({"image": "a.jpg"}, "needs `conversations` or `messages` (a list of turns), `text`, `captions` or `answer`"),
        ({"image": "a.jpg", "text": 4}, "has the answer 4; it must be a text"),
        ({"image": 4, "text": "a"}, "an image is 4; it must be a file name"),
        ({"text": "A cat."}, "has neither an `image` nor a `prompt`, so its text answers nothing"),
        ({"image": "a.jpg", "conversations": "a"}, "`conversations` must be a list of turns"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] needs `from` and `value`, or `role` and `content`"),
        (
            {"conversations": [{"from": [], "value": "a"}]},
            "conversations[0] needs `from` and `value`, or `role` and `content`",
        ),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            "conversations[0].from is 'bot'; it can be human, user, gpt, assistant, system",
        ),
        (
            {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "a"}]},
            "has no user turn to put its image into",
        ),
        (
            {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image><image>"}]},
            "<image> marks: 2, images: 1; mark every image, or none",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}]},
            "<image> marks: 1, images: 0; mark every image, or none",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "text": "a"},
            "has `conversations` and also `text`; keep one of them",
        ),
    ],
)
def test_a_record_that_makes_no_sample_is_named(record, message, tmp_path):
    path = written(tmp_path, [CAT, record])
    with pytest.raises(DataError) as caught:
        load_samples(path)
    assert str(caught.value) == f"{path}: sample 1: {message}"


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg"])
def test_an_image_outside_the_image_directory_is_refused(name, tmp_path):
    with pytest.raises(DataError, match="is outside the image directory"):
        load_samples(written(tmp_path, [{"image": name, "text": "a"}]), tmp_path / "images")


def test_a_whole_path_into_the_image_directory_is_accepted(tmp_path):
    inside = tmp_path / "images" / "a.jpg"
    (sample,) = load_samples(written(tmp_path, [{"image": str(inside), "text": "a"}]), tmp_path / "images")
    assert sample.images == (inside,)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "no samples in it"),
        ("\n", "no samples in it"),
        ('{"prompt": "a", "text": "b"}\n{"prompt": ', "sample 1: line 2: Expecting value"),
        ("[\n{]", "line 2: Expecting property name"),
        ("4", "neither JSON nor a table: it begins with '4'"),
        ('{"annotations": []}', "for VQAv2, name the questions file"),
        ('{"images": 4, "annotations": []}', "looks like a file of COCO, Karpathy or VQAv2, but is"),
        (
            '{"images": [{"id": 1}], "annotations": [{"id": 1}]}',
            "annotations[0] needs a `caption` and the `image_id`",
        ),
        (
            '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}',
            "annotations[0] needs a `caption` and the `image_id`",
        ),
    ],
)
def test_a_file_that_is_no_data_is_named(content, message, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        load_samples(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text_are_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.json: no such data file"):
        load_samples(tmp_path / "x.json")
    with pytest.raises(DataError, match="is a JPEG image, which is not read"):
        load_samples(written(tmp_path, b"\xff\xd8\xff", "x.jpg"))
