"""Bootstrap intervals, against the normal approximation."""

import numpy as np
import pytest

from mmllm.evaluation.bootstrap import intervals


def mean(sums):
    return {"mean": sums[0] / sums[1]}


def rows_of(values):
    return np.column_stack([values, np.ones(len(values))])


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    low, high = intervals(rows_of(values), range(2000), mean)["mean"]
    error = values.std() / 2000**0.5
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_ten_questions_about_an_image_that_agree_count_as_one():
    values = np.random.default_rng(1).integers(0, 2, 200).repeat(10)
    alone = intervals(rows_of(values), range(2000), mean)["mean"]
    together = intervals(rows_of(values), [i // 10 for i in range(2000)], mean)["mean"]
    assert together[1] - together[0] == pytest.approx(10**0.5 * (alone[1] - alone[0]), rel=0.1)


def test_an_interval_depends_on_its_seed_alone():
    rows = rows_of(np.arange(50.0))
    assert intervals(rows, range(50), mean) == intervals(rows, range(50), mean)
    assert intervals(rows, range(50), mean) != intervals(rows, range(50), mean, seed=1)
