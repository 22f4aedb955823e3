import pytest

from lora_lib.docstrings import MODULES, chats, pairs, prose, score


def test_the_parts_are_apart_and_large_enough():
    parts = {part: pairs(part) for part in MODULES}
    assert len(parts["train"]) >= 1000 and min(map(len, parts.values())) >= 250
    for side in (0, 1):
        texts = [pair[side] for found in parts.values() for pair in found]
        assert len(texts) == len(set(texts))


def test_score():
    answer = "Return the path."
    assert score(" Return the path.\n", answer) == {"exact": True, "sentence": True, "overlap": 1}
    assert score("return a path", answer) == {"exact": False, "sentence": False, "overlap": 2 / 3}
    assert not score("Return the path.\nIt is long.", answer)["sentence"]
    assert score("", answer)["overlap"] == 0


def test_draws_and_bad_input():
    assert chats(5, 0) == chats(5, 0) != chats(5, 1)
    assert len({chat[1]["content"] for chat in chats(50, 0, "test")}) == 50
    assert all(300 <= len(passage) <= 500 for passage in prose(40))
    for call in (lambda: pairs("dev"), lambda: chats(10**6, 0), lambda: prose(10**6)):
        with pytest.raises(ValueError, match="must be .*, got"):
            call()
