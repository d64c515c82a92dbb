"""CLIPScore, against the formula written out."""

import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from mmllm.data.image import ImageProcessor
from mmllm.errors import UserError
from mmllm.evaluation.clip_score import clip_scores

VOCABULARY = {word: i for i, word in enumerate(["<s>", "</s>", "A", "photo", "depicts", "a", "red", "blue", "square"])}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CAPTIONS = ["a red square", "a blue square", "square"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of random weights with both towers and a tokenizer of a few words, in a folder; and three images."""
    folder = tmp_path_factory.mktemp("clip")
    text = SIZES | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 77, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, "square"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    images = [folder / f"{colour}.png" for colour in ("red", "blue", "green")]
    for path in images:
        Image.effect_noise((40, 40), 90).save(path)
    return folder, model, images


def test_each_caption_has_two_and_a_half_times_its_cosine(clip, monkeypatch):
    folder, model, images = clip
    monkeypatch.setattr("mmllm.evaluation.clip_score.BATCH", 2)
    expected = []
    for path, caption in zip(images, CAPTIONS, strict=True):
        ids = [0, *(VOCABULARY[word] for word in f"A photo depicts {caption}".split(" ")), 1]
        with torch.no_grad():
            text = model.get_text_features(torch.tensor([ids])).pooler_output[0]
            image = model.get_image_features(ImageProcessor(32)(path)[None]).pooler_output[0]
        expected.append(2.5 * max(0.0, (text @ image / text.norm() / image.norm()).item()))
    assert list(clip_scores(str(folder), images, CAPTIONS, "cpu")) == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 0


def test_without_transformers_or_a_text_tower_one_line_says_so(clip, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no CLIP with its text tower and tokenizer"):
        list(clip_scores(str(tmp_path), [], [], "cpu"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="CLIPScore needs transformers: pip install transformers"):
        list(clip_scores(str(clip[0]), [], [], "cpu"))
