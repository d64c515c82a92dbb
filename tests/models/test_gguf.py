"""GGUF files against the model they were made from, and against llama.cpp's own multimodal library where it is installed.

pip install llama-cpp-python     # builds llama.cpp, minutes; without it two tests are skipped by name
"""

import gguf
import numpy as np
import pytest
import torch
from llama_cpp_answers import MARK, LlamaCpp
from PIL import Image

from mmllm.commands import convert
from mmllm.data.chat import user
from mmllm.errors import CheckpointError, UserError
from mmllm.models.gguf import write_gguf
from mmllm.models.multimodal import MultimodalLLM
from official import write_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module")
def model(directory):
    return MultimodalLLM.from_pretrained(directory)


def export(directory, folder, kind):
    convert.main(["--model", str(directory), "--gguf", kind, "--out", str(folder)])
    return tuple(gguf.GGUFReader(folder / name) for name in ("model.gguf", "mmproj.gguf"))


def value(reader, name):
    return reader.fields[name].contents()


def stored(reader):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(*reversed(t.shape)) for t in reader.tensors}


def test_the_files_hold_every_weight_and_size_under_the_names_of_the_format(directory, model, tmp_path):
    language, vision = export(directory, tmp_path / "out", "F32")
    tensors, state = stored(language), model.state_dict()
    pairs = {
        "token_embd.weight": "language_model.model.embed_tokens.weight",
        "blk.3.attn_q.bias": "language_model.model.layers.3.self_attn.q_proj.bias",
        "blk.0.ffn_down.weight": "language_model.model.layers.0.mlp.down_proj.weight",
        "output_norm.weight": "language_model.model.norm.weight",
    }
    for theirs, ours in pairs.items():
        assert np.array_equal(tensors[theirs], state[ours].numpy()), theirs
    assert len(tensors) == 4 * 12 + 2, "four layers, the embedding and the last norm; the head is the embedding"
    tensors = stored(vision)
    pairs = {
        "v.patch_embd.weight": "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "v.class_embd": "vision_tower.vision_model.embeddings.class_embedding",
        "v.blk.2.attn_out.bias": "vision_tower.vision_model.encoder.layers.2.self_attn.out_proj.bias",
        "mm.0.weight": "multi_modal_projector.linear_1.weight",
        "mm.2.bias": "multi_modal_projector.linear_2.bias",
    }
    for theirs, ours in pairs.items():
        assert np.array_equal(tensors[theirs], state[ours].numpy()), theirs
    assert not any("post_ln" in name for name in tensors)
    assert value(language, "general.architecture") == "qwen2" and value(vision, "clip.projector_type") == "mlp"
    assert value(language, "qwen2.attention.head_count_kv") == model.config.text.num_key_value_heads
    assert value(vision, "clip.vision.image_size") == 32 and value(vision, "clip.use_gelu") is False


def test_the_vocabulary_is_that_of_the_tokenizer(directory, model, tmp_path):
    language, _ = export(directory, tmp_path / "out", "F16")
    tokens, tokenizer = value(language, "tokenizer.ggml.tokens"), model.processor.tokenizer
    assert len(tokens) == model.config.text.vocab_size
    assert all(tokens[i] == token for token, i in tokenizer.inner.get_vocab().items())
    assert value(language, "tokenizer.ggml.eos_token_id") == tokenizer.id("<|im_end|>")
    kinds = value(language, "tokenizer.ggml.token_type")
    assert kinds[tokenizer.image_id] == 3 and kinds[5] == 1 and kinds[-1] == 5
    assert "<|vision_start|><__media" in value(language, "tokenizer.chat_template")


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_0", 0.3)])
def test_matrices_are_rounded_to_the_kind_and_vectors_are_not(directory, model, tmp_path, kind, error):
    language, _ = export(directory, tmp_path / "out", kind)
    tensors = stored(language)
    weight = model.language_model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    difference = np.abs(tensors["blk.1.ffn_up.weight"] - weight).max() / weight.std()
    assert 0 < difference < error
    norm = model.language_model.model.layers[1].input_layernorm.weight.detach().numpy()
    assert np.array_equal(tensors["blk.1.attn_norm.weight"], norm)


def test_a_model_without_such_a_form_is_refused(directory, tmp_path):
    write_model(tmp_path / "pooled", features="pooled")
    with pytest.raises(CheckpointError, match="pooled features and qwen2 has no GGUF form"):
        export(tmp_path / "pooled", tmp_path / "out", "F32")
    convert.main(["--model", str(directory), "--int8", "--out", str(tmp_path / "int8")])
    with pytest.raises(UserError, match="its weights are int8, to answer with; name the model they came from"):
        export(tmp_path / "int8", tmp_path / "out", "F32")
    assert not (tmp_path / "out").exists()


# llama.cpp -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, prompt, pixels, new_tokens):
    """Logits after the prompt and the ids that follow, without the engine."""
    ids, logits = list(prompt), []
    for _ in range(new_tokens):
        logits.append(model.logits(torch.tensor([ids]), pixels)[0, -1])
        ids.append(int(logits[-1].argmax()))
    return logits[0].numpy(), ids[len(prompt) :]


def class_token_last(tower, pixels_B3SS):
    """`patches` as llama.cpp 0.3.36 computes it (https://github.com/ggml-org/llama.cpp/issues/25814): the class token
    comes last, but positions and the choice of patches are those of a class token that comes first."""
    embeddings = tower.vision_model.embeddings
    x_BND = embeddings.patch_embedding(pixels_B3SS).flatten(2).transpose(1, 2)
    x_BTD = torch.cat([x_BND, embeddings.class_embedding.expand(len(x_BND), 1, -1)], dim=1)
    x_BTD = tower.vision_model.pre_layrnorm(x_BTD + embeddings.position_embedding.weight)
    for layer in tower.vision_model.encoder.layers[:-1]:
        x_BTD = layer(x_BTD)
    return x_BTD[:, 1:]


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_llama_cpp_gives_the_same_greedy_ids(model, tmp_path, kind, monkeypatch):
    pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    write_gguf(model, tmp_path, kind)
    side = model.config.vision.image_size
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image, question = Image.fromarray(noise), "What is it?"
    text = (
        f"<|im_start|>system\n{model.processor.system}<|im_end|>\n<|im_start|>user\n<|vision_start|>{MARK}<|vision_end|>\n"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    theirs, their_ids = LlamaCpp(tmp_path).answer(text, image, 12)
    prompt, pixels = model.processor.encode_prompt([user(question, 1)]), model.processor.image_processor(image)[None]
    ours, our_ids = greedy(model, prompt, pixels, 12)
    tower = model.vision_tower
    monkeypatch.setattr(tower, "patches", lambda pixels: class_token_last(tower, pixels), raising=True)
    shifted, shifted_ids = greedy(model, prompt, pixels, 12)
    errors = [np.abs(theirs - logits).max() / logits.std() for logits in (ours, shifted)]
    assert min(errors) < 5e-3 and max(errors) > 0.05, errors
    assert their_ids == (our_ids if errors[0] < errors[1] else shifted_ids)
