import argparse
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples.crossval import __main__ as command
from examples.crossval.caption_space import CaptionSpace, each_by_the_others, noisy
from examples.crossval.folds import with_noise
from examples.crossval.table import consensus, deal, nearest, read_captions, read_features, standardised
from mmllm.errors import DataError, UserError
from mmllm.evaluation.cider import CiderD
from official import write_qwen

THINGS, PLACES = ("dog", "boat", "bird"), ("grass", "sand", "water")


def caption_pair(thing: str, place: str) -> list[str]:
    return [f"A {thing} is on the {place} .", f"On the {place} there is a {thing} ."]


@pytest.fixture
def world(tmp_path):
    """60 images whose embeddings depend on thing and place, 60 more with captions alone."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(6, 24))
    names, embeddings, lines = [], [], []
    for i in range(120):
        thing, place = i % 3, i // 3 % 3
        lines.append(json.dumps({"image": f"{i}.jpg", "captions": caption_pair(THINGS[thing], PLACES[place])}))
        if i % 2:
            names.append(f"{i}.jpg")
            embeddings.append(axes[thing] + axes[3 + place] + 0.1 * rng.normal(size=24))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    np.savez(tmp_path / "table.npz", names=np.array(names), embeddings=np.array(embeddings, np.float16))
    return tmp_path


QUICK = ["num_sample_captions=0", "eval_steps=1000", "save_steps=1000", "log_steps=1000", "data.batch_size=8"]
QUICK += ["stage1.epochs=6", "stage1.learning_rate=1e-2", "stage2.epochs=1", "stage2.learning_rate=2e-3"]
QUICK += ["--width=64", "--layers=1", "--vocab-size=320", "--caption-features=4", "--text-epochs=40"]
QUICK += ["--max-new-tokens=10", "--copies=1", "--noise=0.1"]


def run(world, *more: str) -> dict[str, float]:
    """CIDEr of each row of the table."""
    command.main(
        [f"--features={world / 'table.npz'}", f"--captions={world / 'captions.jsonl'}", f"--out={world / 'out'}"]
        + ["--folds=2", "--num-beams=2", "device=cpu", *QUICK, *more]
    )
    scores = json.loads((world / "out" / "scores.json").read_text())["scores"]
    return {row: parts["captions"]["cider"] for row, parts in scores.items()}


@pytest.mark.slow
def test_captions_follow_the_embeddings_and_change_with_them(world, capsys):
    cider = run(world)
    assert list(cider) == ["2 beams", "greedy", "other images", "10 neighbors", "nearest", "best constant"]
    assert cider["greedy"] > cider["other images"] + 1
    assert cider["greedy"] > cider["best constant"] + 0.5
    assert cider["nearest"] > cider["best constant"] + 1
    assert "captions (60)" in capsys.readouterr().out
    said = json.loads((world / "out" / "captions.json").read_text())
    assert {len(texts) for texts in said.values()} == {60}
    for fold in ("fold1", "fold2"):  # nothing of a fold is trained on, nor known to its choice of a checkpoint
        files = [world / "out" / fold / name for name in ("train.jsonl", "val.jsonl")]
        seen = {json.loads(line)["image"] for file in files for line in file.read_text().splitlines()}
        assert len({name.partition("#")[0] for name in seen}) == 30


@pytest.mark.slow
def test_a_given_language_model_replaces_the_small_one(world):
    write_qwen(world / "qwen")
    run(world, f"--qwen={world / 'qwen'}", "stage1.epochs=1", "stage2.epochs=0", "--max-new-tokens=2")
    assert not (world / "out" / "language").exists()


def test_without_captions_to_spare_a_language_model_must_be_named(world):
    lines = (world / "captions.jsonl").read_text().splitlines()
    (world / "captions.jsonl").write_text("\n".join(lines[1::2]))
    with pytest.raises(UserError, match="name one that has seen none: --qwen DIR"):
        run(world)


def test_too_few_images_for_the_folds_are_refused(world):
    with pytest.raises(DataError, match="60 images of .*table.npz have captions in .*captions.jsonl; too few"):
        run(world, "--folds=31")


def test_both_kinds_of_table_hold_the_same(tmp_path):
    rows = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.savez(tmp_path / "a.npz", names=np.array(["1.jpg", "2.jpg"]), embeddings=rows)
    save_file({name: torch.from_numpy(row) for name, row in zip(("1.jpg", "2.jpg"), rows, strict=True)}, tmp_path / "b")
    for name in ("a.npz", "b"):
        table = read_features(tmp_path / name)
        assert {name: row.tolist() for name, row in table.items()} == {"1.jpg": [0, 1, 2], "2.jpg": [3, 4, 5]}


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="gone.npz: no such table"):
        read_features(tmp_path / "gone.npz")
    np.savez(tmp_path / "x.npz", rows=np.zeros((2, 3)))
    with pytest.raises(DataError, match="x.npz: holds rows; `names` and `embeddings` are needed"):
        read_features(tmp_path / "x.npz")
    (tmp_path / "x").write_bytes(b"no table")
    with pytest.raises(DataError, match="x: cannot be read as safetensors"):
        read_features(tmp_path / "x")
    save_file({"1": torch.zeros(2), "2": torch.zeros(3)}, tmp_path / "y")
    with pytest.raises(DataError, match=r"y: embeddings of \[2, 3\] numbers; all must have as many"):
        read_features(tmp_path / "y")


def test_folds_hold_every_image_once_and_are_a_function_of_the_seed():
    names = [str(n) for n in range(11)]
    folds = deal(names, 3, seed=0)
    assert sorted(name for fold in folds for name in fold) == sorted(names)
    assert [len(fold) for fold in folds] == [4, 4, 3]
    assert folds == deal(names, 3, seed=0) != deal(names, 3, seed=1)


def test_the_nearest_images_are_those_of_the_highest_cosine():
    others = {"far": torch.tensor([0.0, 1.0]), "long": torch.tensor([9.0, 1.0]), "same": torch.tensor([0.5, 0.0])}
    assert nearest(torch.tensor([1.0, 0.0]), others, 2) == ["same", "long"]


def test_the_consensus_is_the_caption_with_the_highest_cider_against_all():
    texts = ["a dog runs on grass", "a dog runs", "a dog runs on sand", "two cats"]
    scorer = CiderD([texts, ["a park"], ["the sea"]])
    vectors = [scorer.vector(text).unit() for text in texts]
    likeness = [
        sum(weight * other.get(gram, 0) for other in vectors for gram, weight in one.items()) for one in vectors
    ]
    assert consensus(texts, scorer) == texts[likeness.index(max(likeness))] == "a dog runs on grass"


def test_standardisation_uses_the_training_images_alone():
    features = {name: torch.tensor([value, 5.0]) for name, value in (("a", 1.0), ("b", 3.0), ("tested", 100.0))}
    known = standardised(features, ["a", "b"])
    assert torch.stack([known["a"], known["b"]]).mean(0).tolist() == [0, 0]
    assert known["tested"][0].item() == pytest.approx(98 / 2**0.5)


def test_the_images_of_a_validation_have_no_noise_and_the_others_have_copies():
    texts, features = {"a": ("one",), "b": ("two",)}, {"a": torch.zeros(4000), "b": torch.zeros(4000)}
    said, seen = with_noise(texts, features, ["b"], argparse.Namespace(copies=2, noise=3.0))
    assert said == {"a#0": ("one",), "a#1": ("one",), "b": ("two",)} and seen.keys() == said.keys()
    assert not seen["b"].any() and not torch.equal(seen["a#0"], seen["a#1"])
    assert seen["a#1"].std().item() == pytest.approx(3, abs=0.1)


def test_the_noise_is_a_function_of_the_seed():
    first, same, other = (noisy(torch.zeros(4000), seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.5, abs=0.02)


def test_captions_are_the_words_that_scores_count(tmp_path):
    rows = [
        {"image": "a/1.jpg", "captions": ["Two dogs run .", "A dog's ball!"]},
        {"image": "2.jpg", "captions": [" ."]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_captions(tmp_path / "x.jsonl") == {"1.jpg": ("two dogs run", "a dog 's ball")}


def test_every_caption_is_a_target_once_and_described_by_the_others():
    assert each_by_the_others(("a", "b", "c")) == [(["b", "c"], "a"), (["a", "c"], "b"), (["a", "b"], "c")]
    assert each_by_the_others(("a",)) == []


def test_the_embedding_of_captions_is_that_of_a_singular_value_decomposition():
    rng = random.Random(0)
    captions = [[" ".join(rng.choices(["red", "blue", "cat", "dog", "runs", "sits"], k=4))] for _ in range(30)]
    space = CaptionSpace(captions, 3)
    rows = torch.stack([space(texts) for texts in captions])
    assert rows.mean(0).abs().max() < 1e-5
    assert rows.square().mean().item() == pytest.approx(1, abs=1e-5)
    covariance = rows.T @ rows / 30
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-5  # the main axes are uncorrelated
    x = np.stack([space._tf_idf(space._words(texts)) for texts in captions])
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)[:3]
    assert np.allclose(covariance.diag() / covariance.trace(), singular**2 / (singular**2).sum(), atol=1e-5)


def test_words_that_are_new_or_absent_leave_the_embedding_finite():
    space = CaptionSpace([["a red cat"], ["a blue dog"], ["a red dog"], ["a blue cat"]] * 5, 2)
    assert torch.equal(space(["zebra"]), space([""])) and space([""]).isfinite().all()


def test_too_few_words_for_an_embedding_are_refused():
    with pytest.raises(DataError, match="2 images with 0 words that 5 of them share make no embedding of 4 numbers"):
        CaptionSpace([["a cat"], ["a dog"]], 4)
