"""A process takes its share of the machine, and its workers do not multiply its threads."""

import os
import threading

import pytest
import torch

from mmllm.runtime import threads
from mmllm.runtime.threads import cpu_quota, limit_threads, worker_pool

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def limited(monkeypatch, quota: float, **given: str) -> dict[str, str]:
    """What `limit_threads` leaves in an environment of `given` on four CPUs."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    limit_threads()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize(
    "quota, given, left",
    [
        (float("inf"), {}, {"GOMP_SPINCOUNT": "1000"}),
        (4.0, {}, {"GOMP_SPINCOUNT": "1000"}),
        (1.5, {}, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "2"}),
        (0.5, {}, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}),
        (1.0, {"OMP_NUM_THREADS": "3"}, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}),
        (4.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (4.0, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_follow_the_quota_unless_the_environment_says_otherwise(monkeypatch, quota, given, left):
    assert limited(monkeypatch, quota, **given) == left


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_the_quota_of_a_container_is_read_from_its_cgroup(tmp_path, files, cpus):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cpus


def test_each_worker_uses_one_thread_and_the_model_keeps_its_own():
    torch.set_num_threads(3)
    together = threading.Barrier(2, timeout=60)

    def count(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    with worker_pool(2, "worker") as pool:
        assert list(pool.map(count, range(2))) == [1, 1]
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]
