"""Rated words: what the lexicon says, families, and splits that no relative crosses."""

import sys

import numpy as np
import pytest

from lora_lib.words import family, rated_words, split

pytest.importorskip("vaderSentiment", reason="the package vaderSentiment is not installed")
SUFFIXES = ("s", "es", "d", "ed", "ing", "ly", "er", "ers", "ness", "ful", "less", "able", "y")


def test_ratings_are_the_lexicons_own():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    lexicon = SentimentIntensityAnalyzer().lexicon
    rated = rated_words()
    assert len(rated) > 7000 and all(word.isalpha() and word.islower() for word in rated)
    lower = [word for word in rated if word in lexicon and word.upper() not in lexicon]
    assert len(lower) > 7000
    assert all(rated[word] == lexicon[word] for word in lower)
    assert max(map(abs, rated.values())) <= 4


def test_inflections_and_opposites_are_in_one_family():
    words, torn = set(rated_words()), set()
    for word in words:
        for stem in {word, word.rstrip("e"), word[:-1] + "i"}:
            torn |= {(word, stem + end) for end in SUFFIXES if len(word) > 3
                     and stem + end in words and family(stem + end) != family(word)}
        torn |= {(word, pre + word) for pre in ("un", "dis", "im", "ir", "non")
                 if pre + word in words and family(pre + word) != family(word)}
    assert not torn
    assert family("abuse") == family("abusers") != family("hate")


def test_a_split_parts_the_words_and_no_family_crosses_it():
    words = list(rated_words())
    for seed in (0, 1):
        parts = split(words, seed)
        assert sorted(np.concatenate(parts)) == list(range(len(words)))
        families = [{family(words[i]) for i in rows} for rows in parts]
        assert not any(families[i] & families[j] for i, j in ((0, 1), (0, 2), (1, 2)))
        assert 0.15 < len(parts.test) / len(words) < 0.25


@pytest.mark.parametrize("by", ["families", "words"])
def test_the_validation_part_is_always_the_same_and_the_test_part_the_seeds(by):
    words = list(rated_words())
    one, same, other = (split(words, seed, by) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert np.array_equal(one.validation, other.validation)
    assert not np.array_equal(one.test, other.test)


def test_another_way_to_split():
    with pytest.raises(ValueError, match='by must be "families" or "words", got \'letters\''):
        split(["good"], 0, by="letters")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vaderSentiment"):
        rated_words.__wrapped__()
