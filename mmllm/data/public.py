"""Public datasets: the files that they are made of (public.json), and how those become samples.

No image of an evaluation split is trained on. COCO's photographs are in several datasets under other names, so they are
told apart by their number: Karpathy's validation and test images leave VQAv2 and LLaVA's mixture too, where Visual Genome
(and GQA, which shows its images) says which of COCO's photographs each of its images is.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mmllm.data.chat import Message
from mmllm.data.download import MEND, download, unpack_zip
from mmllm.data.formats import read_records
from mmllm.data.order import split_by_image
from mmllm.data.records import record_id
from mmllm.data.samples import Sample, read_samples, record_samples
from mmllm.errors import DataError
from mmllm.runtime.console import print_rank0
from mmllm.runtime.files import writing

TABLE = Path(__file__).with_name("public.json")
SHORT = "\nAnswer the question using a single word or phrase."  # as LLaVA 1.5 asks for short answers
VAL_FRACTION = 0.1  # of easy-VQA's images
HELD_OUT = "show an image of an evaluation split"

Splits = dict[str, list[Sample]]


def read_table(path: Path) -> dict[str, dict]:
    """The datasets by name, each with its files. DataError for a table of another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content.pop("files")
        for dataset in content.values():
            dataset["files"] = {name: files[name] for name in dataset["files"]}
            assert all({"url", "to"} <= file.keys() for file in dataset["files"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise DataError(f"{path}: no table of datasets ({error!r}); {TABLE} shows its form") from error
    return content


def fetch(files: dict[str, dict], out: Path, image_dir: Path) -> None:
    """Downloads and unpacks what is not there yet: images below `image_dir`, other files below `out`/source."""
    for name, file in files.items():
        top, _, rest = file["to"].partition("/")
        folder = image_dir / rest if top == "images" else out / top
        complete = folder / f".{name}.complete"
        if complete.exists():
            continue
        path = out / "downloads" / name / file["url"].rpartition("/")[2]  # several are called images.zip
        download(file["url"], path, file.get("sha256", ""), file.get("size", 0))
        with writing(folder, MEND):
            folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            unpack_zip(path, folder)
            complete.touch()
            path.unlink()
        else:
            path.replace(folder / path.name)
            complete.touch()


def coco_images(source: Path) -> dict[int, tuple[str, str]]:
    """Of each photograph of COCO by its number: Karpathy's split, and its file."""
    rows = json.loads((source / "dataset_coco.json").read_text(encoding="utf-8"))["images"]
    return {row["cocoid"]: (row["split"], f"{row['filepath']}/{row['filename']}") for row in rows}


def coco(source: Path, images: Path) -> tuple[Splits, Counter]:
    return karpathy(source / "dataset_coco.json", images), Counter()


def flickr30k(source: Path, images: Path) -> tuple[Splits, Counter]:
    return karpathy(source / "dataset_flickr30k.json", images / "flickr30k-images"), Counter()


def karpathy(path: Path, images: Path) -> Splits:
    return {split: read_samples(path, images, split) for split in ("train", "val", "test")}


def vqav2(source: Path, images: Path) -> tuple[Splits, Counter]:
    """VQAv2's train and val questions, but each in the split that Karpathy gave to its image."""
    known, splits = coco_images(source), defaultdict(list)
    for part in ("train2014", "val2014"):
        for sample in read_samples(source / f"v2_OpenEnded_mscoco_{part}_questions.json", images):
            split = known[int(sample.images[0].stem[-12:])][0] if sample.images else "train"
            splits["train" if split == "restval" else split].append(asked_shortly(sample))
    return {split: splits[split] for split in ("train", "val", "test")}, Counter()


def vqav2_test(source: Path, images: Path) -> tuple[Splits, Counter]:
    samples = read_samples(source / "v2_OpenEnded_mscoco_test-dev2015_questions.json", images)
    return {"test": list(map(asked_shortly, samples))}, Counter()


def textvqa(source: Path, images: Path) -> tuple[Splits, Counter]:
    def part(split: str) -> list[Sample]:
        samples = read_samples(source / f"TextVQA_0.5.1_{split}.json", images / "textvqa" / "train_images")
        return list(map(asked_shortly, samples))

    return {split: part(split) for split in ("train", "val")}, Counter()


def llava_pretrain(source: Path, images: Path) -> tuple[Splits, Counter]:
    return {"train": read_samples(source / "blip_laion_cc_sbu_558k.json", images / "llava-pretrain")}, Counter()


def llava_instruct(source: Path, images: Path) -> tuple[Splits, Counter]:
    """LLaVA's mixture, with COCO's photographs under their names of 2014."""
    known = coco_images(source)
    vg = json.loads((source / "image_data.json").read_text(encoding="utf-8"))
    coco_of = {str(row["image_id"]): row["coco_id"] for row in vg}
    textvqa = json.loads((source / "TextVQA_0.5.1_val.json").read_text(encoding="utf-8"))["data"]
    held_out = {f"textvqa/{row['image_id']}" for row in textvqa}
    samples, left_out = [], Counter()
    for number, record in enumerate(read_records(source / "llava_v1_5_mix665k.json")):
        name = record.get("image") or ""
        folder, stem = name.partition("/")[0], Path(name).stem
        if folder == "ocr_vqa":
            left_out["are about OCR-VQA's images, which have no archive"] += 1
            continue
        shown = int(stem) if folder == "coco" else coco_of.get(stem) if folder in ("vg", "gqa") else None
        if known.get(shown, ("",))[0] in ("val", "test") or f"{folder}/{stem}" in held_out:
            left_out[HELD_OUT] += 1
            continue
        record |= {"image": known[shown][1]} if folder == "coco" else {}
        samples += record_samples(record, record_id(record, str(number)), images)
    return {"train": samples}, left_out


def easy_vqa(source: Path, images: Path) -> tuple[Splits, Counter]:
    def part(split: str) -> list[Sample]:
        folder = images / "easy-VQA-master" / "easy_vqa" / "data" / split
        rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        return [
            sample
            for number, (question, answer, image) in enumerate(rows)
            for sample in record_samples(
                {"image": f"{image}.png", "question": question, "answers": [answer]}
                | {"kind": "yes/no" if answer in ("yes", "no") else "other"},
                f"{split}{number}",
                folder / "images",
            )
        ]

    train, val = split_by_image(part("train"), VAL_FRACTION, 0)
    return {"train": train, "val": val, "test": part("test")}, Counter()


BUILDERS: dict[str, Callable[[Path, Path], tuple[Splits, Counter]]] = {
    "coco": coco,
    "vqav2": vqav2,
    "vqav2-test": vqav2_test,
    "flickr30k": flickr30k,
    "llava-pretrain": llava_pretrain,
    "llava-instruct": llava_instruct,
    "textvqa": textvqa,
    "easy-vqa": easy_vqa,
}


def asked_shortly(sample: Sample) -> Sample:
    return replace(sample, messages=shortly(sample.messages))


def shortly(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with LLaVA's request for a short answer after each question."""

    def short(turn: Message) -> Message:
        *before, last = turn.parts
        return Message(turn.role, (*before, last + SHORT) if isinstance(last, str) else (*turn.parts, SHORT))

    return tuple(short(turn) if turn.role == "user" else turn for turn in messages)


def build(name: str, source: Path, images: Path) -> Splits:
    """The samples of each split; what is left out of them is counted on the console."""
    try:
        splits, left_out = BUILDERS[name](source, images)
    except (FileNotFoundError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{source}: not the files of {name} ({error!r}); remove the folder and prepare it again"
        ) from error
    evaluated = {path for split in ("val", "test") for sample in splits.get(split, []) for path in sample.images}
    train = [sample for sample in splits.get("train", []) if evaluated.isdisjoint(sample.images)]
    left_out[HELD_OUT] += len(splits.get("train", [])) - len(train)
    for reason, count in left_out.items():
        print_rank0(f"{name}: {count} training samples are left out: they {reason}")
    return splits | ({"train": train} if "train" in splits else {})
