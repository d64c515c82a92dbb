"""Texts about the same pictures in one row: what they share stands there once."""

from mmllm.data.chat import IGNORED, ChatProcessor, Encoded
from mmllm.data.samples import Sample

PADDING = -1  # the branch of what is no token


def pack(rows: list[Encoded], image_id: int, max_length: int | None = None) -> list[Encoded]:
    """Conversations about the same pictures in as few rows of at most `max_length` tokens as their order allows.

    Shared is what all of them begin with and do not learn. Where this does not hold every picture (`image_id` is the
    token in its places), they stay as they are.
    """
    if len(rows) == 1:
        return rows
    prefix = common_prefix(rows)
    if any(image_id in row.ids[prefix:] for row in rows):
        return rows
    parts: list[list[Encoded]] = []
    for row in rows:
        length = prefix + sum(len(other.ids) - prefix for other in [*(parts[-1] if parts else []), row])
        if parts and (max_length is None or length <= max_length):
            parts[-1].append(row)
        else:
            parts.append([row])
    return [pack_rows(part, prefix) for part in parts]


def common_prefix(rows: list[Encoded]) -> int:
    """How many tokens all rows begin with and none of them learns."""
    most = min(next(t for t, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    return next((t for t in range(most) if any(row.ids[t] != rows[0].ids[t] for row in rows)), most)


def pack_rows(rows: list[Encoded], prefix: int) -> Encoded:
    """One row of what `rows` share, followed by the rest of each."""
    first = rows[0]
    if len(rows) == 1:
        return first
    ids, labels, segment_ids = list(first.ids[:prefix]), list(first.labels[:prefix]), [0] * prefix
    for branch, row in enumerate(rows, 1):
        ids += row.ids[prefix:]
        labels += row.labels[prefix:]
        segment_ids += [branch] * (len(row.ids) - prefix)
    return Encoded(ids, labels, first.num_images, segment_ids)


def encode_shared(sample: Sample, processor: ChatProcessor, max_length: int | None = None) -> list[Encoded]:
    """The texts of `read_rows`."""
    texts = [processor.encode(list(one.messages), max_length) for one in (sample, *sample.shared)]
    return pack(texts, processor.tokenizer.image_id, max_length)
