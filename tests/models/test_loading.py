"""Model directories: written and read back, joined from two published models, refused where they do not fit."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

from mmllm.data.chat import user
from mmllm.errors import CheckpointError
from mmllm.models.config import MultimodalConfig, Qwen2Config
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.published import language_tensors, vision_tensors
from mmllm.runtime.files import read_json
from mmllm.storage.weights import read_tensors
from official import write_clip, write_model, write_qwen, write_qwen3, write_siglip

OTHERS = {"vision": write_siglip, "text": write_qwen3}


@pytest.fixture(scope="module", params=[{}, OTHERS], ids=["clip-qwen2", "siglip-qwen3"])
def directory(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", **request.param)


def some_pixels(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("towers", [{}, OTHERS], ids=["clip-qwen2", "siglip-qwen3"])
@pytest.mark.parametrize("features", ["patch", "pooled"])
def test_a_saved_model_loads_as_the_same_model(tmp_path, features, towers):
    first = MultimodalLLM.from_pretrained(write_model(tmp_path / "a", features=features, **towers))
    first.save_pretrained(tmp_path / "b")
    second = MultimodalLLM.from_pretrained(tmp_path / "b")
    ids = torch.tensor([first.processor.encode_prompt([user("hm", images=1)])])
    assert torch.equal(first.logits(ids, some_pixels(1)), second.logits(ids, some_pixels(1)))
    assert second.config == first.config and second.processor.system == first.processor.system
    for name in ("config.json", "mmllm.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("write", [write_clip, write_siglip])
def test_images_are_padded_as_transformers_processor_of_the_saved_model_does(tmp_path, write):
    towers = write(tmp_path / "tower"), write_qwen(tmp_path / "qwen")
    model = MultimodalLLM.from_towers(*towers, image_size=48, image_fit="pad")
    model.save_pretrained(tmp_path / "model")
    theirs = AutoProcessor.from_pretrained(tmp_path / "model").image_processor
    images = MultimodalLLM.from_pretrained(tmp_path / "model").processor.image_processor
    image = Image.effect_noise((90, 40), 80).convert("RGB")
    assert images == model.processor.image_processor and images.fit == "pad"
    assert torch.equal(theirs(image, return_tensors="pt")["pixel_values"][0], images(image))


@pytest.mark.parametrize("write, images", [(write_clip, 3), (write_siglip, 1)])
def test_a_tower_takes_images_of_another_size_as_transformers_interpolates_them(tmp_path, write, images):
    tower, qwen = write(tmp_path / "tower"), write_qwen(tmp_path / "qwen")
    model = MultimodalLLM.from_towers(tower, qwen, image_size=48)
    assert (model.config.num_image_tokens, model.processor.image_processor.size) == (36, 48)
    pixels = torch.randn(images, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    kind = {write_clip: CLIPVisionModel, write_siglip: SiglipVisionModel}[write]
    theirs = kind.from_pretrained(tower)(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    wanted = theirs.hidden_states[-2][:, write is write_clip :]
    torch.testing.assert_close(model.vision_features(pixels), wanted, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "model")
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([model.processor.encode_prompt([user("hm", images=1)])])
    found = llava(input_ids=ids, pixel_values=pixels[:1]).logits
    torch.testing.assert_close(model.logits(ids, pixels[:1]), found, atol=1e-4, rtol=0)
    again = MultimodalLLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again.logits(ids, pixels[:1]), model.logits(ids, pixels[:1]))


def test_an_image_size_that_no_whole_patches_fill_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="image_size 50 of patch_size 8"):
        MultimodalLLM.from_towers(write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen"), image_size=50)


def test_the_new_projector_is_drawn_by_its_seed(tmp_path):
    clip, qwen = write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen")
    weights = [
        MultimodalLLM.from_towers(clip, qwen, seed=seed).multi_modal_projector.linear_1.weight for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    clip, qwen = write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen", vocab_size=270)
    with pytest.raises(CheckpointError, match="280 tokens, but the model has 270 rows"):
        MultimodalLLM.from_towers(clip, qwen)


def test_an_image_processor_of_another_size_is_refused(tmp_path):
    clip, qwen = write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen")
    images = json.loads((clip / "preprocessor_config.json").read_text()) | {"size": 48, "crop_size": 48}
    (clip / "preprocessor_config.json").write_text(json.dumps(images))
    with pytest.raises(CheckpointError, match="makes images of 48 pixels, but the vision tower takes 32"):
        MultimodalLLM.from_towers(clip, qwen)


def test_transformers_processor_gives_the_same_ids_and_pixels(directory):
    ours = MultimodalLLM.from_pretrained(directory).processor
    processor = AutoProcessor.from_pretrained(directory)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=text, images=[image], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ours.encode_prompt([user("what is it?", images=1)])
    assert torch.equal(inputs["pixel_values"][0], ours.image_processor(image))
    assert AutoTokenizer.from_pretrained(directory).eos_token == "<|im_end|>"


def test_only_the_vision_tower_is_taken_from_an_old_clip_file(tmp_path):
    """What the main branch of the official repository holds: only pytorch_model.bin, with more than the tower."""
    tensors = read_tensors(write_clip(tmp_path))
    more = {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_model.embeddings.token_embedding.weight": torch.zeros(3, 4),
        "logit_scale": torch.tensor(4.6),
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors | more, tmp_path / "pytorch_model.bin")
    assert vision_tensors(tmp_path).keys() == tensors.keys()


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    folder = write_qwen(tmp_path)
    config = Qwen2Config.from_dict(read_json(folder / "config.json"))
    tensors = read_tensors(folder)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    language_tensors(folder, config)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        language_tensors(folder, config)


def test_a_directory_of_a_later_version_is_refused(tmp_path):
    file = write_model(tmp_path / "saved") / "mmllm.json"
    file.write_text(file.read_text().replace('"surgery": []', '"surgery": ["int2"]'))
    with pytest.raises(CheckpointError, match="written by a newer mmllm"):
        MultimodalLLM.from_pretrained(tmp_path / "saved")


def test_a_directory_that_lost_its_adapters_is_refused(tmp_path):
    file = write_model(tmp_path / "saved") / "mmllm.json"
    file.write_text(file.read_text().replace('"surgery": []', '"surgery": ["lora"]'))
    with pytest.raises(CheckpointError, match="disagree on whether there are adapters"):
        MultimodalLLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "blip"}, "model_type is 'blip'"),
        ({"vision_feature_layer": -1}, "vision_feature_layer is -1"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type is 'llama'"),
        ({"image_token_index": None}, "image_token_index"),
    ],
)
def test_a_directory_of_another_architecture_is_refused(directory, change, named):
    config = json.loads((directory / "config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=named):
        MultimodalConfig.from_dict(config)
