"""How many samples a run would train on and how long they are, without a model: for `train.py --dry-run`.

Tokens are counted by the model's tokenizer where its file is here. Elsewhere they are estimated from the length of the
texts in UTF-8, which is about as long for a token of Chinese as of English.
"""

from dataclasses import dataclass

from mmllm.config.schema import ExperimentConfig
from mmllm.data.chat import IGNORED, ChatProcessor, Encoded
from mmllm.data.checks import check_samples, describe_left_out
from mmllm.data.image import ImageProcessor
from mmllm.data.order import split_by_image
from mmllm.data.packing import encode_shared, rough_length
from mmllm.data.samples import Sample, read_samples, share_images
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import DataError
from mmllm.models.config import MultimodalConfig
from mmllm.storage.hub import cached_file
from mmllm.training.step_memory import SampleSize

ENCODED = 500  # samples, the longest by characters, whose tokens are counted
BYTES_PER_TOKEN = 3  # of text; Qwen2.5's tokens have four or more on average, so the estimate is high


@dataclass(frozen=True)
class DataPlan:
    """The number of training samples, the size of the largest, and lines that say where both come from.

    `samples` is None where there is no data to read.
    """

    samples: int | None
    size: SampleSize | None
    lines: tuple[str, ...]


class BytesTokenizer:
    """Stands in for a tokenizer that is not here: every three bytes of a text are a token, with the bytes as its id."""

    image_id = -1

    def id(self, token: str) -> int:
        return -2

    def encode(self, text: str) -> list[int]:
        content = text.encode()
        return [int.from_bytes(content[i : i + BYTES_PER_TOKEN]) for i in range(0, len(content), BYTES_PER_TOKEN)]


def plan_data(config: ExperimentConfig, shape: MultimodalConfig) -> DataPlan:
    """Read the training data of `config`. Images are not opened."""
    data, model = config.data, config.model
    if data.train_data_path is None:
        line = "data.train_data_path is not set: the number of steps is unknown"
        return DataPlan(None, None, (line,))
    try:
        samples = read_samples(data.train_data_path, data.image_dir, data.train_split)[: data.max_train_samples]
    except DataError as error:
        return DataPlan(None, None, (f"{error}: the number of steps is unknown",))
    file = cached_file(model.pretrained or model.qwen, "tokenizer.json")
    tokenizer = Tokenizer(file) if file else BytesTokenizer()
    processor = ChatProcessor(tokenizer, ImageProcessor(), shape.num_image_tokens, model.system_prompt)
    bad, left_out = check_samples(samples, processor if file else None, data.max_length, fault=lambda path: "")
    lines = []
    if bad:
        lines.append(
            f"{len(bad)} of {len(samples)} samples are bad and not counted; the first is {bad[0].file}: {bad[0].reason}"
        )
    if note := describe_left_out(left_out, data.train_data_path, data.max_length):
        lines.append(note)
    dropped = {row.index for row in bad}
    samples = [sample for index, sample in enumerate(samples) if index not in dropped]
    samples = share_images(samples) if data.share_images else samples
    if data.val_fraction:
        samples, _ = split_by_image(samples, data.val_fraction, config.seed)
    size = largest(samples, processor, data.max_length)
    if size:
        texts = max(1 + len(sample.shared) for sample in samples)
        several = f" of up to {texts} texts of an image, in at most {size.rows} rows" * (texts > 1)
        how = f"counted by {file}" if file else "estimated from the bytes of the texts, as no tokenizer is here"
        lines.append(
            f"{len(samples)} samples{several} of at most {size.length} tokens, {size.targets} targets a sample ({how})"
        )
    return DataPlan(len(samples), size, tuple(lines))


def largest(samples: list[Sample], processor: ChatProcessor, max_length: int) -> SampleSize | None:
    """The largest numbers among the samples, which may come from different ones; None where there is no sample."""
    longest = sorted(samples, key=lambda sample: rough_length(sample, processor))[-ENCODED:]
    if not longest:
        return None
    rows = [encoded_rows(sample, processor, max_length) for sample in longest]
    return SampleSize(
        length=min(max_length, max(len(row.ids) for kept in rows for row in kept)),
        targets=max(sum(label != IGNORED for row in kept for label in row.labels) for kept in rows),
        images=max(1, *(len(sample.images) for sample in longest)),
        rows=max(map(len, rows)),
    )


def encoded_rows(sample: Sample, processor: ChatProcessor, max_length: int) -> list[Encoded]:
    """The rows of a sample; where they seem too long for `max_length`, as only an estimate can, without that limit."""
    try:
        return encode_shared(sample, processor, max_length)
    except DataError:
        return encode_shared(sample, processor)
