"""Real words with human ratings: the lexicon of the package vaderSentiment.

Ten people rated each word from -4, extremely negative, to 4, extremely positive (Hutto and Gilbert
2014, "VADER"; the package and its lexicon are under the MIT license). Nothing of it is kept here.
"""

import re
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import numpy as np

PREFIX = re.compile("^(un|dis|in|im|ir|non|over)+(?=.{3})")


@lru_cache
def rated_words() -> dict[str, float]:
    """{word: mean rating} of the lexicon's words; emoticons and what else is no word are left out.

    Raises ModuleNotFoundError without the package.
    """
    try:
        text = resources.files("vaderSentiment").joinpath("vader_lexicon.txt").read_text("utf8")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the rated words need `pip install vaderSentiment==3.3.2`",
                                  name=error.name) from error
    rows = (line.split("\t") for line in text.splitlines())
    return {row[0].lower(): float(row[1]) for row in rows if re.fullmatch("[A-Za-z]+", row[0])}


def family(word: str) -> str:
    """A key that inflections share: the first three letters, behind a prefix such as "un".

    It is wide on purpose: "abuse" stands with "abusers", and with "abundance" too.
    """
    return PREFIX.sub("", word)[:3]


class Split(NamedTuple):
    """Row numbers."""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(words: list[str], seed: int, by: str = "families") -> Split:
    """Part the words by `by`: "families" keeps a family in one part, "words" lets it be torn.

    A fifth is the validation part, the same for every seed; a quarter of the rest, drawn by the
    seed, is the test part. Raises ValueError for another `by`.
    """
    if by not in ("families", "words"):
        raise ValueError(f'by must be "families" or "words", got {by!r}')
    units = np.array([family(word) for word in words] if by == "families" else words)
    names = np.random.default_rng(0).permutation(np.unique(units))
    validation, rest = np.split(names, [len(names) // 5])
    test = np.random.default_rng(seed).permutation(rest)[:len(rest) // 4]
    part = np.where(np.isin(units, validation), 1, np.where(np.isin(units, test), 2, 0))
    return Split(*(np.flatnonzero(part == i) for i in range(3)))
