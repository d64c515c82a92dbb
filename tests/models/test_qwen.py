"""The language model against transformers' on random weights in the official files."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2ForCausalLM

from mmllm.errors import CheckpointError
from mmllm.models.config import Qwen2Config
from mmllm.models.published import language_tensors
from mmllm.models.qwen import Qwen2, SwiGLU
from mmllm.runtime.files import read_json
from mmllm.storage.weights import load_strict_
from official import write_qwen

VARIANTS = {
    "plain": {},
    "one key head": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 96},
    "a key head each": {"num_key_value_heads": 4},
    "own head size": {"head_dim": 32},
    "untied head": {"tie_word_embeddings": False},
    "three shards": {"shards": 3},
    "loose norm, short rope": {"rms_norm_eps": 1e-2, "rope_theta": 1e4},
}


def load(folder) -> Qwen2:
    config = Qwen2Config.from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        ours = Qwen2(config)
    load_strict_(ours, language_tensors(folder, config), folder)
    ours.tie_weights()
    return ours.eval()


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, overrides):
    ours = load(write_qwen(tmp_path, **overrides))
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = some_ids(2, 50)
    wanted = theirs(ids).logits
    assert wanted.std() > 2
    assert (ours.logits(ours(ours.embed(ids))) - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_a_model_that_transformers_saved_is_read(tmp_path):
    write_qwen(tmp_path / "a")
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "rope_theta" not in written, "the newer form, with rope_parameters"
    ours, ids = load(tmp_path / "b"), some_ids(1, 20)
    assert (ours.logits(ours(ours.embed(ids))) - theirs(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(tmp_path):
    ours = load(write_qwen(tmp_path))
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, pads = some_ids(1, 20), 7
    padded = torch.cat([torch.full((1, pads), 3), ids], 1)
    mask = (torch.arange(20 + pads) >= pads).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    look = torch.ones(20 + pads, 20 + pads).tril().bool() & (mask.bool() | torch.eye(20 + pads).bool())
    got = ours.logits(ours(ours.embed(padded), positions, attend_BTS=look[None]))[:, pads:]
    wanted = theirs(padded, attention_mask=mask, position_ids=positions).logits[:, pads:]
    alone = ours.logits(ours(ours.embed(ids)))
    assert (got - wanted).abs().max() < 1e-4
    assert (got - alone).abs().max() < 1e-4


def test_a_sliding_window_that_is_off_is_read_and_one_that_is_on_refused():
    plain = {"vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2, "sliding_window": 4}
    Qwen2Config.from_dict(plain | {"use_sliding_window": False})
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        Qwen2Config.from_dict(plain | {"use_sliding_window": True})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": None, "hidden_size": None}, "vocab_size is missing"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes, named):
    config = {"vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2} | changes
    config = {name: value for name, value in config.items() if value is not None}
    with pytest.raises(CheckpointError, match=named):
        Qwen2Config.from_dict(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_gives_the_bits_of_autograd(dtype):
    gate, up, of_y = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate.requires_grad_()
    up = up.clone().requires_grad_()
    plain, ours = F.silu(gate) * up, SwiGLU.apply(gate, up)
    assert torch.equal(ours, plain)
    wanted, got = (torch.autograd.grad(y, [gate, up], of_y) for y in (plain, ours))
    assert all(map(torch.equal, got, wanted))


def test_kept_positions_are_rows_of_the_whole_also_when_one_is_kept_twice():
    model = Qwen2(Qwen2Config(64, 32, 48, 2, 4, 2, 8))
    x_BTD = torch.randn(2, 7, 32)
    keep = torch.tensor([1, 0, 0]), torch.tensor([6, 2, 2])
    with torch.no_grad():
        torch.testing.assert_close(model(x_BTD, keep=keep), model(x_BTD)[keep])
