"""The figure of two adapters' weights says what the chapter's table prints."""

import re

import numpy as np
import pytest

from tests.moving import stored
from tests.moving.node import call

CHAPTER = "11_many_adapters"


@pytest.fixture(scope="module")
def figure():
    return stored.data(CHAPTER, "cell-27a")


@pytest.fixture(scope="module")
def table():
    """{row: (2, seeds)}: the right answers that the page prints for sums in all layers."""
    return {name: np.array([cell.split() for cell in cells], float)
            for name, *cells in stored.table(CHAPTER, "cell-25")[1:]}


def test_equal_weights_give_the_numbers_of_the_page(figure, table):
    shown = {name: seeds for name, seeds in table.items() if name.startswith("sum")}
    assert len(shown) == 3
    for name, seeds in shown.items():
        i = figure["weights"].index(float(re.search(r"w = (\S+)", name)[1]))
        pairs = figure["right"][i][i]
        assert np.abs(np.transpose(pairs) - seeds).max() < 0.006
        said = call("sum", "sentence", [figure["weights"][i]] * 2, figure["names"], pairs,
                    figure["together"])
        last, count, worse, both = map(float, re.findall(r"\d\.\d\d\b(?!\d)", said.split("seeds,")[1]))
        assert np.allclose([last, count], seeds.mean(1), atol=0.011)
        assert np.isclose(worse, seeds.min(0).mean(), atol=0.011)
        assert np.isclose(both, table["one adapter, trained on both"].min(0).mean(), atol=0.011)


def test_alone_each_adapter_has_its_own_task(figure, table):
    last, count = table["each alone"]
    right = np.array(figure["right"])
    assert np.allclose(right[-1, 0, :, 0], last, atol=0.006)
    assert np.allclose(right[0, -1, :, 1], count, atol=0.006)


def test_the_worse_task_is_taken_seed_by_seed():
    assert call("sum", "worse", [[0.25, 1], [1, 0.5]]) == pytest.approx(0.375)
    assert call("sum", "shares", [[0.25, 1], [1, 0.5]], 1) == [1, 0.5]
