"""Figures of published files, on small stand-ins whose figures transformers computes."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Qwen2ForCausalLM

from mmllm.commands import verify
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import UserError
from official import CLIP, randomise_, write_qwen

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((50, 40), 80).convert("RGB").save(folder / "000000039769.png")
    Image.effect_noise((40, 70), 80).convert("RGB").save(folder / "CLIP.png")
    return folder


@pytest.fixture
def clip(tmp_path, images, monkeypatch):
    """A CLIP that transformers wrote, whose figures are the expected ones for this test."""
    theirs = CLIPModel(CLIPConfig(vision_config=CLIP, text_config=TEXT, projection_dim=48)).eval()
    randomise_(theirs)
    theirs.logit_scale.data.fill_(3.0)
    theirs.save_pretrained(tmp_path / "clip")
    process = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    process.save_pretrained(tmp_path / "clip")

    def logits(name: str, texts: tuple[str, ...]) -> torch.Tensor:
        longest = max(len(verify.TEXTS[text]) for text in texts)
        ids = torch.tensor([(verify.TEXTS[text] + [verify.END] * longest)[:longest] for text in texts])
        pixels = process(Image.open(images / f"{name}.png"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return theirs(input_ids=ids, pixel_values=pixels).logits_per_image[0]

    for constant, of in (("LOGITS", lambda x: x), ("PROBABILITIES", lambda x: x.softmax(0))):
        name, texts, _, tolerance = getattr(verify, constant)
        monkeypatch.setattr(verify, constant, (name, texts, tuple(of(logits(name, texts)).tolist()), tolerance))
    with torch.no_grad():
        pixels = process(Image.open(images / "CLIP.png"), return_tensors="pt")["pixel_values"]
        row = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)[0]
    np.savez(
        tmp_path / "rows.npz", names=["CLIP.png", "absent.jpg"], embeddings=np.stack([(row / row.norm()).numpy()] * 2)
    )
    return tmp_path / "clip"


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    folder = write_qwen(tmp_path / "qwen")
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(verify.PROMPT)])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    monkeypatch.setattr(verify, "SENTENCE", tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    return folder


def test_files_with_the_published_sums_and_figures_are_right(tmp_path, clip, qwen, images, monkeypatch, capsys):
    sums = {}
    for file in (clip / "model.safetensors", qwen / "model.safetensors", qwen / "tokenizer.json"):
        sums[hashlib.sha256(file.read_bytes()).hexdigest()[: 16 if file.suffix == ".json" else None]] = "a stand-in"
    monkeypatch.setattr(verify, "PUBLISHED", sums)
    options = ["--clip", clip, "--qwen", qwen, "--images", images, "--embeddings", tmp_path / "rows.npz"]
    assert verify.main([str(option) for option in options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("right  ") == 7 and printed.endswith("7 checks, 0 wrong\n")
    assert "cosine to 1 embeddings, mean\n       expected  at least 0.95\n       got       1.0000" in printed


def test_another_file_is_wrong_in_its_sum_and_its_figures(clip, qwen, images, monkeypatch, capsys):
    name, texts, (first, second), tolerance = verify.LOGITS
    monkeypatch.setattr(verify, "LOGITS", (name, texts, (first + 2e-3, second), tolerance))
    monkeypatch.setattr(verify, "SENTENCE", "something else")
    assert verify.main(["--clip", str(clip), "--qwen", str(qwen), "--images", str(images)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG  sha256" in printed and "WRONG  logits of 000000039769" in printed and "WRONG  greedy text" in printed
    assert "right  probabilities of CLIP" in printed


def test_an_image_that_is_missing_is_named(clip, tmp_path):
    with pytest.raises(UserError, match="holds no 000000039769.jpg or .png"):
        verify.main(["--clip", str(clip), "--images", str(tmp_path)])


def test_the_published_sums_are_those_of_the_files_that_are_here(shared):
    config = json.loads(shared("qwen2.5/config.json").read_text())
    assert config["vocab_size"] == 151936
    file = shared("qwen2.5/tokenizer.json")  # the official content in other bytes
    (check,) = verify.checksums(file)
    assert not check.is_right and check.got.startswith("unknown: 22bfef58b74d2fa4")
