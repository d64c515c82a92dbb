"""What `mmllm info` says about each kind of directory."""

import json

import pytest
import torch

from mmllm.commands import convert, info
from mmllm.config.schema import LoraConfig
from mmllm.errors import CheckpointError
from mmllm.layers.lora import add_lora_
from mmllm.models.loading import ModelForm
from mmllm.models.multimodal import MultimodalLLM
from mmllm.storage.weights import read_tensors
from official import write_clip, write_model, write_qwen, write_qwen3, write_siglip


def shown(source, capsys) -> dict[str, str]:
    info.main([str(source)])
    lines = capsys.readouterr().out.splitlines()
    return {line[:16].strip(): line[16:] for line in lines}


def test_a_model_directory_shows_its_towers_weights_and_origin(tmp_path, capsys):
    folder = write_model(tmp_path / "run" / "checkpoint-epoch-1-step-3", vision=write_siglip, text=write_qwen3)
    (folder / "training").mkdir()
    state = {"stage": 2, "step": 3, "epoch": 1, "config": {}, "best": {"name": "x", "val_loss": 0.5}}
    state["data_sha256"] = {"train": "ab12"}
    (folder / "training" / "state.json").write_text(json.dumps(state))
    start = {"command": "python train.py configs/own.py", "time": "2026-11-27T00:00:00+00:00", "commit": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"starts": [start]}))
    (tmp_path / "run" / "best_model").symlink_to(folder)
    got = shown(folder, capsys)
    total = sum(value.numel() for value in read_tensors(folder).values())
    assert got["kind"] == "a model of mmllm" and got["image"] == "16 tokens (patch features)"
    assert got["siglip"].startswith("hidden_size 128") and "head_dim 32" in got["qwen3"]
    assert got["weights"].startswith(f"{total:,} float32; ")
    assert got["trained"] == "stage 2, epoch 1, step 3, val_loss 0.5" and got["train data"] == "sha256 ab12"
    assert got["command"] == "python train.py configs/own.py" and "commit" not in got
    assert shown(tmp_path / "run", capsys) == got | {"kind": got["kind"]}


def test_packed_weights_and_adapters_are_shown(tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    convert.main(["--model", str(folder), "--int4", "--out", str(tmp_path / "int4")])
    capsys.readouterr()
    got = shown(tmp_path / "int4", capsys)
    assert got["stored for"] == "answering in int4" and " uint8, " in got["weights"]
    model = MultimodalLLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules=("q_proj", "v_proj"))
    add_lora_(model.language_model, config)
    model.form = ModelForm(lora=config)
    model.save_pretrained(tmp_path / "lora")
    assert shown(tmp_path / "lora", capsys)["adapters"] == "LoRA r=4, alpha=32: q_proj, v_proj"


@pytest.mark.parametrize("write", [write_clip, write_siglip, write_qwen, write_qwen3])
def test_a_published_model_is_shown(tmp_path, capsys, write):
    got = shown(write(tmp_path), capsys)
    assert got["kind"].startswith("a published model") and "float32" in got["weights"] and len(got) == 3


def test_other_folders_and_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a model nor a run"):
        info.main([str(tmp_path)])
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no vision transformer"):
        info.main([str(tmp_path / "x.pt")])
