"""SigLIP's vision tower against transformers' on random weights in the official files."""

import pytest
import torch
from transformers import SiglipVisionModel

from mmllm.errors import CheckpointError
from mmllm.models.config import SigLIPVisionConfig
from mmllm.models.published import read_vision
from mmllm.models.siglip import SigLIPVisionTower
from mmllm.storage.weights import load_strict_
from official import write_siglip

VARIANTS = {
    "plain": {},
    "loose norm": {"layer_norm_eps": 1e-2},
    "heads of 32, deeper": {"num_attention_heads": 4, "num_hidden_layers": 5},
    "other sizes": {"image_size": 48, "patch_size": 16, "hidden_size": 96, "intermediate_size": 200},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_patches_and_embedding_are_those_of_transformers(tmp_path, overrides):
    source = read_vision(write_siglip(tmp_path, **overrides))
    ours = SigLIPVisionTower(source.config, with_projection=True).eval()
    load_strict_(ours, source.tensors, tmp_path)
    theirs = SiglipVisionModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    side = ours.config.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    wanted = theirs(pixels, output_hidden_states=True)
    for name, got, reference in (
        ("patches", ours.patches(pixels), wanted.hidden_states[-2]),
        ("pooled", ours.pooled(pixels), wanted.pooler_output[:, None]),
    ):
        assert got.shape == reference.shape, name
        assert reference.std() > 0.5
        assert (got - reference).abs().max() < 1e-4 * max(1, reference.std()), name


def test_the_tower_that_transformers_saves_by_itself_is_read(tmp_path):
    written = read_vision(write_siglip(tmp_path / "a"))
    SiglipVisionModel.from_pretrained(tmp_path / "a", dtype=torch.float32).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "preprocessor_config.json").write_bytes(
        (tmp_path / "a" / "preprocessor_config.json").read_bytes()
    )
    again = read_vision(tmp_path / "b")
    assert again.config == written.config and again.images == written.images
    assert again.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in written.tensors.items())


def test_absent_fields_mean_b_16_and_a_tower_without_its_head_is_refused():
    assert SigLIPVisionConfig.from_dict({"model_type": "siglip", "vision_config": {}}).num_patches == 196
    with pytest.raises(CheckpointError, match="vision_use_head is False"):
        SigLIPVisionConfig.from_dict({"vision_use_head": False})
