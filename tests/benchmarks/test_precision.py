"""The distances between a model and its roundings."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import precision
from mmllm.models.multimodal import MultimodalLLM
from tiny_run import write_world


def test_distance_is_nothing_from_itself_and_the_divergence_is_that_of_kullback_and_leibler():
    wanted, targets = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    assert precision.distance(wanted, wanted, targets)["divergence"] == 0
    got = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    found = precision.distance(got, wanted, targets)
    p = torch.tensor([1.0, 3.0]).softmax(0)
    assert abs(found["divergence"] - float(p @ (p.log() - p.flip(0).log())) / 2) < 1e-6
    assert found["same_first"] == 0.5


def test_more_bits_are_nearer(tmp_path, capsys):
    world = write_world(tmp_path)
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    model.save_pretrained(tmp_path / "model")
    data = ("--data", world.folder / "val.json", "--image-dir", world.folder / "images", "--limit", 3)
    command.main(["precision", "--model", *map(str, (tmp_path / "model", *data))])
    rows = {row["precision"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    error = {name: row["error"] for name, row in rows.items()}
    assert error["float32"] == 0 and rows["float32"]["same_first"] == 1
    assert error["bfloat16"] < error["int8"] < error["int8-dynamic"] < error["int4"]
    assert rows["int8"]["divergence"] < rows["int4"]["divergence"]
    pytest.importorskip("gguf")
    assert error["int4"] < rows["llama.cpp Q4_0"]["error"]
