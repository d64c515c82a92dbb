"""Published weights: find them, read them, load them strictly.

The main branch of the official CLIP repository has no safetensors, only `pytorch_model.bin`. It is read with
`weights_only=True`, which runs no code from the file. Nothing else in this project reads or writes a pickle.

Tensors are mapped from the file, not copied: a page is read when it is first used.
"""

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmllm.errors import CheckpointError
from mmllm.runtime.files import read_json

SMALL_FILES = ["*.json", "*.jinja", "merges.txt"]
NAMES_SHOWN = 3


def locate(source: str | Path) -> Path:
    """The folder of `source`: a local one, or a repository of the Hugging Face hub, downloaded once and cached."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source}: a file; name the folder that holds config.json and the weights")
    if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise CheckpointError(f"{source}: no such folder; name a folder with config.json and model.safetensors")
    # imported here: 0.4 s, which a local folder does not need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*SMALL_FILES, "*model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*SMALL_FILES, "pytorch_model.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: not a folder here and not available from the hub ({type(error).__name__}); download it by hand and "
            "name its folder, which holds config.json and model.safetensors"
        ) from error
    return folder


def cached_file(source: str | Path, name: str) -> Path | None:
    """The file `name` of a local folder, or of a repository of the hub where an earlier download has it; else None."""
    folder = Path(source).expanduser()
    if folder.is_dir() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(source), name)
    return Path(found) if isinstance(found, str) else None


def locate_config(source: str | Path) -> Path:
    """The config.json of a local folder or of a repository of the hub, of which no other file is downloaded."""
    found = cached_file(source, "config.json")
    if found:
        return found
    if Path(source).expanduser().exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder with a config.json in it")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(str(source), "config.json"))
    except Exception as error:  # offline, unknown or gated: the library and the network have a type for each
        raise CheckpointError(
            f"{source}: no such folder here, and its config.json cannot be read from the hub ({type(error).__name__}); "
            "connect, or name a folder that holds the config.json"
        ) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name: one safetensors file, shards with an index, or `pytorch_model.bin`."""
    for name, read in (
        ("model.safetensors", read_safetensors),
        ("model.safetensors.index.json", read_shards),
        ("pytorch_model.bin", read_bin),
    ):
        if (folder / name).exists():
            return read(folder / name)
    raise CheckpointError(
        f"{folder}: no weights; it needs model.safetensors, its shards and index, or pytorch_model.bin"
    )


def read_safetensors(file: Path) -> dict[str, Tensor]:
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {file.stat().st_size:,} bytes that are not a whole safetensors file; download it again"
        ) from error


def read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map", {})
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if name != os.path.basename(name):
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name; this index is not to be trusted")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent / name}: missing, but {index.name} names it; download it again")
        tensors |= read_safetensors(index.parent / name)
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
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: holds something other than named tensors; use the official file or safetensors")
    return tensors


def refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(24).startswith(b"version https://git-lfs"):
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
