"""What was computed for images and for beginnings of prompts, kept for the requests that need it again.

Keys and values are kept in blocks of a fixed number of tokens. The key of a block is a hash of all tokens and images up to
its end, so a block is found only behind the same beginning, and texts that begin alike share their blocks
(https://docs.vllm.ai/en/latest/design/prefix_caching.html). Images are found by their pixels.
"""

import hashlib
from array import array
from collections import OrderedDict

from torch import Tensor


class PrefixStore:
    """Tensors by key, at most `limit_bytes` in all (0: nothing is kept); the least recently used are dropped."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.bytes = limit_bytes, 0
        self.tensors: OrderedDict[bytes, Tensor] = OrderedDict()  # least recently used first
        self.hits = self.misses = 0  # images, and blocks of tokens

    def __contains__(self, key: bytes) -> bool:
        return key in self.tensors

    def get(self, key: bytes) -> Tensor | None:
        tensor = self.tensors.get(key)
        if tensor is None:
            self.misses += 1
            return None
        self.hits += 1
        self.tensors.move_to_end(key)
        return tensor

    def put(self, key: bytes, tensor: Tensor) -> None:
        """Keeps a tensor that has memory of its own: a view would keep more than its bytes."""
        if key in self.tensors or tensor.nbytes > self.limit_bytes:
            return
        while self.bytes + tensor.nbytes > self.limit_bytes:
            _, dropped = self.tensors.popitem(last=False)
            self.bytes -= dropped.nbytes
        self.tensors[key] = tensor
        self.bytes += tensor.nbytes

    def touch(self, keys: list[bytes]) -> None:
        """Marks the blocks of a text as used, the last one first: an end is dropped before the beginning it needs."""
        for key in reversed(keys):
            if key in self.tensors:
                self.tensors.move_to_end(key)

    def clear(self) -> None:
        """Forgets everything; needed when the model's weights have changed."""
        self.tensors.clear()
        self.bytes = 0


def image_key(pixels_3SS: Tensor) -> bytes:
    return hashlib.sha256(pixels_3SS.float().contiguous().numpy()).digest()


def block_keys(ids: tuple[int, ...], block: int, image_id: int, image_keys: list[bytes]) -> list[bytes]:
    """The key of every whole block of `ids`; `image_keys` has the key of the image at each place of an image in them."""
    digest, keys, places = hashlib.sha256(), [], 0
    for start in range(0, len(ids) - block + 1, block):
        tokens = ids[start : start + block]
        digest.update(array("q", tokens))
        before, places = places, places + tokens.count(image_id)
        digest.update(b"".join(image_keys[before:places]))
        keys.append(digest.digest())
    return keys
