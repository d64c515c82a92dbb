"""Upload a model directory with a model card to the Hugging Face hub; or only write the folder that would be uploaded.

    mmllm push outputs/own/best_model me/my-captioner --private
    mmllm push outputs/own/best_model me/my-captioner --out hub/my-captioner    # look at it first; uploads nothing

The card has the scores of `mmllm evaluate`, the training command and the data. The optimizer's state stays here.
Log in with `hf auth login`.
"""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mmllm.commands import make_parser
from mmllm.errors import RunError, UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("push", __doc__)
    parser.add_argument("model", metavar="DIR", help="a model directory, such as outputs/own/best_model")
    parser.add_argument("name", metavar="USER/NAME", help="the repository on the hub; made where there is none")
    parser.add_argument("--license", default="other", metavar="ID", help="of the model card (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--out", metavar="FOLDER", help="write the folder here and upload nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    model = Path(options.model)
    if not (model / "mmllm.json").is_file():
        raise UserError(f"{model}: not a model directory; it has no mmllm.json")
    if options.name.count("/") != 1:
        raise UserError(f"{options.name}: name the repository as USER/NAME")
    if options.out:
        write_folder(model, Path(options.out), options)
        print(f"{options.out}: ready; look at its README.md")
        return
    with TemporaryDirectory(dir=model.resolve().parent, prefix=".push-") as temporary:
        folder = Path(temporary) / "model"
        write_folder(model, folder, options)
        print(f"uploaded: {upload(folder, options.name, options.private)}", file=sys.stderr)


def write_folder(model: Path, folder: Path, options: argparse.Namespace) -> None:
    """A copy of the model's own files, and README.md."""
    from mmllm.reporting.model_card import write_card
    from mmllm.runtime.files import read_json, write_json
    from mmllm.storage.atomic import atomic_directory

    with atomic_directory(folder) as temporary:
        for file in sorted(model.iterdir()):
            if file.is_file() and file.name != "manifest.json":  # the manifest is that of the whole checkpoint
                shutil.copy2(file, temporary / file.name)
        if (adapter := temporary / "adapter_config.json").exists():
            write_json(adapter, read_json(adapter) | {"base_model_name_or_path": options.name})
        write_card(temporary, model.resolve().parent, options.name, options.license)


def upload(folder: Path, name: str, private: bool) -> str:
    """The address of the commit. RunError with the hub's reason."""
    from huggingface_hub import HfApi

    from mmllm.storage.hub import reason

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="mmllm push").commit_url
    except Exception as error:  # the hub library and the network under it have a type for each failure
        raise RunError(f"{name}: not uploaded: {reason(error)}") from error
