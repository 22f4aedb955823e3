import re

import numpy as np
import pytest

from lora_lib import moving
from tests.moving.node import call
from tests.moving.stored import data, printed, table

CHAPTER = "01_idea"
UNPACKED = "(matrix) => unpacked(matrix)"
PRODUCT = "({left, right}, rank) => product(unpacked(left), unpacked(right), rank)"


@pytest.fixture(scope="module")
def figure():
    return data(CHAPTER, "c42a")


@pytest.fixture(scope="module")
def said(figure):
    return call("ranks", "(data) => data.ranks.map(sentence)", figure)


def test_a_matrix_is_packed_to_half_a_step():
    matrix = np.random.default_rng(0).normal(size=(5, 7))
    found = np.array(call("ranks", UNPACKED, moving.packed(matrix)))
    assert np.abs(found - matrix).max() < 0.51 * np.abs(matrix).max() / 127
    assert call("ranks", UNPACKED, moving.packed(np.zeros((2, 3)))) == [[0] * 3] * 2


def test_the_cut_is_that_of_the_singular_values():
    U, sigma, Vt = np.linalg.svd(np.random.default_rng(0).normal(size=(12, 9)))
    pair = {"left": moving.packed(U[:, :9] * sigma**0.5),
            "right": moving.packed(sigma[:, None]**0.5 * Vt)}
    found = np.array(call("ranks", PRODUCT, pair, 4))
    assert np.linalg.matrix_rank(found, tol=1e-8) == 4
    assert np.abs(found - (U[:, :4] * sigma[:4]) @ Vt[:4]).max() < 0.05


def test_the_page_says_the_accuracies_that_it_prints(figure, said):
    _, *rows, full = table(CHAPTER, "c40")
    assert [int(rank) for rank, *_ in rows] == [int(rank) for rank in figure["lora"]]
    for (rank, numbers, cut, lora), text in zip(rows, said):
        assert text.startswith(f"Rank {rank}, {numbers} numbers")
        assert f"accuracy of {cut.split()[0]}." in text
        assert text.endswith(f"trained at this rank reaches {lora.split()[0]}.")
    assert full[0] == "full" and full[2].split()[0] == f"{np.mean(figure['full']):.2f}"


def test_the_page_says_the_cuts_that_it_prints(figure, said):
    _, *cuts = table(CHAPTER, "c32a")
    assert [int(rank) for rank, _ in cuts] == [at["rank"] for at in figure["ranks"]]
    assert all(f"accuracy of {score.split()[0]}." in text for (_, score), text in zip(cuts, said))
    assert all("was not trained" in text for text in said[len(figure["lora"]):])


def test_the_energy_is_that_of_the_picture(figure):
    share = re.search(r"energy in 8 directions: (0\.\d\d)", printed(CHAPTER, "c30"))[1]
    (eight,) = (at for at in figure["ranks"] if at["rank"] == 8)
    assert f"{eight['energy']:.2f}" == share
    whole = np.array(call("ranks", UNPACKED, figure["whole"]))
    for at in figure["ranks"]:                       # the first network beside the mean of five
        rest = whole - np.array(call("ranks", PRODUCT, figure["cut"], at["rank"]))
        assert 1 - (rest**2).sum() / (whole**2).sum() == pytest.approx(at["energy"], abs=0.03)


def test_answers_are_counted(figure):
    one = {"read": {"cut": "0173", "lora": None}}
    assert call("ranks", "count", one, "0123").endswith("right of 4: cut 3.")
    one["read"]["lora"] = "4444"
    assert call("ranks", "count", one, "0123").endswith("cut 3, LoRA 0.")
    assert [len(at["read"]["cut"]) for at in figure["ranks"]] == [10] * len(figure["ranks"])
