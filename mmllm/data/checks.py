"""Samples that cannot be trained on: found before the first step, listed, and refused or left out.

An image is judged by its header and its last bytes. Decoding every image up front would cost as much as reading an epoch,
and a truncated file already shows at its end. An image that is damaged in between shows when it is used, see BatchLoader.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mmllm.config.schema import DataConfig
from mmllm.data.chat import IMAGE, NO_ANSWER, ChatProcessor, Encoded, has_target
from mmllm.data.image import decode, open_checked
from mmllm.data.samples import Sample, read_samples, share_images
from mmllm.errors import DataError, ImageError
from mmllm.runtime.console import progress, warned_of_disk
from mmllm.runtime.threads import worker_pool

HEAD_BYTES = 1 << 16
END_OF = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True)
class BadSample:
    """Why the sample `index` cannot be used, and of which file or id it is."""

    index: int
    file: str
    reason: str


def describe_left_out(rows: list[Encoded], source: str, max_length: int) -> str:
    """One line about the exchanges that data.max_length leaves out of `rows`; "" when there are none."""
    if not rows:
        return ""
    exchanges, tokens = sum(row.left_out_exchanges for row in rows), sum(row.left_out_tokens for row in rows)
    return (
        f"{source}: {exchanges} exchanges ({tokens} tokens) of {len(rows)} samples are left out, because these are longer "
        f"than data.max_length={max_length}"
    )


def checked_samples(
    path: str | Path,
    settings: DataConfig,
    processor: ChatProcessor,
    report: Path,
    *,
    split: str,
    image_dir: str | None = None,
    limit: int | None = None,
    fault: Callable[[Path], str] | None = None,
) -> tuple[list[Sample], str]:
    """The first `limit` samples of `path` for a run, without the bad ones where `settings` allow some; and a line about
    what `max_length` leaves out of them, "" for nothing.

    `image_dir` None: that of `settings`. `fault(path)` says what is wrong with an image, "" when nothing is; default:
    `image_fault`.
    """
    samples = read_samples(path, image_dir or settings.image_dir, split)[:limit]
    workers = settings.num_workers
    bad, left_out = check_samples(samples, processor, settings.max_length, num_workers=workers, fault=fault)
    good = keep_good(samples, bad, settings.bad_samples, settings.max_bad_fraction, report=report, source=str(path))
    return share_images(good) if settings.share_images else good, describe_left_out(
        left_out, str(path), settings.max_length
    )


def check_samples(
    samples: list[Sample],
    processor: ChatProcessor | None,
    max_length: int,
    *,
    num_workers: int = 2,
    fault: Callable[[Path], str] | None = None,
) -> tuple[list[BadSample], list[Encoded]]:
    """Every sample that cannot be trained on, in order, and why; and the rows of those that lose their oldest exchanges
    to `max_length`. Reads 64 kB of each image.

    Without a `processor` the lengths in tokens are not checked.
    """
    with worker_pool(max(1, num_workers), "check") as pool:
        files = sorted({path for sample in samples for path in sample.images})
        faults = progress(pool.map(fault or image_fault, files), len(files), "checking images")
        reason_of = {path: reason for path, reason in zip(files, faults, strict=True) if reason}
    bad, left_out = [], []
    for index, sample in enumerate(progress(samples, len(samples), "checking samples")):
        broken = next((path for path in sample.images if path in reason_of), None)
        reason = reason_of[broken] if broken else sample.fault or text_fault(sample, processor, max_length, left_out)
        if reason:
            bad.append(BadSample(index, str(broken or sample.id), reason))
    return bad, left_out


def image_fault(path: Path) -> str:
    """What is wrong with an image file; "" when nothing is, as far as its two ends show."""
    return "" if looks_complete(path) else decode_fault(path)


def decode_fault(path: Path) -> str:
    """The same, of the whole image."""
    try:
        decode(path)
    except ImageError as error:
        return str(error)
    return ""


def looks_complete(path: Path) -> bool:
    """Whether a file begins as a JPEG or PNG within the limits and ends as one; False for other formats."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(-min(len(head), 16), os.SEEK_END)
            tail = file.read()
        kind = open_checked(head, path.name).format
    except (OSError, ValueError, ImageError):
        return False
    return kind in END_OF and tail.endswith(END_OF[kind])


def text_fault(sample: Sample, processor: ChatProcessor | None, max_length: int, left_out: list[Encoded]) -> str:
    """What is wrong with the texts of a sample; "" when nothing is. Adds to `left_out` what does not fit."""
    try:
        if processor is None:
            for message in sample.messages:
                message.text.encode()
            return "" if has_target(sample.messages) else NO_ANSWER
        if not fits_by_bytes(sample, processor, max_length):
            row = processor.encode(list(sample.messages), max_length)
            left_out += [row] if row.left_out_exchanges else []
    except UnicodeEncodeError:
        return "a text holds half of a character (a lone surrogate); write the whole character"
    except DataError as error:
        return str(error)
    return ""


def fits_by_bytes(sample: Sample, processor: ChatProcessor, max_length: int) -> bool:
    """Whether a sample has an answer and surely fits, without tokenizing: 600,000 captions in seconds, not minutes.

    A token is at least one byte, NFC makes at most three bytes of one, and a turn adds five tokens.
    """
    parts = [part for message in sample.messages for part in message.parts if part is not IMAGE]
    most = 3 * sum(len(part.encode()) for part in [processor.system, *parts])
    most += 8 * (len(sample.messages) + 1) + (processor.num_image_tokens + 2) * len(sample.images)
    return most <= max_length and has_target(sample.messages)


def keep_good(
    samples: list[Sample], bad: list[BadSample], policy: str, max_fraction: float, *, report: Path, source: str
) -> list[Sample]:
    """The samples without the bad ones under policy "skip"; DataError under "error", or when more than `max_fraction`
    of all are bad. The bad ones are listed in `report`."""
    if not bad:
        if report.is_file():
            report.unlink()  # from an earlier run
        return samples
    with warned_of_disk(report):
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("".join(json.dumps(asdict(row)) + "\n" for row in bad), encoding="utf-8")
    first = f"sample {bad[0].index} ({bad[0].file}): {bad[0].reason}"
    count = f"{source}: {len(bad)} of {len(samples)} samples are bad"
    fraction = f"data.max_bad_fraction={max_fraction}"
    if policy == "error":
        mend = f"; fix those listed in {report}, or set data.bad_samples=skip, which leaves out up to {fraction} of all"
        raise DataError(f"{count}{mend}. The first is {first}")
    if len(bad) > max_fraction * len(samples):
        raise DataError(f"{count}, more than {fraction} allows; they are listed in {report}. The first is {first}")
    dropped = {row.index for row in bad}
    return [sample for index, sample in enumerate(samples) if index not in dropped]


def refuse_broken(samples: list[Sample], faults: Mapping[Path, str], settings: DataConfig, report: Path) -> None:
    """DataError for more images that cannot be decoded (`faults`) than `settings` allow; the others are replaced later."""
    bad = [
        BadSample(index, str(image), faults[image])
        for index, sample in enumerate(samples)
        for image in sample.images
        if image in faults
    ]
    if len(bad) > (settings.max_bad_fraction * len(samples) if settings.bad_samples == "skip" else 0):
        keep_good(samples, bad, settings.bad_samples, settings.max_bad_fraction, report=report, source="the images")
