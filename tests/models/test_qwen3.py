"""Qwen3 against transformers' on random weights in the official files."""

import pytest
import torch
from transformers import Qwen3ForCausalLM

from mmllm.errors import CheckpointError
from mmllm.models.config import Qwen3Config
from mmllm.models.published import language_tensors, text_config
from mmllm.models.qwen3 import Qwen3
from mmllm.storage.weights import load_strict_
from official import write_qwen3

VARIANTS = {
    "plain": {},
    "a key head each": {"num_key_value_heads": 4},
    "untied head": {"tie_word_embeddings": False},
    "loose norm, short rope": {"rms_norm_eps": 1e-2, "rope_theta": 1e4},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, overrides):
    config = text_config(write_qwen3(tmp_path, **overrides))
    ours = Qwen3(config).eval()
    load_strict_(ours, language_tensors(tmp_path, config), tmp_path)
    ours.tie_weights()
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 512, (2, 50), generator=torch.Generator().manual_seed(0))
    wanted = theirs(ids).logits
    assert wanted.std() > 2
    assert (ours.logits(ours(ours.embed(ids))) - wanted).abs().max() < 1e-4


def test_absent_fields_mean_what_transformers_takes_for_them():
    config = Qwen3Config.from_dict({"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4})
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (128, 4, 10000.0)


def test_biases_are_refused():
    with pytest.raises(CheckpointError, match="attention_bias is True"):
        Qwen3Config.from_dict({"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "attention_bias": True})
