"""Real data for the chapters: scikit-learn's handwritten digits, upright or turned."""

from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """8 x 8 images as rows of 64 grey values in [0, 1], with the digit drawn on each."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits(turn: int = 0, seed: int = 0) -> Digits:
    """The 1,797 digits of scikit-learn's `load_digits`, turned counter-clockwise by `turn` degrees.

    A fifth of the images, with each digit's share kept, is the test set: the seed draws them, and
    they are the same whatever the turn. Raises ValueError if `turn` is not a multiple of 90.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if turn % 90:
        raise ValueError(f"turn must be a multiple of 90 degrees, got {turn}")
    images, labels = load_digits(return_X_y=True)
    images = np.rot90(images.reshape(-1, 8, 8), turn // 90, axes=(1, 2)).reshape(-1, 64) / 16
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2,
                                                        random_state=seed, stratify=labels)
    return Digits(x_train, y_train, x_test, y_test)
