"""Files from the hosts of public datasets: resumed where they broke off, checked, and unpacked.

An interrupted transfer continues with an HTTP range; a server without ranges sends the file anew. A file gets its name
when it is complete and its checksum is right: that of the table, or the one that the Hugging Face hub sends with it.
"""

import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from mmllm.data.archives import safe
from mmllm.errors import RunError
from mmllm.runtime.console import progress, stderr_rank0
from mmllm.runtime.files import sha256_of, writing

BLOCK = 1 << 20
ATTEMPTS = 5  # without a byte of progress
WAIT_S = 2.0  # before the second attempt, twice as long before each further one
TIMEOUT_S = 60
MEND = "make room, then run the same command again to continue"


class RememberDigest(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub sends with the redirect to its storage."""

    digest = ""

    def redirect_request(self, request, file, code, message, headers, url):
        self.digest = hub_digest(headers) or self.digest
        return super().redirect_request(request, file, code, message, headers, url)


def hub_digest(headers) -> str:
    """The SHA-256 in the hub's header of a large file; "" where there is none."""
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", ""))
    return found[1] if found else ""


def download(url: str, path: Path, sha256: str = "", size: int = 0) -> None:
    """The file of `url` at `path`. RunError where the host refuses it, the disk is full or the checksum is wrong."""
    part, failures = path.with_name(f"{path.name}.part"), 0
    if path.exists():
        return
    handler = RememberDigest()
    with writing(path, MEND):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    while True:
        before = part.stat().st_size
        try:
            transfer(url, part, handler, size)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise RunError(f"{url}: the host answers {error.code} {error.reason}; see if the file moved") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:  # of the network: those of the disk are RunErrors
            reason = f"the connection broke ({getattr(error, 'reason', error)})"
        failures = 1 if part.stat().st_size > before else failures + 1
        if failures >= ATTEMPTS:
            raise RunError(f"{url}: {reason}, {failures} times; run the same command again to continue")
        stderr_rank0(f"{url}: {reason}; trying again")
        time.sleep(WAIT_S * 2 ** (failures - 1))
    check(url, part, sha256 or handler.digest)
    part.rename(path)


def transfer(url: str, part: Path, handler: RememberDigest, size: int) -> None:
    """Appends to `part` what it lacks of the file. http.client.HTTPException where the connection ends too early."""
    have = part.stat().st_size
    headers = {"User-Agent": "mmllm", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.build_opener(handler).open(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S
        )
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is nothing after byte `have`
            raise
        if int(error.headers.get("Content-Range", "*/0").rpartition("/")[2]) != have:
            os.truncate(part, 0)
            raise ConnectionError("the file has changed") from error
        return
    with answer, part.open("ab" if answer.status == 206 else "wb", buffering=0) as file:
        handler.digest = hub_digest(answer.headers) or handler.digest
        left, room = int(answer.headers.get("Content-Length") or size), shutil.disk_usage(part.parent).free
        if left > room:
            raise RunError(
                f"{part}: {left / 1e9:.1f} GB more are needed, but only {room / 1e9:.1f} GB are free; make room"
            )
        end = file.tell() + left
        for block in progress(iter(lambda: answer.read(BLOCK), b""), -(-left // BLOCK), f"{part.stem} (MB)"):
            while block:
                with writing(part, MEND):
                    block = block[file.write(block) :]
        if file.tell() < end:
            raise http.client.IncompleteRead(b"", end - file.tell())


def check(url: str, part: Path, sha256: str) -> None:
    """RunError, after the file is removed, where it has another checksum. A file without a published one passes."""
    if not sha256:
        stderr_rank0(f"{url}: no published checksum to compare with")
        return
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise RunError(
            f"{url}: its SHA-256 is {found}, the published one is {sha256}; it was removed. Run the command again; if it "
            "stays so, the host has another file now"
        )


def unpack_zip(path: Path, folder: Path) -> None:
    """Unpacks a zip archive below `folder`, whatever its members are called; files that are there already, whole, are kept.
    RunError for a damaged archive and a full disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in progress(members, len(members), f"unpacking {path.name}"):
                target = folder / safe(PurePosixPath(member.filename))
                if target.exists() and target.stat().st_size == member.file_size:
                    continue
                with writing(target, MEND):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file, BLOCK)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise RunError(f"{path}: is damaged ({error}); remove it and run the same command again") from error
