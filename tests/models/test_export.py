"""Forms of a trained model for others: merged adapters, the language model alone, GGUF files for llama.cpp."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm.commands import convert
from mmllm.data.chat import user
from mmllm.errors import UserError
from mmllm.models.loading import ModelForm
from mmllm.models.multimodal import MultimodalLLM
from official import add_adapters, write_clip, write_model


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model directory whose adapters are not zero."""
    folder = tmp_path_factory.mktemp("adapted")
    return add_adapters(write_model(folder / "base"), folder / "adapted")


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def logits(model):
    ids = torch.arange(1, 40).remainder(250)[None]
    return model.logits(ids, torch.empty(0, 3, 32, 32))


def test_merged_weights_answer_as_base_and_adapters_did(adapted, tmp_path, capsys):
    run("--model", adapted, "--merge", "--out", tmp_path / "merged")
    assert "best tokens the same" in capsys.readouterr().err
    merged, before = MultimodalLLM.from_pretrained(tmp_path / "merged"), MultimodalLLM.from_pretrained(adapted)
    assert merged.form == ModelForm() and not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(merged), logits(before), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(MultimodalLLM.from_pretrained(adapted.parent / "base")), atol=0.1)


def test_merged_weights_of_a_bfloat16_base_are_stored_in_float32_unless_asked(adapted, tmp_path, capsys):
    half = MultimodalLLM.from_pretrained(adapted).bfloat16()
    half.save_pretrained(tmp_path / "half")
    before = logits(MultimodalLLM.from_pretrained(tmp_path / "half"))
    for dtype, tolerance in ((None, 1e-3), ("bfloat16", 0.5)):
        out = tmp_path / f"merged-{dtype}"
        run("--model", tmp_path / "half", "--merge", "--out", out, *(("--dtype", dtype) if dtype else ()))
        weight = load_file(out / "model.safetensors")["language_model.model.layers.0.self_attn.q_proj.weight"]
        assert weight.dtype == (torch.bfloat16 if dtype else torch.float32)
        torch.testing.assert_close(logits(MultimodalLLM.from_pretrained(out)), before, rtol=0, atol=tolerance)


def test_transformers_reads_the_language_model_alone(adapted, tmp_path):
    run("--model", adapted, "--language-model", "--out", tmp_path / "qwen")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    ours = MultimodalLLM.from_pretrained(adapted)
    ids = torch.arange(1, 40).remainder(250)[None]
    torch.testing.assert_close(theirs(ids).logits, logits(ours), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    chat = [{"role": "user", "content": "What is this?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == ours.processor.encode_prompt([user("What is this?")])


def test_it_is_joined_to_an_image_encoder_again(adapted, tmp_path):
    run("--model", adapted, "--language-model", "--out", tmp_path / "qwen")
    again = MultimodalLLM.from_towers(write_clip(tmp_path / "clip"), tmp_path / "qwen")
    torch.testing.assert_close(logits(again), logits(MultimodalLLM.from_pretrained(adapted)), rtol=1e-4, atol=1e-4)


def test_a_model_without_adapters_has_none_to_merge(adapted, tmp_path):
    with pytest.raises(UserError, match="has no adapters to merge"):
        run("--model", adapted.parent / "base", "--merge", "--out", tmp_path / "x")


@pytest.mark.parametrize("form", [["--merge"], ["--language-model"], ["--gguf", "F16"]])
def test_two_towers_have_no_such_form(form, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(*form, "--out", tmp_path / "x")
    assert f"{form[0]} needs --model DIR" in capsys.readouterr().err
