"""Downloads from a host that breaks, lies, or has no ranges."""

import errno
import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest
from public_data import host

from mmllm.data import download as module
from mmllm.data.download import download, unpack_zip
from mmllm.errors import RunError

CONTENT = bytes(range(256)) * 20_000  # five blocks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0)
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "data.zip").write_bytes(CONTENT)
    with host(tmp_path / "host") as server:
        yield server


def fetch(server, path: Path, sha256: str = SHA256) -> bytes:
    download(f"{server.url}/data.zip", path, sha256, len(CONTENT))
    return path.read_bytes()


def test_a_connection_that_breaks_continues_where_it_broke(server, tmp_path, capsys):
    server.faults["data.zip"] = ["cut", "503", "cut"]
    assert fetch(server, tmp_path / "data.zip") == CONTENT
    half, three_quarters = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    assert [of for _, of in server.requests] == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={three_quarters}-"]
    assert "the connection broke" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))
    fetch(server, tmp_path / "data.zip")
    assert len(server.requests) == 4  # it is there


def test_a_server_without_ranges_sends_the_file_anew(server, tmp_path):
    server.faults["data.zip"] = ["cut", "no ranges"]
    assert fetch(server, tmp_path / "data.zip") == CONTENT


def test_a_part_that_is_complete_already_is_not_downloaded_again(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "data.zip") == CONTENT
    assert len(server.requests) == 1


def test_a_part_of_a_longer_file_is_downloaded_anew(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(CONTENT + b"more")
    assert fetch(server, tmp_path / "data.zip") == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_removed(server, tmp_path):
    with pytest.raises(RunError, match=f"its SHA-256 is {SHA256}, the published one is {'0' * 64}; it was removed"):
        fetch(server, tmp_path / "data.zip", "0" * 64)
    assert not list(tmp_path.glob("data.zip*"))


def test_the_checksum_of_the_hub_is_checked_where_the_table_has_none(server, tmp_path, capsys):
    server.faults["data.zip"] = ["hub"]
    assert fetch(server, tmp_path / "data.zip", "") == CONTENT
    assert "no published checksum" not in capsys.readouterr().err
    (tmp_path / "other.zip.part").write_bytes(b"damaged" + CONTENT[7:100])
    server.faults["data.zip"] = ["hub"]
    with pytest.raises(RunError, match="the published one is"):
        fetch(server, tmp_path / "other.zip", "")


def test_a_host_that_gives_nothing_is_given_up(server, tmp_path):
    server.faults["data.zip"] = ["503"] * 5
    with pytest.raises(RunError, match="503 Service Unavailable, 5 times; run the same command again"):
        fetch(server, tmp_path / "data.zip")
    server.faults["data.zip"] = ["404"]
    with pytest.raises(RunError, match="the host answers 404 Not Found; see if the file moved"):
        fetch(server, tmp_path / "data.zip")
    with pytest.raises(RunError, match="the connection broke"):
        download("http://127.0.0.1:9/data.zip", tmp_path / "data.zip")


def test_a_disk_that_is_too_small_is_refused_before_the_transfer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(RunError, match=r"data.zip.part: 0.0 GB more are needed, but only 0.0 GB are free; make room"):
        fetch(server, tmp_path / "data.zip")
    assert (tmp_path / "data.zip.part").stat().st_size == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_named(server, tmp_path):
    (tmp_path / "data.zip.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); make room, then run"):
        fetch(server, tmp_path / "data.zip")


# Unpacking


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_no_member_leads_out_of_the_folder(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a/1.jpg": b"1", "../../2.jpg": b"2", "/abs/3.jpg": b"3", "empty/": b""})
    unpack_zip(path, tmp_path / "inner" / "out")
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.jpg")}
    assert files == {"inner/out/a/1.jpg", "inner/out/2.jpg", "inner/out/abs/3.jpg"}


def test_unpacking_continues_and_replaces_what_is_not_whole(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"1.jpg": b"one", "2.jpg": b"two"})
    (tmp_path / "1.jpg").write_bytes(b"ONE")
    (tmp_path / "2.jpg").write_bytes(b"t")
    unpack_zip(path, tmp_path)
    assert (tmp_path / "1.jpg").read_bytes() == b"ONE" and (tmp_path / "2.jpg").read_bytes() == b"two"


def test_a_damaged_archive_is_named(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"1.jpg": b"one" * 1000})
    path.write_bytes(path.read_bytes()[:1000] + b"!" + path.read_bytes()[1001:])
    with pytest.raises(RunError, match=r"x.zip: is damaged \(Bad CRC-32 for file '1.jpg'\); remove it and run"):
        unpack_zip(path, tmp_path / "out")
    path.write_bytes(b"no archive")
    with pytest.raises(RunError, match=r"is damaged \(File is not a zip file\)"):
        unpack_zip(path, tmp_path / "out")


def test_a_full_disk_while_unpacking_is_named(tmp_path, monkeypatch):
    def full(source, target, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(RunError, match=r"1.jpg: cannot be written \(No space left on device\); make room"):
        unpack_zip(write_zip(tmp_path / "x.zip", {"1.jpg": b"one"}), tmp_path)
