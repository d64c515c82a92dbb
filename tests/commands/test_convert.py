"""Two published models to one directory, from the command line, and every way in which that is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from mmllm.commands import convert as command
from mmllm.errors import CheckpointError, UserError
from mmllm.models.multimodal import MultimodalLLM
from official import write_clip, write_qwen


@pytest.fixture
def sources(tmp_path):
    return write_clip(tmp_path / "clip"), write_qwen(tmp_path / "qwen", shards=2)


def convert(*arguments):
    command.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("features", ["patch", "pooled"])
def test_the_directory_holds_every_weight_of_both(sources, tmp_path, capsys, features):
    clip, qwen = sources
    out = tmp_path / "out"
    convert("--clip", clip, "--qwen", qwen, "--out", out, "--features", features, "--check")
    tensors = load_file(out / "model.safetensors")
    for name, value in load_file(clip / "model.safetensors").items():
        if features == "pooled" or not name.startswith("visual_projection"):
            assert torch.equal(tensors[f"vision_tower.{name}"], value), name
    for shard in qwen.glob("*.safetensors"):
        for name, value in load_file(shard).items():
            assert torch.equal(tensors[f"language_model.{name}"], value), name
    assert "language_model.lm_head.weight" not in tensors, "the head is the embedding"
    assert f"{sum(v.numel() for v in tensors.values()):,} parameters" in capsys.readouterr().out
    MultimodalLLM.from_pretrained(out)


def test_every_tensor_keeps_its_dtype_unless_another_is_asked_for(sources, tmp_path):
    clip, qwen = sources
    for shard in qwen.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(shard).items()}, shard, {"format": "pt"})
    convert("--clip", clip, "--qwen", qwen, "--out", tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert {v.dtype for name, v in kept.items() if name.startswith("language_model")} == {torch.bfloat16}
    assert {v.dtype for name, v in kept.items() if not name.startswith("language_model")} == {torch.float32}
    convert("--clip", clip, "--qwen", qwen, "--out", tmp_path / "half", "--dtype", "bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {v.dtype for v in half.values()} == {torch.bfloat16}


def test_an_existing_directory_is_replaced_only_with_force(sources, tmp_path):
    clip, qwen = sources
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="exists already.*--force"):
        convert("--clip", clip, "--qwen", qwen, "--out", out)
    assert (out / "precious").exists()
    convert("--clip", clip, "--qwen", qwen, "--out", out, "--force")
    assert not (out / "precious").exists() and (out / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["clip", "qwen", "."])
def test_a_source_is_never_written_over(sources, tmp_path, place):
    clip, qwen = sources
    with pytest.raises(UserError, match="choose another directory"):
        convert("--clip", clip, "--qwen", qwen, "--out", tmp_path / place, "--force")
    MultimodalLLM.from_towers(clip, qwen)


def changed_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("side", "fields", "named"),
    [
        (0, {"model_type": "blip"}, "model_type is 'blip'"),
        (1, {"model_type": "llama"}, "model_type is 'llama'"),
        (0, {"model_type": "siglip2"}, "model_type is 'siglip2'"),
        (1, {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        (1, {"quantization_config": {"quant_method": "awq"}}, "a quantised model"),
        (1, {"hidden_size": 128}, r"model.embed_tokens.weight .*\[512, 64\].*\[512, 128\]"),
        (1, {"num_hidden_layers": 5}, "model.layers.4"),
        (1, {"num_hidden_layers": 3}, "model.layers.3"),
    ],
)
def test_another_model_is_refused_with_what_differs(sources, tmp_path, side, fields, named):
    changed_config(sources[side], **fields)
    with pytest.raises(CheckpointError, match=named):
        convert("--clip", sources[0], "--qwen", sources[1], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [0, 1])
def test_a_folder_without_a_model_is_refused(sources, tmp_path, side):
    (tmp_path / "empty").mkdir()
    clip, qwen = (tmp_path / "empty" if i == side else source for i, source in enumerate(sources))
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        convert("--clip", clip, "--qwen", qwen, "--out", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused_by_name(sources, tmp_path):
    clip, qwen = sources
    tensors = load_file(clip / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        convert("--clip", clip, "--qwen", qwen, "--out", tmp_path / "out", "--check")


def test_weights_that_are_no_plain_numbers_are_refused_by_name(sources, tmp_path):
    clip, qwen = sources
    tensors = load_file(clip / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is int8; use the model with plain weights"):
        convert("--clip", clip, "--qwen", qwen, "--out", tmp_path / "out")


@pytest.mark.slow
def test_a_missing_source_is_one_line_and_code_2(tmp_path):
    command = [sys.executable, ROOT / "convert_weights.py", "--clip", "./nowhere", "--qwen", "./q", "--out", "o"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: ./nowhere: no such folder; name a folder with config.json and model.safetensors\n"


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_no_directory_that_loads(tmp_path):
    clip = write_clip(tmp_path / "clip")
    qwen = write_qwen(tmp_path / "qwen", vocab_size=100_000, hidden_size=256)  # large enough to be caught writing
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "convert_weights.py", "--clip", clip, "--qwen", qwen, "--out", out]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out*")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() or MultimodalLLM.from_pretrained(out)
    convert("--clip", clip, "--qwen", qwen, "--out", out, "--force")
    MultimodalLLM.from_pretrained(out)
