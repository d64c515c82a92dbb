"""Texts about the same images in one row, which holds what they share once; models/shared_prefix.py has the masks.

row          system, image, prompt | A cat.<|im_end|> | A cat sits.<|im_end|> | padding
segment_ids  0 0 0 0 0 0 0 0 0 0 0 | 1 1 1  1         | 2 2 2   2  2          | -1 -1
"""

from mmllm.data.chat import IGNORED, ChatProcessor, Encoded
from mmllm.data.samples import Sample

PADDING = -1  # the segment of padding


def encode_shared(sample: Sample, processor: ChatProcessor, max_length: int | None = None) -> list[Encoded]:
    """The rows of a sample and of those that share its images."""
    encoded = [processor.encode(list(one.messages), max_length) for one in (sample, *sample.shared)]
    return pack(encoded, processor.tokenizer.image_id, max_length)


def pack(rows: list[Encoded], image_id: int, max_length: int | None = None) -> list[Encoded]:
    """Conversations about the same images in few rows of at most `max_length` tokens, in their order.

    They share what all of them begin with and none is trained on. Where that does not include every image (a token
    `image_id` comes later), the rows stay as they are.
    """
    if len(rows) == 1:
        return rows
    prefix = common_prefix(rows)
    if any(image_id in row.ids[prefix:] for row in rows):
        return rows
    groups: list[list[Encoded]] = []
    length = 0
    for row in rows:
        rest = len(row.ids) - prefix
        if groups and (max_length is None or length + rest <= max_length):
            groups[-1].append(row)
            length += rest
        else:
            groups.append([row])
            length = prefix + rest
    return [pack_group(group, prefix) for group in groups]


def common_prefix(rows: list[Encoded]) -> int:
    """The number of tokens that all rows begin with and none is trained on."""
    end = min(next(t for t, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    return next((t for t in range(end) if any(row.ids[t] != rows[0].ids[t] for row in rows)), end)


def pack_group(rows: list[Encoded], prefix: int) -> Encoded:
    """One row: the first `prefix` tokens, which `rows` share, followed by the rest of each."""
    first = rows[0]
    if len(rows) == 1:
        return first
    ids, labels, segment_ids = first.ids[:prefix], first.labels[:prefix], [0] * prefix
    for segment, row in enumerate(rows, 1):
        ids += row.ids[prefix:]
        labels += row.labels[prefix:]
        segment_ids += [segment] * (len(row.ids) - prefix)
    return Encoded(ids, labels, first.num_images, segment_ids)
