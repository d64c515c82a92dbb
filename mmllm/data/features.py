"""Features of a frozen vision tower in files: they take the place of pixels in a batch.

    data.cache_features=true            FeatureCache: computed once per image, under outputs/features
    data.features_path=X.safetensors    FeatureTable: given by image name; the images need not be there

Half of the bits are enough: in a bfloat16 run the projector's first product rounds its input anyway, so features kept
as bfloat16 give the same loss, bit for bit.

N images of (3, S, S) pixels, Q visual tokens of F features each.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mmllm.data.image import ImageProcessor, read_bytes
from mmllm.errors import DataError, ImageError
from mmllm.runtime.console import progress
from mmllm.runtime.files import writing
from mmllm.runtime.threads import worker_pool

BATCH_SIZE = 32  # images in one pass of the tower


class FeatureTable:
    """`table(image_path)` returns float32 features (Q, F) of an image in one of `folders`, by its path in there.

    The file holds one tensor per image: (Q, F), or (F,) where Q is 1.
    """

    def __init__(self, path: str | Path, folders: Sequence[Path], shape: tuple[int, int]):
        self.path, self.folders, self.shape = path, folders, shape
        try:
            self.file = safe_open(str(path), "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read as safetensors ({error}); it is data.features_path") from error
        self.names = set(self.file.keys())

    def __call__(self, image: Path) -> Tensor:
        if fault := self.fault(image):
            raise ImageError(fault, "no_features")
        return self.file.get_tensor(self._name(image)).float().view(self.shape)

    def fault(self, image: Path) -> str:
        """Why there are no features of an image; "" when there are."""
        name = self._name(image)
        if name not in self.names:
            return f"{self.path}: has no features of {name}; its tensors are named as the images in the data file"
        shape = self.file.get_slice(name).get_shape()
        if shape not in (list(self.shape), [self.shape[1]] * (self.shape[0] == 1)):
            return f"{self.path}: {name} is {shape}, but the model takes {list(self.shape)}"
        return ""

    def _name(self, image: Path) -> str:
        inside = [image.relative_to(folder).as_posix() for folder in self.folders if image.is_relative_to(folder)]
        return next((name for name in inside if name in self.names), inside[0] if inside else image.name)


class FeatureCache:
    """`cache(image_path)` returns features (Q, F) of `dtype`, once `fill` has computed the missing ones.

    `encode` turns pixels (N, 3, S, S) into features (N, Q, F). `folder` belongs to one tower, see `fingerprint`; a file in
    it is named after the content of the image, so it stays correct whoever writes it. Files are written atomically, so
    several processes may write at once.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        processor: ImageProcessor,
        folder: Path,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ):
        self.encode, self.processor, self.folder, self.dtype = encode, processor, folder, dtype
        self.file_bytes = len(save({"features": torch.zeros(shape, dtype=dtype)}))
        self.files: dict[Path, Path] = {}
        self.faults: dict[Path, str] = {}  # by image that cannot be read

    def __call__(self, image: Path) -> Tensor:
        if image in self.faults or not self._is_complete(self.files[image]):
            fault = self.faults.get(image, f"{image}: another process could not decode it")
            raise ImageError(fault, "no_features")
        return load_file(self.files[image])["features"]

    def fill(self, images: Iterable[Path], *, rank: int = 0, world_size: int = 1, num_workers: int = 2) -> int:
        """Computes this process's share of the missing features; returns how many."""
        images = sorted(set(images))
        with worker_pool(max(1, num_workers), "features") as pool:
            for image, file in zip(images, pool.map(self._file, images), strict=True):
                if file:
                    self.files[image] = file
            by_file = {file: image for image, file in self.files.items()}  # one image of those with the same content
            share = list(by_file.items())[rank::world_size]  # of all, not of the missing: others are already writing
            missing = [image for file, image in share if not self._is_complete(file)]
            starts = range(0, len(missing), BATCH_SIZE)
            for start in progress(starts, len(starts), f"features, batches of {BATCH_SIZE} images"):
                self._compute(missing[start : start + BATCH_SIZE], pool)
        return len(missing)

    def _file(self, image: Path) -> Path | None:
        """Where the features of an image are or will be; None when it cannot be read."""
        try:
            content = read_bytes(image)
        except ImageError as error:
            self.faults[image] = str(error)
            return None
        name = hashlib.sha256(content).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _is_complete(self, file: Path) -> bool:
        return file.is_file() and file.stat().st_size == self.file_bytes

    def _compute(self, images: list[Path], pool: ThreadPoolExecutor) -> None:
        """Encodes some images and writes a file for each that can be decoded."""
        pixels = list(pool.map(self._pixels, images))
        good = [image for image, image_3SS in zip(images, pixels, strict=True) if image_3SS is not None]
        if not good:
            return
        features_NQF = self.encode(torch.stack([image_3SS for image_3SS in pixels if image_3SS is not None]))
        for image, features_QF in zip(good, features_NQF.to("cpu", self.dtype), strict=True):
            write_features(self.files[image], features_QF)

    def _pixels(self, image: Path) -> Tensor | None:
        try:
            return self.processor(image)
        except ImageError as error:
            self.faults[image] = str(error)
            return None


def write_features(file: Path, features_QF: Tensor) -> None:
    """Writes the file atomically; threads and processes may write the same one. RunError where the disk is full."""
    temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    with writing(file, "free some space, or set data.cache_features=false"):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(save({"features": features_QF.contiguous()}))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def fingerprint(settings: dict, weights: Mapping[str, Tensor]) -> str:
    """A name for everything but the image that decides its features: the tower's settings and weights."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        total.update(name.encode())
        total.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]
