"""What a frozen vision tower saw, kept in files: features take the place of pixels in a batch.

    data.cache_features=true            made once from the pictures, under outputs/features
    data.features_path=X.safetensors    given, by the names of pictures that need not be there

The surprising fact: half of the bits are enough. In a bfloat16 run the projector's first product rounds its input anyway,
so features kept as bfloat16 give the same loss, bit for bit.

Q visual tokens a picture, F numbers in each.
Next: batches.py, trainer.py.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mmllm.errors import DataError, ImageError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.device import autocast

AT_ONCE = 32  # pictures in one pass of the tower


class FeatureTable:
    """Calls as `table(picture) -> Tensor` (Q, F), float32, for pictures in one of `folders`, by their name in there.

    The file holds one tensor a picture: (Q, F), or (F,) where Q is 1.
    """

    def __init__(self, path: str | Path, folders: Sequence[Path], shape: tuple[int, int]):
        self.path, self.folders, self.shape = path, folders, shape
        try:
            self.file = safe_open(str(path), "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read as safetensors ({error}); it is data.features_path") from error
        self.names = set(self.file.keys())

    def __call__(self, picture: Path) -> Tensor:
        if fault := self.fault(picture):
            raise ImageError(fault, "no_features")
        return self.file.get_tensor(self._name(picture)).float().view(self.shape)

    def fault(self, picture: Path) -> str:
        """Why there are no features of a picture; "" when there are."""
        name = self._name(picture)
        if name not in self.names:
            return f"{self.path}: has no features of {name}; its tensors are called as the pictures in the data file"
        shape = self.file.get_slice(name).get_shape()
        if shape not in (list(self.shape), [self.shape[1]] * (self.shape[0] == 1)):
            return f"{self.path}: {name} is {shape}, but the model takes {list(self.shape)}"
        return ""

    def _name(self, picture: Path) -> str:
        inside = [picture.relative_to(folder).as_posix() for folder in self.folders if picture.is_relative_to(folder)]
        return next((name for name in inside if name in self.names), inside[0] if inside else picture.name)


class FeatureCache:
    """Calls as `cache(picture) -> Tensor` (Q, F), once `fill` has made what was not there.

    A file is called after the tower (weights, kind of features, number format, arithmetic of the pixels) and the content
    of the picture, so it is never wrong, whoever wrote it; it appears whole or not at all, so many processes may write.
    """

    def __init__(self, model: MultimodalLLM, folder: Path, bf16: bool):
        self.model, self.bf16, self.dtype = model, bf16, torch.bfloat16 if bf16 else torch.float32
        self.folder = folder / fingerprint(model, self.dtype)
        self.bytes = len(save({"features": torch.zeros(model.config.feature_shape, dtype=self.dtype)}))
        self.files: dict[Path, Path] = {}
        self.faults: dict[Path, str] = {}  # of pictures that could not be read

    def __call__(self, picture: Path) -> Tensor:
        if picture in self.faults or not self._is_whole(self.files[picture]):
            fault = self.faults.get(picture, f"{picture}: another process could not decode it")
            raise ImageError(fault, "no_features")
        return load_file(self.files[picture])["features"]

    def fill(self, pictures: Iterable[Path], *, rank: int = 0, world_size: int = 1, num_workers: int = 2) -> int:
        """Makes this process's share of what is missing; returns how many features that were."""
        pictures = sorted(set(pictures))
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            for picture, name in zip(pictures, pool.map(self._file, pictures), strict=True):
                if name:
                    self.files[picture] = name
            one_of = {file: picture for picture, file in self.files.items()}  # of those with the same content
            share = list(one_of.items())[rank::world_size]  # not of what is missing: others are at work already
            missing = [picture for file, picture in share if not self._is_whole(file)]
            for start in range(0, len(missing), AT_ONCE):
                self._make(missing[start : start + AT_ONCE], pool)
        return len(missing)

    def _file(self, picture: Path) -> Path | None:
        """Where the features of a picture are, or will be; None when it cannot be read."""
        try:
            content = picture.read_bytes()
        except OSError as error:
            self.faults[picture] = f"{picture}: cannot be read ({error.strerror})"
            return None
        name = hashlib.sha256(content).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _is_whole(self, file: Path) -> bool:
        return file.is_file() and file.stat().st_size == self.bytes

    def _make(self, pictures: list[Path], pool: ThreadPoolExecutor) -> None:
        """Runs the tower over some pictures and writes a file for each that can be decoded."""
        pixels = list(pool.map(self._pixels, pictures))
        good = [picture for picture, image in zip(pictures, pixels, strict=True) if image is not None]
        if not good:
            return
        with torch.no_grad(), autocast(self.model.device, self.bf16):
            features_NQF = self.model.vision_features(torch.stack([image for image in pixels if image is not None]))
        for picture, features_QF in zip(good, features_NQF.to("cpu", self.dtype), strict=True):
            write(self.files[picture], features_QF)

    def _pixels(self, picture: Path) -> Tensor | None:
        try:
            return self.model.processor.image_processor(picture)
        except ImageError as error:
            self.faults[picture] = str(error)
            return None


def write(file: Path, features_QF: Tensor) -> None:
    """The whole file or none: written beside its place, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_bytes(save({"features": features_QF.contiguous()}))
    temporary.replace(file)


def fingerprint(model: MultimodalLLM, dtype: torch.dtype) -> str:
    """Of everything but the picture that decides over its features."""
    config = {
        "vision": model.config.vision.to_dict(),
        "features": model.config.features,
        "pixels": model.processor.image_processor.to_dict(),
        "dtype": str(dtype),
    }
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(model.vision_tower.state_dict().items()):
        total.update(name.encode())
        total.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]
