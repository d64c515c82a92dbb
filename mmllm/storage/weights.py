"""Published weights: read them in any layout, load them strictly.

The main branch of the official CLIP repository has no safetensors, only `pytorch_model.bin`. It is read with
`weights_only=True`, which runs no code from the file. Nothing else in this project reads or writes a pickle.

Tensors are mapped from the file, not copied: a page is read when it is first used.
"""

import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmllm.errors import CheckpointError
from mmllm.runtime.files import read_json, typed

WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile
NAMES_SHOWN = 3


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name: of one file, safetensors or pickled, or of several with an index."""
    for name, read in (
        ("model.safetensors", read_safetensors),
        ("model.safetensors.index.json", read_shards),
        ("pytorch_model.bin", read_bin),
        ("pytorch_model.bin.index.json", read_shards),
    ):
        if (folder / name).exists():
            return unwrapped(read(folder / name))
    raise CheckpointError(
        f"{folder}: no weights; it needs model.safetensors, its shards and index, or pytorch_model.bin"
    )


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without a prefix that wrappers of the saved model gave to all names."""
    if all(WRAPPERS.match(name) for name in tensors):
        return {WRAPPERS.sub("", name, count=1): value for name, value in tensors.items()}
    return tensors


def read_safetensors(file: Path) -> dict[str, Tensor]:
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {file.stat().st_size:,} bytes that are not a whole safetensors file; download it again"
        ) from error


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = typed(_Index, read_json(index), index).weight_map
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if name != os.path.basename(name):
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name; this index is not to be trusted")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent / name}: missing, but {index.name} names it; download it again")
        read = read_safetensors if name.endswith(".safetensors") else read_bin
        tensors |= read(index.parent / name)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} tensors are in no shard, first {missing[0]}; download it again")
    return tensors


def read_bin(file: Path) -> dict[str, Tensor]:
    """A pickled state dict, read without running code from it."""
    refuse_pointer(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a plain file of tensors ({file.stat().st_size:,} bytes); download it again, or use safetensors"
        ) from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):  # a training checkpoint
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: holds something other than named tensors; use the official file or safetensors")
    return tensors


def write_safetensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors`; the mode of the file follows the umask, as that of its folder does. The library makes it 0600."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)


def refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            begin = stream.read(24)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a Git LFS pointer, not weights; run `git lfs pull` in its folder")


def load_strict_(module: nn.Module, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Assigns `tensors` to `module`, built on the meta device; CheckpointError for any difference of names or shapes."""
    wanted = module.state_dict()
    problems = []
    for kind, names in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if names:
            problems.append(f"{len(names)} tensors {kind}, first {', '.join(sorted(names)[:NAMES_SHOWN])}")
    wrong = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    if wrong:
        shown = (
            f"{n} {list(tensors[n].shape)} where {list(wanted[n].shape)} is needed" for n in sorted(wrong)[:NAMES_SHOWN]
        )
        problems.append(f"{len(wrong)} of another shape, first {'; '.join(shown)}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}; config.json and weights must be of the same model")
    module.load_state_dict(tensors, assign=True)


def refuse_integers(tensors: dict[str, Tensor], where: str | Path) -> None:
    """CheckpointError naming the first tensor that is not floating point: quantised weights need their scales."""
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{where}: {name} is {kind}; use the model with plain weights (float16, bfloat16, ...)"
            )


def refuse_not_finite(tensors: dict[str, Tensor], where: str | Path) -> None:
    """CheckpointError naming the first tensor that holds a NaN or an infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{where}: {name} holds numbers that are not finite; these weights are broken")
