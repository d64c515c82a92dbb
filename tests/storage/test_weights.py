"""Files of weights: every official layout is read, and every kind of damage is named."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmllm.errors import CheckpointError
from mmllm.storage.weights import load_strict_, read_tensors, refuse_not_finite
from official import write_qwen

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605247071\n"


def test_the_three_layouts_hold_the_same_tensors(tmp_path):
    whole = read_tensors(write_qwen(tmp_path / "a"))
    shards = read_tensors(write_qwen(tmp_path / "b", shards=3))
    (tmp_path / "c").mkdir()
    torch.save(whole, tmp_path / "c" / "pytorch_model.bin")
    pickled = read_tensors(tmp_path / "c")
    assert whole.keys() == shards.keys() == pickled.keys()
    assert all(torch.equal(whole[name], other[name]) for other in (shards, pickled) for name in whole)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        pickle.dump({"a": Evil()}, file)
    with pytest.raises(CheckpointError, match="not a plain file of tensors"):
        read_tensors(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain file of tensors"):
        read_tensors(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": "text"}, {"a": {"b": torch.zeros(1)}}], ids=str)
def test_a_bin_that_holds_no_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="something other than named tensors"):
        read_tensors(tmp_path)


def damaged(data: bytes) -> dict[str, bytes]:
    return {
        "cut off": data[: len(data) // 2],
        "header only": data[:40],
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "huge header": b"\xff" * 7 + b"\x7f" + data[8:],
        "a name twice": (lambda h: len(h).to_bytes(8, "little") + h + bytes(8))(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
        ),
    }


@pytest.mark.parametrize("kind", ["cut off", "header only", "empty", "html", "huge header", "a name twice"])
def test_a_damaged_safetensors_file_is_named(tmp_path, kind):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    data = damaged((tmp_path / "model.safetensors").read_bytes())[kind]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: \d+ bytes that are not a whole safetensors file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match="Git LFS pointer.*git lfs pull"):
        read_tensors(tmp_path)


def test_an_index_that_names_other_files_is_refused(tmp_path):
    write_qwen(tmp_path, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    for name, named in (
        ("../outside.safetensors", "not a plain file name"),
        ("absent.safetensors", "missing, but model.safetensors.index.json names it"),
    ):
        changed = {"weight_map": index["weight_map"] | {first: name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=named):
            read_tensors(tmp_path)
    shard = index["weight_map"][first]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"nowhere": shard}}))
    with pytest.raises(CheckpointError, match="1 tensors are in no shard, first nowhere"):
        read_tensors(tmp_path)


def test_a_folder_without_weights_says_what_it_needs(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"it needs model.safetensors, its shards and index, or pytorch_model.bin"
    ):
        read_tensors(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_all_named():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tensors = dict(module.state_dict())
    tensors["extra"] = tensors.pop("0.bias")
    tensors["1.weight"] = torch.zeros(4, 2)
    with pytest.raises(CheckpointError) as caught:
        load_strict_(module, tensors, Path("folder"))
    message = str(caught.value)
    for part in ("folder", "0.bias", "extra", "1.weight", "[4, 2]", "[2, 4]"):
        assert part in message, message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    with pytest.raises(CheckpointError, match="deep.down"):
        refuse_not_finite({"fine": torch.ones(3), "deep.down": torch.tensor([1.0, value])}, "folder")
