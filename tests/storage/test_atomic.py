"""Directories that appear complete or not at all."""

import errno
import os

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
