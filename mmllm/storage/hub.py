"""Where a model lies: a local folder, or a repository of the Hugging Face hub.

`NAME@REVISION` names a branch, tag, commit or `refs/pr/15` of a repository. Only files that are read here are
downloaded, once. When the hub cannot be reached, for whatever reason, an earlier download is used.
"""

import re
from pathlib import Path

from mmllm.errors import CheckpointError
from mmllm.runtime.console import stderr_rank0

SMALL_FILES = [
    *("config.json", "open_clip_config.json", "mmllm.json", "adapter_config.json"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json"),
]
WEIGHTS = (  # the first kind that a repository has; beside open_clip's file model.safetensors may be timm's
    ["open_clip*.safetensors"],
    ["model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
    ["open_clip_pytorch_model.bin"],
)
REPOSITORY = re.compile(  # the names that the hub's library takes; it raises an error of its own for others
    r"(?![^@]*(?:--|\.\.|\.git(?:@|$)))([A-Za-z0-9](?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?)(?:@([\w./-]+))?"
)
ANSWERS = {  # what to do about an HTTP status of the hub or of a proxy
    401: "there is no such repository, or it is private; check the name, or log in with `hf auth login`",
    403: "access is refused; accept the model's licence on its page and log in with `hf auth login`",
    404: "there is no such repository or revision; check the name",
    407: "the proxy wants a login; set HTTPS_PROXY=http://NAME:PASSWORD@HOST:PORT",
    429: "too many requests; wait a few minutes, or log in with `hf auth login`",
}


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder of `source`. Without `weights` only the small files of a repository are downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source}: a file; name the folder that holds config.json and the weights")
    repository, revision = split_name(source)
    if not weights and (found := cached_folder(repository, revision, weights)):
        return found
    try:
        return download(repository, revision, weights)
    except Exception as error:  # the hub library and the network under it have a type for each failure
        found = cached_folder(repository, revision, weights)
        if found is None:
            raise CheckpointError(
                f"{source}: not a folder here, and not available from the hub ({reason(error)}); or download it by hand "
                "and name its folder"
            ) from error
        stderr_rank0(f"warning: {source}: the earlier download {found.name[:8]} is used; the hub: {reason(error)}")
        return found


def split_name(source: str | Path) -> tuple[str, str | None]:
    """Repository and revision of `source`; CheckpointError where it can only be a path."""
    found = REPOSITORY.fullmatch(str(source))
    if not found:
        raise CheckpointError(f"{source}: no such folder; name a folder with config.json and model.safetensors")
    return found[1], found[2]


def download(repository: str, revision: str | None, weights: bool) -> Path:
    # imported here: 0.4 s, which a local folder does not need
    from huggingface_hub import snapshot_download

    for patterns in WEIGHTS if weights else ([],):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*SMALL_FILES, *patterns]))
        if not weights or has_weights(folder, patterns):
            return folder
    raise CheckpointError("it has no weights in a format that is read here")


def has_weights(folder: Path, patterns: list[str]) -> bool:
    return any(path.suffix != ".json" for pattern in patterns for path in folder.glob(pattern))


def cached_folder(repository: str, revision: str | None, weights: bool) -> Path | None:
    """The folder of an earlier download that has what is needed.

    Without a revision any commit will do: the newest may be known and not yet downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, name, revision=revision) for name in SMALL_FILES[:2]]
    folders = [Path(file).parent for file in found if isinstance(file, str)]
    if folders and revision is None:
        folders += sorted(folders[0].parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    complete = (f for f in folders if not weights or any(has_weights(f, patterns) for patterns in WEIGHTS))
    return next(complete, None)


def cached_file(source: str | Path, name: str) -> Path | None:
    """The file `name` of a local folder, or of a repository of the hub where an earlier download has it; else None."""
    file = Path(source).expanduser() / name
    if file.is_file() or not REPOSITORY.fullmatch(str(source)):
        return file if file.is_file() else None
    folder = cached_folder(*split_name(source), weights=False)
    return folder / name if folder and (folder / name).is_file() else None


def reason(error: BaseException) -> str:
    """Why a download failed, in one line, and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, CheckpointError):
            return str(cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and no earlier download is complete"
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return f"HTTP {status}, {ANSWERS.get(status, 'try again later')}"
        if re.match(r"\d{3} ", str(cause)):  # "407 Proxy Authentication Required", before the hub is reached
            return f"the proxy answers {str(cause)[:60]}; see HTTPS_PROXY=http://NAME:PASSWORD@HOST:PORT and NO_PROXY"
    if any(isinstance(cause, ValueError) for cause in chain):  # no JSON
        return "its answer is not the hub's; is there a login page of the network in between?"
    text, *_ = [*str(chain[-1]).strip().splitlines(), ""]
    return f"{type(chain[-1]).__name__} {text[:150]}".strip()
