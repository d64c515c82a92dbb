"""Check a data set, split it, and write it in our own format, with a sheet of samples to look at.

mmllm prepare captions.csv --image-dir photos --out data/photos --val-fraction 0.05
mmllm prepare photos --out data/photos --images crop             # 224 x 224 PNGs: all that the model sees
mmllm prepare train.json --val val.json --out data/own --model models/start   # and how long the rows are
mmllm prepare coco --out data/coco                               # download a public dataset; run it again to continue
mmllm prepare vqav2 --out data/vqav2 --image-dir data/coco/images   # with the images that are there already

Reads every format that `mmllm train` reads, with the same checks, and parquet and webdataset's tar files, whose images it
unpacks. Bad samples are left out and listed.

Public datasets: coco, vqav2, vqav2-test, flickr30k, llava-pretrain, llava-instruct, textvqa, easy-vqa. Images of an
evaluation split are dropped from training; mmllm/data/public.json has the hosts, checksums and licences.
"""

import random
import shutil
from pathlib import Path

from mmllm.commands import at_least_one, make_parser
from mmllm.errors import DataError, UserError
from mmllm.runtime.console import print_rank0, progress
from mmllm.runtime.files import writing

SPLITS = ("test", "val", "train")  # in the order in which they are written
SHEET = 24  # samples on the contact sheet
UNPACKED = "unpacked"  # the folder of what was in archives, until it is copied


def parse(arguments: list[str] | None = None):
    parser = make_parser("prepare", __doc__)
    parser.add_argument("data", metavar="FILE|FOLDER|NAME", help="the samples; several files are joined by commas")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--image-dir", metavar="DIR", help="where the images are (default: beside FILE)")
    parser.add_argument("--val", metavar="FILE", help="the samples for validation")
    parser.add_argument("--val-image-dir", metavar="DIR", help="where their images are (default: as for FILE)")
    parser.add_argument("--val-fraction", type=float, default=0.0, metavar="F", help="or this part of the images")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the sheet (default: %(default)s)")
    parser.add_argument("--images", choices=["copy", "link", "crop"], default="copy", help="(default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="the model to be trained, to count tokens")
    parser.add_argument("--table", type=Path, metavar="FILE", help="hosts of public datasets, in place of public.json")
    parser.add_argument("--max-length", type=at_least_one, default=512, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.val and options.val_fraction:
        parser.error("--val and --val-fraction exclude each other")
    if not 0 <= options.val_fraction < 1:
        parser.error(f"--val-fraction is {options.val_fraction}; it must be at least 0 and less than 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from mmllm.data.public import BUILDERS
    from mmllm.data.samples import UNFINISHED

    is_public = options.data in BUILDERS and not Path(options.data).exists()
    names = [f"{split}.jsonl" for split in SPLITS]
    if is_public and (options.out / UNFINISHED).exists():
        return prepare_public(options)  # it goes on there
    if any((options.out / name).exists() for name in (*names, UNFINISHED)):
        raise UserError(f"{options.out}: holds a data set already; name another folder with --out, or remove it")
    if is_public:
        return prepare_public(options)
    from mmllm.data.image import ImageProcessor
    from mmllm.data.order import split_by_image
    from mmllm.data.prepared import drop_images_of, image_names, place_image

    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / UNPACKED, ignore_errors=True)  # of a run that was interrupted
    processor = load_processor_of(options.model) if options.model else None
    train = good_samples(options.data, options.image_dir, "train", options, processor)
    val = []
    if options.val:
        val = good_samples(options.val, options.val_image_dir or options.image_dir, "val", options, processor)
    elif options.val_fraction:
        train, val = split_by_image(train, options.val_fraction, options.seed)
    train, dropped = drop_images_of(train, val)
    if dropped:
        print_rank0(
            f"{len(dropped)} training samples left out: their images are in the validation too, first {dropped[0].id}"
        )
    if not train:
        raise DataError(f"{options.data}: no sample is left to train on")
    images = {path for sample in (*train, *val) for path in sample.images}
    names, square = image_names(images, options.images), processor.image_processor if processor else ImageProcessor()
    for path, name in progress(names.items(), len(names), "images"):
        place_image(path, options.out / "images" / name, options.images, square)
    for split, samples in (("train", train), ("val", val)):
        if samples:
            write_split(options.out / f"{split}.jsonl", samples, names)
    draw_sheet(options.out / "contact_sheet.png", train, options.seed)
    if options.images != "link":
        shutil.rmtree(options.out / UNPACKED, ignore_errors=True)
    if processor:
        print_rank0(token_statistics(train, processor))
    val_path = f" data.val_data_path={options.out / 'val.jsonl'}" if val else ""
    print_rank0(
        f"next: python -m mmllm train full data.train_data_path={options.out / 'train.jsonl'}{val_path} "
        f"data.image_dir={options.out / 'images'}"
    )
    return 0


def prepare_public(options) -> int:
    """Download a public dataset, unpack it and write its splits; the folder is marked until it is complete."""
    from mmllm.data.chat import NO_ANSWER
    from mmllm.data.checks import check_samples, image_fault, keep_good
    from mmllm.data.download import MEND
    from mmllm.data.public import TABLE, build, fetch, read_table
    from mmllm.data.samples import UNFINISHED

    out, image_dir = options.out, Path(options.image_dir or options.out / "images")
    dataset, marker = read_table(options.table or TABLE)[options.data], out / UNFINISHED
    if out.exists() and any(out.iterdir()) and not (marker.exists() and marker.read_text() == options.data):
        raise UserError(f"{out}: holds other files; name an empty folder with --out")
    with writing(out, MEND):
        out.mkdir(parents=True, exist_ok=True)
        marker.write_text(options.data)
    print_rank0(f"{options.data}: {dataset['about']}; {dataset['licence']}; {dataset['page']}")
    fetch(dataset["files"], out, image_dir)
    splits = build(options.data, out / "source", image_dir)
    for split in [split for split in SPLITS if split in splits]:
        bad, _ = check_samples(splits[split], None, options.max_length, fault=image_fault)
        bad = [row for row in bad if split != "test" or row.reason != NO_ANSWER]  # some answers are not public
        report = out / f"bad_{split}_samples.jsonl"
        samples = splits[split] = keep_good(splits[split], bad, "skip", 1.0, report=report, source=options.data)
        if not samples:
            raise DataError(f"{options.data}: no sample is left for {split}; {report} says why")
        names = {path: str(path.relative_to(image_dir)) for sample in samples for path in sample.images}
        write_split(out / f"{split}.jsonl", samples, names, f"; {len(bad)} bad ones left out")
    draw_sheet(out / "contact_sheet.png", splits.get("train", []), options.seed)
    shutil.rmtree(out / "downloads", ignore_errors=True)
    marker.unlink()
    return 0


def write_split(path: Path, samples: list, names: dict[Path, str], note: str = "") -> None:
    from mmllm.data.prepared import write_records

    write_records(path, samples, names)
    count = len({image for sample in samples for image in sample.images})
    print_rank0(f"{path}: {len(samples)} samples, {count} images{note}")


def load_processor_of(model: str):
    from mmllm.data.processor_files import load_processor
    from mmllm.models.loading import read_info

    info = read_info(model)
    return load_processor(model, info.config.num_image_tokens, info.system_prompt)


def good_samples(source: str, image_dir: str | None, split: str, options, processor) -> list:
    """The samples of `source` that can be trained on; the others are listed in a file."""
    from mmllm.data.checks import check_samples, decode_fault, describe_left_out, keep_good
    from mmllm.data.samples import read_samples

    samples = read_samples(source, image_dir, split, options.out / UNPACKED / split)
    bad, left_out = check_samples(samples, processor, options.max_length, fault=decode_fault)
    report = options.out / ("bad_samples.jsonl" if split == "train" else f"bad_{split}_samples.jsonl")
    good = keep_good(samples, bad, "skip", 1.0, report=report, source=source)
    if bad:
        print_rank0(
            f"{source}: {len(bad)} of {len(samples)} samples are bad, listed in {report}; the first: {bad[0].reason}"
        )
    if note := describe_left_out(left_out, source, options.max_length):
        print_rank0(note)
    return good


def draw_sheet(path: Path, samples: list, seed: int) -> None:
    """Some samples with an image, and what the model is trained to say about it."""
    from mmllm.data.image import ImageProcessor, decode
    from mmllm.reporting.contact_sheet import draw_contact_sheet

    shown = list({sample.images: sample for sample in samples if sample.images}.values())
    shown = random.Random(seed).sample(shown, min(SHEET, len(shown)))
    if shown:
        crop = ImageProcessor().crop
        texts = (
            "\n".join(m.text.replace("<image>", "").strip() for m in s.messages if m.role != "system") for s in shown
        )
        draw_contact_sheet(path, [(crop(decode(s.images[0])), text) for s, text in zip(shown, texts, strict=True)])
        print_rank0(f"{path}: {len(shown)} of the training samples")


def token_statistics(samples: list, processor) -> str:
    """How long the rows are, one sample a row, and how much of them is trained on."""
    from mmllm.data.chat import IGNORED

    rows = [processor.encode(list(sample.messages)) for sample in samples]
    lengths = sorted(len(row.ids) for row in rows)
    targets = sum(label != IGNORED for row in rows for label in row.labels)
    return (
        f"tokens of a sample: median {lengths[len(lengths) // 2]}, {lengths[int(0.95 * (len(lengths) - 1))]} at 95 %, "
        f"{lengths[-1]} at most (data.max_length); {targets / sum(lengths):.0%} are trained on"
    )
