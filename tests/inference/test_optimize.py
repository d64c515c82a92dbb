"""Models prepared for answering: against the formulas, in every precision, from every kind of directory."""

import json
import shutil
from functools import partial
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from mmllm.commands import convert
from mmllm.config.schema import PRECISIONS, ExperimentConfig, LoraConfig
from mmllm.data.batches import ordered_batches
from mmllm.data.samples import load_samples
from mmllm.errors import CheckpointError, ConfigError, ImageError, UserError
from mmllm.inference.model_runner import ModelRunner, Piece
from mmllm.inference.optimize import load_model
from mmllm.inference.packed_copy import packed_copy
from mmllm.inference.pipeline import load_pipeline
from mmllm.kernels import cpu as kernels
from mmllm.kernels.reference import int4_linear, int4_matrix, int8_linear, quantize_int4, quantize_int8
from mmllm.layers.lora import adapters, add_lora_, merge_lora_
from mmllm.layers.packed import Int4Packed, Int8Packed
from mmllm.layers.quantized import count_weights, quantize_
from mmllm.models.kv_cache import KVCache, PerSlot
from mmllm.models.loading import ModelForm
from mmllm.models.multimodal import MultimodalLLM
from mmllm.training.prepare import prepare
from official import write_model, write_qwen3, write_siglip
from tiny_run import write_world

# Relative distance of the logits from those of the formulas. Without our kernels bfloat16 rounds the activations too;
# an activation at the edge of two integers may become either.
DISTANCE = {
    "float32": 0,
    "bfloat16": 5e-6 if kernels.native() else 0.02,
    "int8": 1e-4,
    "int8-dynamic": 0.02,
    "int4": 0.01,
}


def rounded(weight_OK: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "bfloat16":
        return weight_OK.bfloat16().float()
    if kind == "int4":
        return int4_matrix(*quantize_int4(weight_OK))
    q_OK, scale_O1 = quantize_int8(weight_OK)
    return q_OK * scale_O1


@torch.no_grad()
def round_by_formula_(model: MultimodalLLM, precision: str) -> MultimodalLLM:
    """A float model whose weights have the values that `precision` gives them."""
    for name, layer in model.named_modules() if precision != "float32" else ():
        is_language = name.startswith("language_model.")
        if not isinstance(layer, nn.Linear | nn.Embedding) or "projector" in name or "position_embedding" in name:
            continue
        is_int4 = precision == "int4" and ".layers." in name and is_language
        kind = "int8" if precision == "int4" and not is_int4 else precision
        if kind.startswith("int8") and isinstance(layer, nn.Linear):
            q_OK, scale_O1 = quantize_int8(layer.weight)
            bits = 8 if kind == "int8-dynamic" and is_language else 16
            layer.forward = partial(int8_linear, q_OK=q_OK, scale_O=scale_O1[:, 0], bias_O=layer.bias, bits=bits)
        layer.weight.copy_(rounded(layer.weight, kind))
        if is_int4:
            layer.forward = partial(int4_linear, matrix_OK=layer.weight, bias_O=layer.bias)
    return model


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="module")
def siglip_qwen3(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("float") / "model", vision=write_siglip, text=write_qwen3)


@pytest.fixture(scope="module")
def packed_folders(folder, tmp_path_factory):
    """The model packed on disk, by precision."""
    out = tmp_path_factory.mktemp("packed")
    for kind in ("int8", "int4"):
        convert.main(["--model", str(folder), f"--{kind}", "--out", str(out / kind)])
    return {kind: out / kind for kind in ("int8", "int4")}


@torch.no_grad()
def some_logits(model: MultimodalLLM, num_images: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    tokens = model.config.num_image_tokens * num_images
    ids = torch.randint(0, 280, (2, 40), generator=rng)
    ids[0, 3 : 3 + tokens] = model.config.image_token_id
    return model.logits(ids, torch.randn(num_images, 3, 32, 32, generator=rng))


@pytest.mark.parametrize("towers", ["folder", "siglip_qwen3"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_computes_its_formula(request, towers, precision):
    folder = request.getfixturevalue(towers)
    wanted = some_logits(round_by_formula_(MultimodalLLM.from_pretrained(folder), precision))
    assert distance(some_logits(load_model(folder, precision=precision)), wanted) <= DISTANCE[precision]


def test_the_embedding_and_the_tied_head_are_one_int8_matrix(folder):
    model = load_model(folder, precision="int8")
    head, embedding = model.language_model.lm_head, model.language_model.model.embed_tokens
    assert not list(embedding.parameters()) and not list(embedding.buffers())
    ids = torch.tensor([[3, 511], [0, 3]])
    assert torch.equal(embedding(ids), head.rows(ids))
    biased = model.language_model.model.layers[0].self_attn.k_proj
    assert biased.bias.abs().max() > 1, "the key biases are kept"


def test_an_untied_head_has_a_matrix_of_its_own(tmp_path):
    folder = write_model(tmp_path / "model", tie_word_embeddings=False)
    wanted = some_logits(round_by_formula_(MultimodalLLM.from_pretrained(folder), "int8"))
    assert distance(some_logits(load_model(folder, precision="int8")), wanted) <= DISTANCE["int8"]


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int8-dynamic", "int4"])
def test_a_row_has_the_same_bits_in_a_batch_and_alone(folder, precision):
    if not kernels.native():
        pytest.skip("no C++ compiler here")
    model = load_model(folder, precision=precision)
    x_BD = torch.randn(9, 64)
    layer = model.language_model.model.layers[1].mlp.gate_proj
    assert torch.equal(layer(x_BD), torch.cat([layer(x_BD[i : i + 1]) for i in range(9)]))


@pytest.mark.parametrize("towers", ["folder", "siglip_qwen3"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_decoding_token_by_token_gives_what_the_whole_text_gives(request, towers, precision):
    model = load_model(request.getfixturevalue(towers), precision=precision)
    language_model, slots = model.language_model, [2, 0]
    ids_BT = torch.randint(0, 280, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = KVCache(model.config.text, 3, 16, device=model.device, dtype=model.dtype)
        x_BTD = language_model.embed(ids_BT)
        wanted = language_model(x_BTD)
        for t in range(12):
            positions = torch.full((2, 1), t)
            got = language_model(x_BTD[:, t : t + 1], positions, cache=PerSlot(cache, slots, [t, t]))
            assert (got[:, 0] - wanted[:, t]).abs().max() < 2e-3, "float32, and digits that fall to either side"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Sizes with remainders everywhere, seven query heads on one key head, and a head of its own."""
    sizes = {"hidden_size": 70, "intermediate_size": 150, "num_attention_heads": 7, "num_key_value_heads": 1}
    more = {"head_dim": 16, "tie_word_embeddings": False}
    return write_model(tmp_path_factory.mktemp("odd") / "model", text=partial(write_qwen3, **sizes, **more))


@pytest.mark.parametrize(
    ("towers", "precision"),
    [(t, p) for t in ("folder", "siglip_qwen3", "odd") for p in PRECISIONS[1:] if (t, p) != ("odd", "int4")],
)
def test_the_one_call_gives_what_the_layers_give_and_its_rows_the_same_bits_in_any_pass(request, towers, precision):
    if not kernels.native():
        pytest.skip("no C++ compiler here")
    model = load_model(request.getfixturevalue(towers), precision=precision)
    ids = torch.randint(0, 280, (2, 40), generator=torch.Generator().manual_seed(1))

    def logits(threads: int, *cuts: int) -> torch.Tensor:
        """Of the last tokens of two texts, in slots 2 and 0, read in pieces; then one token of each decoded."""
        torch.set_num_threads(threads)
        runner = ModelRunner(model, 3, 64, is_exact=True, is_static=False)
        assert runner.is_row_exact
        for start, end in pairwise((0, *cuts, 39)):
            both = zip((2, 0), ids, strict=True)
            pieces = [Piece(slot, start, runner.embed(text[start:end].tolist()), end == 39) for slot, text in both]
            read = runner.run([], [], [], pieces)
        return torch.cat([read, runner.run([2, 0], ids[:, 39].tolist(), [39, 39], [])])

    with torch.inference_mode():
        language_model = model.language_model
        wanted = language_model.logits(language_model(language_model.embed(ids)))[:, 38:].transpose(0, 1).flatten(0, 1)
        got = logits(1)
        assert distance(got, wanted) <= 2 * DISTANCE[precision]
        assert torch.equal(logits(2, 1, 9, 10, 27), got)


@pytest.mark.parametrize("towers", ["folder", "siglip_qwen3"])
def test_patches_as_a_product_are_those_of_the_convolution(request, towers):
    if not kernels.native():
        pytest.skip("no C++ compiler here")
    convolution = load_model(
        request.getfixturevalue(towers), precision="int8"
    ).vision_tower.vision_model.embeddings.patch_embedding
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = torch.nn.Conv2d.forward(convolution, pixels)
        assert_close(convolution(pixels), wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)  # up to 45


def test_int8_needs_no_compiler_for_the_same_bits(folder, packed_folders, monkeypatch):
    int8_folder = packed_folders["int8"]
    wanted = [some_logits(load_model(f, precision="int8"), num_images=0) for f in (folder, int8_folder)]
    native = load_model(folder, precision="int8").language_model
    monkeypatch.setattr(kernels, "native", lambda: False)
    for source, before in zip((folder, int8_folder), wanted, strict=True):
        model = load_model(source, precision="int8")
        assert (some_logits(model, num_images=0) - before).abs().max() < 1e-4
        layer, x = model.language_model.model.layers[0].mlp.down_proj, torch.randn(3, 160)
        assert torch.equal(layer(x), native.model.layers[0].mlp.down_proj(x))
    for precision, bound in (("bfloat16", 0.02), ("int8-dynamic", 0.02), ("int4", 0.01)):
        wanted = some_logits(round_by_formula_(MultimodalLLM.from_pretrained(folder), precision))
        assert distance(some_logits(load_model(folder, precision=precision)), wanted) <= bound


# On disk --------------------------------------------------------------------------------------------------------------

packed_kinds = pytest.mark.parametrize("kind", ["int8", "int4"])


@packed_kinds
def test_a_packed_directory_is_loaded_without_packing_and_answers_the_same(folder, packed_folders, kind, monkeypatch):
    precisions = [name for name in PRECISIONS if name.startswith(kind)]
    wanted = [some_logits(load_model(folder, precision=precision)) for precision in precisions]
    with monkeypatch.context() as patch:
        patch.setattr(Int8Packed, "of", None)
        patch.setattr(Int4Packed, "of", None)
        for precision, logits in zip(precisions, wanted, strict=True):
            assert torch.equal(some_logits(load_model(packed_folders[kind], precision=precision)), logits)
    pipeline = load_pipeline(packed_folders[kind], device="cpu")
    assert pipeline.model.form.precision == kind, "its own precision without --dtype"
    image = Image.new("RGB", (40, 32), (200, 90, 20))
    answers = [p.chat("What is it?", image) for p in (pipeline, load_pipeline(folder, device="cpu", dtype=kind))]
    assert answers[0] == answers[1]


@packed_kinds
def test_a_packed_directory_is_the_same_file_where_there_is_no_compiler(
    folder, packed_folders, kind, tmp_path, monkeypatch
):
    wanted = some_logits(load_model(packed_folders[kind], precision=kind))
    monkeypatch.setattr(kernels, "native", lambda: False)
    out = tmp_path / "out"
    convert.main(["--model", str(folder), f"--{kind}", "--out", str(out)])
    assert (out / "model.safetensors").read_bytes() == (packed_folders[kind] / "model.safetensors").read_bytes()
    assert distance(some_logits(load_model(out, precision=kind)), wanted) <= DISTANCE[kind]


def test_mmllm_json_names_the_precision_and_an_older_version_refuses_what_it_does_not_know(packed_folders):
    surgery = {kind: json.loads((out / "mmllm.json").read_text())["surgery"] for kind, out in packed_folders.items()}
    assert surgery == {"int8": ["packed"], "int4": ["packed-int4"]}


@packed_kinds
def test_a_packed_file_holds_what_the_formula_says(folder, packed_folders, kind):
    """int8: a byte a weight and 4 a row. int4: half a byte a weight and 2 for 32 of them; head and vision are int8."""
    got, wanted = load_file(packed_folders[kind] / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, weight in wanted.items():
        layer = name.removesuffix(".weight").replace("embed_tokens", "lm_head").replace(".model.lm_head", ".lm_head")
        if f"{layer}.panels" in got:
            outputs, inputs = weight.shape
            is_int4 = kind == "int4" and ".layers." in name and "language_model" in name
            size = outputs * inputs // 2 + outputs * inputs // 16 if is_int4 else outputs * inputs + 4 * outputs
            assert got[f"{layer}.panels"].nbytes + got[f"{layer}.scale"].nbytes == size, name
    assert len([name for name in got if name.endswith(".panels")]) == 4 * 7 + 1 + 3 * 6


@pytest.mark.parametrize(
    ("kind", "precision", "possible"),
    [("int8", "bfloat16", "int8 or int8-dynamic"), ("int8", "int4", "int8 or int8-dynamic"), ("int4", "int8", "int4")],
)
def test_packed_weights_are_not_loaded_in_another_precision(packed_folders, kind, precision, possible):
    with pytest.raises(UserError, match=f"its weights are {kind}, not {precision}; use dtype {possible}$"):
        load_model(packed_folders[kind], precision=precision)


@packed_kinds
def test_packed_weights_are_neither_trained_nor_converted(packed_folders, kind, tmp_path):
    with pytest.raises(ConfigError, match=f"{kind} weights to answer with; train from the model they came from"):
        prepare(MultimodalLLM.from_pretrained(packed_folders[kind]), ExperimentConfig())
    for form in ("--int8", "--int4", "--merge", "--language-model", "--gguf=F16"):
        with pytest.raises(UserError, match=f"weights are {kind}, to answer with; name the model they came from"):
            convert.main(["--model", str(packed_folders[kind]), form, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@packed_kinds
def test_a_truncated_or_altered_packed_file_is_refused(packed_folders, kind, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed_folders[kind], folder)
    weights, ours = folder / "model.safetensors", folder / "mmllm.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(folder, precision=kind)
    tensors = load_file(packed_folders[kind] / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.panels"
    save_file(tensors | {name: tensors[name][:-1].clone()}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 of another shape, first {name} "):
        load_model(folder, precision=kind)
    weights.write_bytes(whole)
    other = {"int8": "packed-int4", "int4": "packed"}[kind]
    ours.write_text(json.dumps(json.loads(ours.read_text()) | {"surgery": [other]}))
    with pytest.raises(CheckpointError, match="of another shape, first language_model.model.layers.0"):
        MultimodalLLM.from_pretrained(folder)


def test_a_copy_for_several_workers_is_made_once_in_each_precision(folder, packed_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copies = {kind: packed_copy(folder, kind) for kind in packed_folders}
    assert copies == {kind: packed_copy(folder, kind) for kind in packed_folders} and len(set(copies.values())) == 2
    for kind, copy in copies.items():
        assert torch.equal(*(some_logits(load_model(f, precision=kind)) for f in (copy, packed_folders[kind])))
        assert packed_copy(packed_folders[kind], "int8") == packed_folders[kind], "packed already"


@pytest.mark.parametrize("towers", ["folder", "siglip_qwen3"])
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_a_packed_model_has_as_many_parameters_as_before(towers, precision, request):
    source = request.getfixturevalue(towers)
    wanted = count_weights(MultimodalLLM.from_pretrained(source))
    assert count_weights(load_model(source, precision=precision)) == wanted


@torch.no_grad()
def test_an_int4_directory_rounded_for_samples_is_nearer_to_float32_on_others(tmp_path):
    world = write_world(tmp_path)
    MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen").save_pretrained(tmp_path / "model")
    data = ["--calibrate", str(tmp_path / "train.json"), "--image-dir", str(tmp_path / "images")]
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    convert.main(["--model", model, "--int4", *data, "--out", out])
    found = []
    for source, precision in ((model, "float32"), (out, "int4"), (model, "int4")):
        loaded = load_model(source, precision=precision)
        samples = load_samples(tmp_path / "val.json", tmp_path / "images")
        (batch,) = ordered_batches(samples, loaded.processor, len(samples), num_workers=0)
        found.append(loaded.logits(batch.ids_BT, batch.pixels_N3SS))
    wanted, chosen, plain = found
    assert 0 < distance(chosen, wanted) < 0.8 * distance(plain, wanted)
    with pytest.raises(SystemExit):
        convert.main(["--model", model, "--int8", *data, "--out", out])
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    with pytest.raises(ImageError) as missing:
        convert.main(["--model", model, "--int4", *data, "--out", f"{out}2"])
    assert str(tmp_path / "images") in str(missing.value) and "bad_samples" not in str(missing.value)


def test_a_model_prepared_for_answering_is_not_saved(folder, tmp_path):
    with pytest.raises(ValueError, match="made ready to answer in int8 and cannot be written back"):
        load_model(folder, precision="int8").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "precision"), [("cpu", "int2"), ("mps", "int8"), ("cuda", "int4")])
def test_a_precision_that_a_device_does_not_support_is_refused(folder, device, precision):
    with pytest.raises(UserError, match=f"{precision}.* can be float32"):
        load_model(folder, device=device, precision=precision)


# Adapters -------------------------------------------------------------------------------------------------------------


def with_adapters(folder, out, is_int8: bool) -> MultimodalLLM:
    model = MultimodalLLM.from_pretrained(folder)
    if is_int8:
        quantize_(model.language_model)
    lora = LoraConfig(r=2)
    model.form = ModelForm(lora, "int8" if is_int8 else None)
    add_lora_(model.language_model, lora)
    for layer in adapters(model.language_model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_adapters_are_merged_into_float_weights_and_stay_beside_int8_ones(folder, tmp_path, is_int8, precision):
    plain = with_adapters(folder, tmp_path / "adapted", is_int8)
    if not is_int8:
        merge_lora_(plain.language_model)
    wanted = some_logits(round_by_formula_(plain, precision))
    model = load_model(tmp_path / "adapted", precision=precision)
    assert bool(adapters(model)) == is_int8
    assert distance(some_logits(model), wanted) <= DISTANCE["int8"]
