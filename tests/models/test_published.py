"""Published models in every layout: the same tensors and pixels from each, and odd files told in one line."""

import json
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoProcessor, CLIPConfig, CLIPVisionModel, LlavaForConditionalGeneration

from conftest import ROOT
from mmllm.data.chat import user
from mmllm.data.processor_files import load_image_processor, load_processor
from mmllm.errors import CheckpointError
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.loading import read_info
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.published import openai_tower, read_vision, text_config, vision_config
from mmllm.storage.weights import load_strict_, read_tensors
from official import CLIP, QWEN, write_clip, write_model, write_qwen, write_qwen3, write_siglip

HEADS_OF_64 = {"num_attention_heads": 2}


def openai_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of transformers under OpenAI's names, and a little of the text tower."""
    out = {"logit_scale": torch.tensor(4.6), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        name = name.removeprefix("vision_model.")
        for theirs, openai in (
            ("visual_projection.weight", "proj"),
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("embeddings.patch_embedding", "conv1"),
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("encoder.layers", "transformer.resblocks"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
        ):
            name = name.replace(theirs, openai)
        if any(f".attn.{part}_proj" in name for part in "qkv"):
            layer, _, part = name.partition(".attn.")
            packed.setdefault(f"visual.{layer}.attn.in_proj_{part[7:]}", {})[part[0]] = value
        else:
            out[f"visual.{name}"] = value.T.contiguous() if name == "proj" else value
    return out | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in packed.items()}


class Tree(nn.Module):
    """A module whose state dict is `tensors`."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, value in tensors.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(last, value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale


def assert_same_tower(source, folder):
    """`source` is read as the tower of `folder`, a CLIP that transformers wrote."""
    got, wanted = read_vision(source), read_vision(folder)
    assert got.config == wanted.config and got.images == wanted.images
    assert got.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(got.tensors[name].float(), value) for name, value in wanted.tensors.items())


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip", **HEADS_OF_64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_file_is_read_as_an_archive_and_as_a_state_dict(tmp_path, clip):
    tensors = openai_names(read_tensors(clip)) | {"input_resolution": torch.tensor(32)}
    torch.jit.save(torch.jit.trace(Tree(tensors), torch.ones(1)), tmp_path / "archive.pt")
    torch.save(tensors, tmp_path / "tensors.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in tensors.items()}}, tmp_path / "training.pt")
    for name in ("archive.pt", "tensors.pt", "training.pt"):
        assert_same_tower(tmp_path / name, clip)
        assert vision_config(tmp_path / name) == vision_config(clip)
    broken = (tmp_path / "archive.pt").read_bytes().replace(b"/data.pkl", b"/date.pkl")
    (tmp_path / "archive.pt").write_bytes(broken)
    with pytest.raises(CheckpointError, match="archive.pt: a broken TorchScript archive; download it again"):
        read_vision(tmp_path / "archive.pt")


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_folder_of_open_clip_is_read(tmp_path, name, activation):
    clip = write_clip(tmp_path / "clip", hidden_act=activation, **HEADS_OF_64)
    folder = tmp_path / "open_clip"
    folder.mkdir()
    tensors = openai_names(read_tensors(clip))
    save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)
    vision = {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8}
    model = {"embed_dim": 48, "vision_cfg": vision, "quick_gelu": activation == "quick_gelu", "text_cfg": {}}
    images = read_vision(clip).images
    pixels = {"mean": images.mean, "std": images.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    assert_same_tower(folder, clip)
    (folder / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')  # of timm
    save_file({"blocks.0.norm1.weight": torch.ones(4)}, folder / "model.safetensors")
    assert_same_tower(folder, clip)
    for change, named in (
        ({"vision_cfg": vision | {"timm_model_name": "vit_large"}}, "timm_model_name is 'vit_large'"),
        ({"vision_cfg": vision | {"pool_type": "avg"}}, "pool_type is 'avg'"),
        ({"vision_cfg": [1]}, "must be groups of settings"),
    ):
        file.write_text(json.dumps({"model_cfg": model | change}))
        with pytest.raises(CheckpointError, match=named):
            read_vision(folder)


def test_the_names_and_shapes_of_openais_vit_b_32_become_ours(shared):
    layouts = json.loads(shared("layouts/state_dict_layouts.json").read_text())
    theirs = {n: torch.empty(s, device="meta") for n, s in layouts["openai_clip_vit_b32_and_open_clip"].items()}
    config, tensors = openai_tower(theirs, "quick_gelu", ROOT)
    assert config == CLIPVisionConfig()
    with torch.device("meta"):
        load_strict_(CLIPVisionTower(config, with_projection=True), tensors, "ViT-B-32.pt")


def test_the_tower_alone_as_transformers_5_writes_it_is_read_with_its_processor_file(tmp_path):
    clip = write_clip(tmp_path / "clip")
    tower = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32)
    tower.save_pretrained(tmp_path / "tower")
    images = read_vision(clip).images.to_dict()
    (tmp_path / "tower" / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    got, wanted = read_vision(tmp_path / "tower"), read_vision(clip)
    assert got.config == wanted.config and got.images == wanted.images
    wanted.tensors.pop("visual_projection.weight")
    assert got.tensors.keys() == wanted.tensors.keys()
    MultimodalLLM.from_towers(tmp_path / "tower", write_qwen(tmp_path / "qwen"))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_of_both_kinds_are_read(tmp_path, index):
    whole = read_tensors(write_qwen(tmp_path / "whole"))
    folder = write_qwen(tmp_path / "shards", shards=2)
    if index.startswith("pytorch"):
        for shard in folder.glob("*.safetensors*"):
            shard.unlink()
        weight_map = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(whole)}
        for shard in set(weight_map.values()):
            torch.save({name: whole[name] for name in whole if weight_map[name] == shard}, folder / shard)
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    got = read_tensors(folder)
    assert got.keys() == whole.keys() and all(torch.equal(got[name], value) for name, value in whole.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    save_file({f"{prefix}a.weight": torch.ones(2), f"{prefix}b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path).keys() == {"a.weight", "b"}


SPELLINGS = {
    "as published": {},
    "as transformers 4 held it": {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
    "as transformers 5 holds it": {
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_a_llava_folder_without_our_file_is_read_in_each_spelling(tmp_path, spelling, is_tied):
    folder = write_model(tmp_path / "model", tie_word_embeddings=is_tied)
    wanted = MultimodalLLM.from_pretrained(folder)
    (folder / "mmllm.json").unlink()
    tensors = {}
    for name, value in read_tensors(folder).items():
        for ours, theirs in spelling.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    got = MultimodalLLM.from_pretrained(folder)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in got.state_dict().items())


@pytest.mark.parametrize(
    "towers", [{}, {"vision": write_siglip, "text": write_qwen3}], ids=["clip-qwen2", "siglip-qwen3"]
)
def test_what_transformers_saved_of_our_model_is_the_same_model(tmp_path, towers):
    folder = write_model(tmp_path / "ours", **towers)
    LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists(), "processor_config.json has its settings"
    ours, again = (MultimodalLLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert again.processor.image_processor == ours.processor.image_processor
    turns = [user("what is it?", images=1)]
    assert again.processor.encode_prompt(turns) == ours.processor.encode_prompt(turns)
    assert again.config == ours.config
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in again.state_dict().items())


def test_an_image_token_of_another_tokenizer_is_refused(tmp_path):
    file = write_model(tmp_path / "model") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_index": 7}))
    with pytest.raises(CheckpointError, match="<|image_pad|> is token .*image_token_index 7"):
        MultimodalLLM.from_pretrained(tmp_path / "model")


# Fields that change the numbers ---------------------------------------------------------------------------------------


def test_vision_config_dict_wins_as_in_transformers(tmp_path):
    content = {"model_type": "clip", "vision_config": CLIP, "vision_config_dict": CLIP | {"hidden_act": "gelu"}}
    theirs = CLIPConfig.from_dict(deepcopy(content)).vision_config
    ours = CLIPVisionConfig.from_dict(content)
    assert ours.hidden_act == theirs.hidden_act == "gelu" and ours.hidden_size == theirs.hidden_size == 128


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"use_mrope": True}, "use_mrope is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ],
)
def test_settings_of_another_arithmetic_are_refused_by_name(change, named):
    with pytest.raises(CheckpointError, match=named):
        Qwen2Config.from_dict(QWEN | change)


# Files that hold anything ---------------------------------------------------------------------------------------------

ODD = ["x", None, 0, -1, 1.5, True, ["x"], {"x": "y"}, 10**12]


def odd_versions(content: dict):
    """`content` with each of its fields, those of groups in it too, replaced by each odd value or taken out."""
    for name, value in content.items():
        for odd in ODD:
            yield content | {name: odd}
        yield {other: kept for other, kept in content.items() if other != name}
        if isinstance(value, dict):
            yield from (content | {name: version} for version in odd_versions(value))


def read_all(folder):
    info = read_info(folder)
    load_processor(folder, info.config.num_image_tokens, info.system_prompt)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model/config.json", read_all),
        ("model/mmllm.json", read_all),
        ("model/preprocessor_config.json", read_all),
        ("clip/config.json", vision_config),
        ("clip/preprocessor_config.json", load_image_processor),
        ("siglip/config.json", vision_config),
        ("siglip/preprocessor_config.json", load_image_processor),
        ("qwen/config.json", text_config),
        ("qwen3/config.json", text_config),
        ("qwen/model.safetensors.index.json", read_tensors),
    ],
)
def test_any_odd_value_in_a_file_is_read_or_told_in_one_line(tmp_path, name, read):
    write_model(tmp_path / "model")
    write_clip(tmp_path / "clip")
    write_siglip(tmp_path / "siglip")
    write_qwen(tmp_path / "qwen", shards=2, num_hidden_layers=1)
    write_qwen3(tmp_path / "qwen3")
    file = tmp_path / name
    read(file.parent)
    told = 0
    for version in odd_versions(json.loads(file.read_text())):
        file.write_text(json.dumps(version))
        try:
            read(file.parent)
        except CheckpointError as error:
            assert "\n" not in str(error) and file.name in str(error) and "Input should" not in str(error)
            told += 1
    assert told > 5


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", '"x"', "", "{", "[" * 100_000, '{"a": ' * 100_000, "\0", "\ud800"]
)
def test_what_is_not_a_json_object_is_told_in_one_line(tmp_path, content):
    file = write_clip(tmp_path) / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="config.json: not .*JSON"):
        vision_config(tmp_path)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    folder = write_model(tmp_path / "model")
    for name in ("config.json", "mmllm.json", "preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    MultimodalLLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.json").read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize(
    "name", ["config.json", "mmllm.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_folder_in_the_place_of_a_file_is_told(tmp_path, name):
    folder = write_model(tmp_path / "model")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read .Is a directory."):
        MultimodalLLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "mmllm.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_file_that_may_not_be_read_is_told(name):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, which only its owner may enter
        os.chmod(place, 0o755)
        folder = write_model(Path(place) / "model")
        MultimodalLLM.from_pretrained(folder)
        (folder / name).chmod(0)
        try:
            os.seteuid(user or 65534)  # root may read every file
            with pytest.raises(CheckpointError, match=f"{name}: cannot be read .Permission denied."):
                MultimodalLLM.from_pretrained(folder)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_plain_numbers_are_told(tmp_path, dtype):
    folder = write_model(tmp_path / "model")
    tensors = read_tensors(folder)
    name = "language_model.model.norm.weight"
    save_file(tensors | {name: torch.ones(64).to(dtype)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is .*; use the model with plain weights"):
        MultimodalLLM.from_pretrained(folder)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_have_the_mode_of_the_other_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = write_model(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
