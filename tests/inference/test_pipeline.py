"""The pipeline: captions, answers and conversations."""

import os

import pytest
import torch
from PIL import Image

from mmllm import MultimodalInferencePipeline, MultimodalLLM
from mmllm.data.chat import IMAGE, user
from mmllm.errors import ImageError, UserError
from mmllm.inference.pipeline import default_model, load_pipeline
from mmllm.inference.request import GenerationConfig
from mmllm.models.config import MultimodalConfig
from official import write_model

SHORT = GenerationConfig(max_new_tokens=6)


@pytest.fixture(scope="module", params=["patch", "pooled"])
def pipeline(request, tmp_path_factory) -> MultimodalInferencePipeline:
    folder = write_model(tmp_path_factory.mktemp(request.param), features=request.param)
    return load_pipeline(str(folder), device="cpu")


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "x.png"
    Image.radial_gradient("L").save(path)
    return path


def test_a_caption_is_the_answer_to_the_default_prompt(pipeline, image_path):
    caption = pipeline.caption_image(image_path, config=SHORT)
    assert caption == pipeline.answer_question(image_path, "Describe this image.", SHORT)


def test_an_image_is_the_same_as_path_bytes_and_pil(pipeline, image_path):
    answers = {
        pipeline.caption_image(image, config=SHORT)
        for image in (image_path, str(image_path), image_path.read_bytes(), Image.open(image_path))
    }
    assert len(answers) == 1


def test_a_conversation_remembers_its_turns_and_its_image(pipeline, image_path):
    pipeline.reset()
    first = pipeline.chat("What do you see?", image=image_path, config=SHORT)
    second = pipeline.chat("And where is it?", config=SHORT)
    messages = [user("What do you see?", images=1), *pipeline.messages[1:3]]
    assert pipeline.messages[1].parts == (first,) and pipeline.messages[3].parts == (second,)
    assert pipeline.generate(pipeline.prompt(messages, [image_path]), SHORT).text == second


def test_a_failed_turn_leaves_the_conversation_as_it_was(pipeline, image_path, tmp_path):
    pipeline.reset()
    pipeline.chat("What do you see?", image=image_path, config=SHORT)
    before = list(pipeline.messages)
    with pytest.raises(ImageError):
        pipeline.chat("And here?", image=tmp_path / "missing.png", config=SHORT)
    assert pipeline.messages == before and len(pipeline.images) == 1


def test_the_pieces_of_text_join_to_the_answer(pipeline, image_path):
    pieces = []
    prompt = pipeline.prompt([user("Describe this image.", images=1)], [image_path])
    answer = pipeline.generate(prompt, GenerationConfig(max_new_tokens=40), on_text=pieces.append)
    assert answer.text == "".join(pieces)


def test_an_image_that_was_encoded_once_is_answered_about_as_the_image_itself(pipeline, image_path):
    encoded = pipeline.encode_image(image_path)
    for question in ("What is this?", "What color is it?", "\nWhere?"):
        assert pipeline.answer_question(encoded, question, SHORT) == pipeline.answer_question(
            image_path, question, SHORT
        )
    chats = []
    for image in (image_path, encoded):
        pipeline.reset()
        chats.append([pipeline.chat("What?", image=image, config=SHORT), pipeline.chat("And where?", config=SHORT)])
    assert chats[0] == chats[1]


def test_an_image_is_encoded_once_and_a_turn_reads_only_its_own_words(pipeline, image_path):
    pipeline.reset()
    pipeline.engine.store.clear()
    counters, before = pipeline.engine.counters, pipeline.engine.counters.prompt_tokens
    pipeline.chat("What do you see in this image, and where is it?" * 5, image=image_path, config=SHORT)
    first, again = counters.prompt_tokens - before, counters.prompt_tokens
    pipeline.chat("And?", config=SHORT)
    assert counters.prompt_tokens - again < first / 2


def test_an_interrupted_answer_leaves_the_pipeline_usable(pipeline, image_path):
    def interrupt():
        raise KeyboardInterrupt

    prompt = pipeline.prompt([user("Describe this image.", images=1)], [image_path])
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(prompt, GenerationConfig(max_new_tokens=40, min_new_tokens=40), is_cancelled=interrupt)
    assert pipeline.engine.busy == 0
    assert pipeline.generate(prompt, SHORT).finish_reason in ("stop", "length")


def test_a_prompt_has_one_placeholder_per_visual_token(pipeline, image_path):
    ids = pipeline.prompt([user("Look", images=1)], [image_path]).ids
    assert ids.count(pipeline.model.config.image_token_id) == pipeline.model.config.num_image_tokens
    assert IMAGE in user("Look", images=1).parts


def test_a_model_without_a_processor_is_refused():
    with torch.device("meta"):
        model = MultimodalLLM(MultimodalConfig())
    with pytest.raises(UserError, match="no processor"):
        MultimodalInferencePipeline(model)


def test_the_default_model_is_the_one_trained_last(tmp_path):
    for age, name in enumerate(("newer", "older")):
        checkpoint = tmp_path / name / "checkpoint-epoch-1-step-5"
        checkpoint.mkdir(parents=True)
        config = checkpoint / "config.json"
        config.write_text("{}")
        (tmp_path / name / "best_model").symlink_to(checkpoint.name)
        os.utime(config, (1e9 - age, 1e9 - age))
    assert default_model(tmp_path) == tmp_path / "newer" / "best_model"
