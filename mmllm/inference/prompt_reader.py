"""A prompt on its way into a slot: what the store has of it, its images one by one, then its tokens piece by piece.

Keys and values are reused in whole blocks. Where our kernels compute, a row has the same bits in any pass, so a piece may
have any length; elsewhere every block is read alone and whole. So an answer has the same bits with the store and without.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmllm.inference.model_runner import ModelRunner, Piece
from mmllm.inference.prefix_store import PrefixStore, block_keys, image_key
from mmllm.inference.request import Prompt

IMAGE_COST = 16  # tokens that the language model reads in the time in which the vision tower encodes an image


class PromptReader:
    """Reads one prompt into `slot`. ValueError if it has more or fewer places for images than its images need."""

    def __init__(self, runner: ModelRunner, store: PrefixStore, prompt: Prompt, slot: int, number: int):
        self.runner, self.store, self.ids, self.pixels, self.slot = runner, store, prompt.ids, prompt.pixels, slot
        self.number = number  # of prompts that came before
        self.position = 0  # tokens that are in the cache
        self.reused = 0  # tokens that the store had
        self.image_id, self.per_image = runner.model.config.image_token_id, runner.model.config.num_image_tokens
        places, images = self.ids.count(self.image_id), len(self.pixels)
        if places != images * self.per_image:
            raise ValueError(f"{places} image places in the text for {images} images of {self.per_image} tokens")
        self.image_keys = [image_key(pixels_3SS) for pixels_3SS in self.pixels] if store.limit_bytes else []
        self.keys = self.keys_of(self.ids)
        self.images: dict[int, Tensor] = {}  # visual tokens (Q, D), by the number of the image
        self.rest_TD: Tensor | None = None  # what is left to read; None until the images in it are encoded

    @property
    def unread(self) -> int:
        return len(self.ids) - self.position

    def keys_of(self, ids: tuple[int, ...]) -> list[bytes]:
        """The keys of the blocks of a text that begins with this prompt; none without a store."""
        if not self.store.limit_bytes:
            return []
        places = [key for key in self.image_keys for _ in range(self.per_image)]
        return block_keys(ids, self.runner.block, self.image_id, places)

    def next_piece(self, budget: int, coming: set[bytes]) -> tuple[Piece | None, int]:
        """The next piece and what it costs, in tokens; no piece while images are missing or a block is `coming` that
        another prompt is computing in this step. Its own blocks are added to `coming`.
        """
        cost = 0
        if self.rest_TD is None:
            cost = self._prepare(budget, coming)
            if self.rest_TD is None or cost >= budget:
                return None, cost
        block, start = self.runner.block, self.position
        length = min(budget - cost if self.runner.is_row_exact else block, self.unread)
        coming.update(self.keys[start // block : (start + length) // block])
        return Piece(self.slot, start, self.rest_TD[:length], length == self.unread), cost + length

    def advance(self, piece: Piece) -> None:
        """A piece has been read."""
        self.position += len(piece.x_TD)
        self.rest_TD = None if piece.is_last else self.rest_TD[len(piece.x_TD) :]
        self.keep(self.keys, self.slot, piece.start, self.position)

    def keep(self, keys: list[bytes], slot: int, start: int, end: int) -> None:
        """Keeps the blocks that were completed by positions `start` to `end` of a slot."""
        block = self.runner.block
        for i in range(start // block, min(len(keys), end // block)):
            if keys[i] not in self.store:
                self.store.put(keys[i], self.runner.cache.read(slot, i * block, (i + 1) * block))
        self.store.touch(keys[: end // block])

    def _prepare(self, budget: int, coming: set[bytes]) -> int:
        """Encodes the images that are not in the store, as far as the budget allows, then takes the beginning from the
        store and embeds the rest. Returns the cost."""
        usable = self.keys[: (len(self.ids) - 1) // self.runner.block]  # the last token is read: its logits are needed
        found = next((i for i, key in enumerate(usable) if key not in self.store), len(usable))
        if not coming.isdisjoint(usable[found : found + 1]):
            return 0
        blocks = [self.store.tensors[key] for key in usable[:found]]  # held: images may push them out of the store
        start, cost = found * self.runner.block, 0
        skipped = self.ids[:start].count(self.image_id)
        first = skipped // self.per_image
        for i in range(first, len(self.pixels)):
            if i in self.images:
                continue
            if cost >= budget:
                return cost
            self.images[i], is_new = self._image(i)
            cost += IMAGE_COST * is_new
        for i, block in enumerate(blocks):
            self.runner.cache.write(self.slot, i * self.runner.block, block)
        self.store.hits += found
        self.store.misses += len(usable) - found
        self.store.touch(usable[:found])
        images = [self.images[i] for i in range(first, len(self.pixels))]
        images_ND = torch.cat(images)[skipped % self.per_image :] if images else None
        self.rest_TD = self.runner.embed(self.ids[start:], images_ND)
        self.position = self.reused = start
        self.images.clear()
        return cost

    def _image(self, i: int) -> tuple[Tensor, bool]:
        """The visual tokens of an image, and whether they had to be computed."""
        image_QD = self.store.get(self.image_keys[i]) if self.image_keys else None
        if image_QD is not None:
            return image_QD, False
        image_QD = self.runner.encode_image(self.pixels[i])
        if self.image_keys:
            self.store.put(self.image_keys[i], image_QD)
        return image_QD, True


def next_pieces(
    readers: list[PromptReader],
    budget: int,
    is_shortest_first: bool,
    on_error: Callable[[PromptReader, BaseException], None],
) -> tuple[list[tuple[PromptReader, Piece]], int]:
    """What to read in a step that has time for `budget` tokens, and what that and its images cost in tokens.

    `is_shortest_first` in every second step lets no short prompt wait for the end of a long one, and none wait for ever.
    """
    readers = sorted(readers, key=lambda reader: reader.unread if is_shortest_first else reader.number)
    pieces, cost, coming = [], 0, set()
    for reader in readers:
        if cost >= budget:
            break
        try:
            piece, more = reader.next_piece(budget - cost, coming)
        except torch.OutOfMemoryError as error:
            on_error(reader, error)
            continue
        cost += more
        if piece is not None:
            pieces.append((reader, piece))
    return pieces, cost
