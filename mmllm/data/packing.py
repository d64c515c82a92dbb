"""Texts about the same images in one row, which holds what they share once; models/shared_prefix.py has the masks.

row          system, image, prompt | A cat.<|im_end|> | A cat sits.<|im_end|> | padding
segment_ids  0 0 0 0 0 0 0 0 0 0 0 | 1 1 1  1         | 2 2 2   2  2          | -1 -1

Where the prompts differ before the image, each text has places of its own for it, and the image is still encoded once.
"""

from mmllm.data.chat import IGNORED, IMAGE, ChatProcessor, Encoded
from mmllm.data.samples import Sample

PADDING = -1  # the segment of padding


def encode_shared(sample: Sample, processor: ChatProcessor, max_length: int | None = None) -> list[Encoded]:
    """The rows of a sample and of those that share its images."""
    encoded = [processor.encode(list(one.messages), max_length) for one in (sample, *sample.shared)]
    return pack(encoded, processor.tokenizer.image_id, max_length)


def pack(rows: list[Encoded], image_id: int, max_length: int | None = None) -> list[Encoded]:
    """Conversations about the same images in few rows of at most `max_length` tokens, in their order.

    They share what all of them begin with and none is trained on.
    """
    if len(rows) == 1:
        return rows
    prefix = common_prefix(rows)
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
    places = rows[0].ids.count(image_id)
    shared_images = rows[0].ids[:prefix].count(image_id) * len(rows[0].images) // max(1, places)
    return [pack_group(group, prefix, shared_images) for group in groups]


def common_prefix(rows: list[Encoded]) -> int:
    """The number of tokens that all rows begin with and none is trained on."""
    end = min(next(t for t, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    return next((t for t in range(end) if any(row.ids[t] != rows[0].ids[t] for row in rows)), end)


def pack_group(rows: list[Encoded], prefix: int, shared_images: int) -> Encoded:
    """One row: the first `prefix` tokens with `shared_images`, which `rows` share, followed by the rest of each."""
    first = rows[0]
    if len(rows) == 1:
        return first
    ids, labels, segment_ids = first.ids[:prefix], first.labels[:prefix], [0] * prefix
    images = first.images[:shared_images]
    for segment, row in enumerate(rows, 1):
        ids += row.ids[prefix:]
        labels += row.labels[prefix:]
        segment_ids += [segment] * (len(row.ids) - prefix)
        images += row.images[shared_images:]
    return Encoded(ids, labels, images, segment_ids)


def rough_length(sample: Sample, processor: ChatProcessor) -> int:
    """About the length of the sample's row in characters, found without tokenizing; a visual token counts as four."""
    messages = [message for one in (sample, *sample.shared) for message in one.messages]
    characters = sum(len(part) for message in messages for part in message.parts if part is not IMAGE)
    return characters + 4 * processor.num_image_tokens * len(sample.images)
