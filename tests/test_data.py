"""The digits against scikit-learn's own, pixel by pixel."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lora_lib.data import digits


def both(data):
    return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])


def test_they_are_scikit_learns_images():
    data = digits()
    assert data.x_train.dtype == np.float64 and data.x_train.shape == (1437, 64)
    assert data.x_test.shape == (360, 64) and data.y_train.shape == (1437,)
    images, labels = both(data)
    assert images.min() == 0 and images.max() == 1
    ours = sorted(map(tuple, np.column_stack([images * 16, labels])))
    assert ours == sorted(map(tuple, np.column_stack(load_digits(return_X_y=True))))


def test_each_digit_has_the_same_share_of_the_test_set():
    data = digits()
    for digit in range(10):
        count = np.sum(load_digits().target == digit)
        assert abs(np.sum(data.y_test == digit) - count / 5) <= 1


def test_a_seed_draws_the_test_images():
    images = [set(map(bytes, digits(seed=seed).x_test)) for seed in (0, 1)]
    assert 0.1 < len(images[0] & images[1]) / 360 < 0.3              # a fifth is in both
    upright, data = digits(seed=1), digits(180, seed=1)
    np.testing.assert_array_equal(upright.x_test, data.x_test[:, ::-1])
    np.testing.assert_array_equal(digits(seed=0).x_train, digits().x_train)


def turned(row):
    """One image a quarter turn counter-clockwise: what was at the right is at the top."""
    old = row.reshape(8, 8)
    return np.array([[old[column, 7 - line] for column in range(8)] for line in range(8)]).ravel()


@pytest.mark.parametrize("turn, quarters", [(0, 0), (90, 1), (180, 2), (270, 3), (360, 0),
                                            (-90, 3), (450, 1), (90.0, 1)])
def test_turning(turn, quarters):
    upright, data = digits(), digits(turn)
    for before, after, y_before, y_after in [
            (upright.x_train, data.x_train, upright.y_train, data.y_train),
            (upright.x_test, data.x_test, upright.y_test, data.y_test)]:
        np.testing.assert_array_equal(y_before, y_after)         # the same images, in this order
        for i in range(0, len(before), 30):
            row = before[i]
            for _ in range(quarters):
                row = turned(row)
            np.testing.assert_array_equal(after[i], row)


@pytest.mark.parametrize("turn", [45, 1, -30, 90.5, float("nan")])
def test_only_quarter_turns(turn):
    with pytest.raises(ValueError, match=f"multiple of 90 degrees, got {turn}"):
        digits(turn)
