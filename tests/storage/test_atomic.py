"""Directories that appear complete or not at all."""

import errno
import os
import stat

import pytest

from mmllm.errors import CheckpointError, RunError
from mmllm.storage.atomic import atomic_directory


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), atomic_directory(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(CheckpointError, match="exists"), atomic_directory(target):
        pass
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match="No space left"), atomic_directory(tmp_path / "model") as temporary:
        (temporary / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_whose_folders_cannot_be_synchronised_holds_directories_all_the_same(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def network_drive(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", network_drive)
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "model" / "a").read_text() == "1"


def test_a_file_that_cannot_be_synchronised_is_an_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match="Invalid argument"), atomic_directory(tmp_path / "model") as temporary:
        (temporary / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []
