"""The vision tower against transformers' on random weights in the official files."""

import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from mmllm.errors import CheckpointError
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig
from mmllm.models.published import vision_tensors
from mmllm.runtime.files import read_json
from mmllm.storage.weights import load_strict_
from official import write_clip

VARIANTS = {
    "plain": {},
    "exact gelu": {"hidden_act": "gelu"},
    "loose norm": {"layer_norm_eps": 1e-2},
    "heads of 32, deeper": {"num_attention_heads": 4, "num_hidden_layers": 5},
    "other sizes": {"image_size": 48, "patch_size": 16, "hidden_size": 96, "intermediate_size": 200},
}


def towers(folder, **overrides) -> tuple[CLIPVisionTower, CLIPVisionModelWithProjection]:
    """Ours and theirs, both read from one official folder."""
    write_clip(folder, **overrides)
    ours = CLIPVisionTower(CLIPVisionConfig.from_dict(read_json(folder / "config.json")), with_projection=True)
    load_strict_(ours, vision_tensors(folder), folder)
    theirs = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_patches_and_embedding_are_those_of_transformers(tmp_path, overrides):
    ours, theirs = towers(tmp_path, **overrides)
    side = ours.config.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    wanted = theirs(pixels, output_hidden_states=True)
    for name, got, reference in (
        ("patches", ours.patches(pixels), wanted.hidden_states[-2][:, 1:]),
        ("pooled", ours.pooled(pixels), wanted.image_embeds[:, None]),
    ):
        assert got.shape == reference.shape, name
        assert reference.std() > 0.5
        assert (got - reference).abs().max() < 1e-4 * max(1, reference.std()), name


def test_no_images_give_no_features(tmp_path):
    ours, _ = towers(tmp_path)
    assert ours.patches(torch.zeros(0, 3, 32, 32)).shape == (0, 16, 128)
    assert ours.pooled(torch.zeros(0, 3, 32, 32)).shape == (0, 1, 48)


def test_absent_fields_mean_vit_b_32():
    config = CLIPVisionConfig.from_dict({"model_type": "clip", "projection_dim": 512, "vision_config": {}})
    assert config == CLIPVisionConfig()
    assert config.num_patches == 49


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"patch_size": 5}, "patch_size"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        CLIPVisionConfig.from_dict(changes)
