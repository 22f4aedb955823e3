"""The tales are replayed by a reader that knows only English, not the generator's state."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lib import text
from lora_lib.text import (FACTS, PEOPLE, Tale, Tokenizer, in_present, questions, restyled, tales,
                           without_opening)

NAME = "([A-Z][a-z]+)"
# What each sentence says: a pattern, and the facts to set, as (kind, key, answer).
# Groups are numbered from 1; a string that is no number stands for itself.
READING = [
    (f"{NAME} (?:was|is|waited|waits) at the (\\w+)[.]", [("where", 1, 2)]),
    (f"{NAME} (?:walked|walks|ran|runs|went|goes) to the (\\w+)[.]", [("where", 1, 2)]),
    (f"{NAME} (?:met|meets|saw|sees) {NAME} at the (\\w+)[.]", [("where", 1, 3), ("where", 2, 3)]),
    (f"{NAME} (?:had|has|found|finds) a (\\w+) (\\w+)[.]", [("holder", 3, 1), ("color", 3, 2)]),
    (f"{NAME} (?:gave|gives) the (\\w+) to {NAME}[.]", [("holder", 2, 3)]),
    (f"{NAME} (?:got|gets) the (\\w+) from {NAME}[.]", [("holder", 2, 1)]),
    (f"{NAME} (?:felt|feels|was|is) (\\w+)[.]", [("feeling", 1, 2)]),
    (f"{NAME} (?:was|is) a (\\w+)[.]", [("trade", 1, 2)]),
    (f"{NAME} (?:read|reads) the sign ([!-~]{{3}})[.]", [("sign", 1, 2)]),
    (f"{NAME} (?:asked|asks), \"[A-Z][A-Za-z ]+[?]\"", []),
]
STATED = {
    f"{NAME} (?:was|is) at the (\\w+)": "where",
    f"the (\\w+) (?:belonged|belongs) to {NAME}": "holder",
    f"{NAME} (?:had|has) the (\\w+)": "thing",
    f"{NAME} (?:felt|feels) (\\w+)": "feeling",
    f"{NAME} (?:was|is) a good (\\w+)": "trade",
    "the (\\w+) (?:was|is) (\\w+)": "color",
    f"{NAME} (?:thought|thinks) of ([!-~]{{3}})": "sign",
}
ASKED = {
    f"Where is {NAME}[?]": "where", "Who has the (\\w+)[?]": "holder",
    f"What does {NAME} have[?]": "thing", f"How does {NAME} feel[?]": "feeling",
    f"What is the trade of {NAME}[?]": "trade", "What color is the (\\w+)[?]": "color",
    f"Which sign does {NAME} know[?]": "sign", "Where is the (\\w+)[?]": "thing's place",
}


def sentences(tale: str) -> list[str]:
    return re.split('(?<=[."])[ \\n]', tale)


def read(body: list[str]) -> dict[tuple[str, str], str]:
    """(kind, key) -> answer, after these sentences."""
    known = {}
    for sentence in body:
        sentence = re.sub("^One \\w+ \\w+ ", "", sentence)
        matches = [(found, facts) for pattern, facts in READING
                   if (found := re.fullmatch(pattern, sentence))]
        assert len(matches) == 1, f"{len(matches)} readings of {sentence!r}"
        found, facts = matches[0]
        known |= {(kind, found[key]): found[answer] for kind, key, answer in facts}
    for (kind, thing), person in list(known.items()):
        if kind == "holder":
            known["thing", person] = thing          # asked only of people who hold one thing
            if ("where", person) in known:
                known["thing's place", thing] = known["where", person]
    return known


def look_up(patterns: dict[str, str], sentence: str) -> tuple[str, re.Match]:
    (kind, found), = [(kind, found) for pattern, kind in patterns.items()
                      if (found := re.fullmatch(pattern, sentence))]
    return kind, found


@pytest.mark.parametrize("make", [tales, restyled])
def test_a_tale_ends_with_what_follows_from_it(make):
    seen = set()
    for tale in make(2000, seed=5):
        *body, last = sentences(tale)
        assert 2 <= len(body) <= 4
        stated = re.fullmatch("In the end (.*)[.]", last)[1].split(" and ")
        assert len(stated) in (1, 2)
        for fact in stated:
            kind, found = look_up(STATED, fact)
            assert read(body)[kind, found[1]] == found[2], tale
            seen.add(kind)
    assert seen == set(STATED.values())


def test_answers_follow_from_the_tale():
    seen = set()
    for prompt, answer in questions(2000, seed=5):
        tale, question, end = prompt.split("\n")
        kind, found = look_up(ASKED, question.removeprefix("Q: "))
        assert question.startswith("Q: ") and end == "A:"
        assert answer == f" {read(sentences(tale))[kind, found[1]]}\n", prompt
        seen.add(kind)
    assert seen == set(FACTS)


def test_only_one_thing_is_asked_for_by_its_holder():
    for prompt, _ in questions(500, seed=6, kinds=["thing"]):
        tale, question, _ = prompt.split("\n")
        person = look_up(ASKED, question.removeprefix("Q: "))[1][1]
        holders = [v for (kind, _), v in read(sentences(tale)).items() if kind == "holder"]
        assert holders.count(person) == 1


def test_every_kind_of_question_is_as_likely_as_another_where_the_tale_allows():
    asked = [look_up(ASKED, prompt.split("\n")[1][3:])[0] for prompt, _ in questions(3000, seed=7)]
    usual = set(FACTS) - {"sign"}                           # few tales have a sign
    assert min(asked.count(kind) for kind in usual) > 3000 / len(usual) / 3


def test_seeds():
    assert tales(50, seed=3) == tales(50, seed=3)
    assert tales(50, seed=3) == tales(80, seed=3)[:50]
    assert tales(50, seed=3) != tales(50, seed=4)
    assert questions(5, seed=3) == questions(5, seed=3) != questions(5, seed=4)


def test_training_and_test_questions_are_disjoint():
    """Of 2,000 test prompts none is among 8,000 training prompts, and nor is its tale."""
    train = {prompt for prompt, _ in questions(8000, seed=0)}
    test = {prompt for prompt, _ in questions(2000, seed=1)}
    assert len(train) > 7990 and len(test) > 1998          # nor do they repeat themselves
    assert not train & test
    told, retold = ({prompt.split("\n")[0] for prompt in part} for part in (train, test))
    assert not told & retold


def test_styles():
    assert all(map(in_present, restyled(1000, seed=2)))
    present = sum(map(in_present, tales(5000, seed=2)))
    assert 400 < present < 600                              # one in ten
    assert in_present("Ada is at the mill.") and not in_present("Ada was at the mill.")


def test_an_opening_is_left_out_and_nothing_else():
    for told in ("One dry day Ada was at the mill.", "Ada was at the mill."):
        assert without_opening(told) == "Ada was at the mill."
        assert without_opening(f" {told}\n") == " Ada was at the mill.\n"
    for told in ("One dry", "One dull day Ada", "Ada had One dry day ", "One dry evenings Ada"):
        assert without_opening(told) == told
    opened = [told for told in tales(400, seed=3) if told.startswith("One ")]
    assert 100 < len(opened) < 300
    for told in opened:
        assert without_opening(told) == told.split(" ", 3)[3]


def test_invented_names_are_asked_for_only_on_request():
    def strangers(pairs):
        return sum(bool(set(re.findall("\\b[A-Z][a-z]{3}\\b", prompt.split("\n")[0])) - {"What"}
                        - set(PEOPLE)) for prompt, _ in pairs)      # invented ones have 4 letters
    assert strangers(questions(500, seed=1)) == 0
    assert strangers(questions(500, seed=1, strangers=1.0)) == 500


@pytest.mark.parametrize("kinds", [["where", "when"], []])
def test_unknown_kinds(kinds):
    with pytest.raises(ValueError, match="kinds must be some of"):
        questions(1, kinds=kinds)


# ---------------------------------------------------------------------------------- tokens
TOKENIZER = Tokenizer()


@given(st.text(st.sampled_from(["\n", *map(chr, range(32, 127))])))
def test_nothing_is_lost(string):
    ids = TOKENIZER.encode(string)
    assert TOKENIZER.decode(ids) == string
    assert all(0 <= i < len(TOKENIZER) for i in ids)


def test_nothing_is_lost_on_tales():
    for tale in tales(300) + [prompt + answer for prompt, answer in questions(300)]:
        assert TOKENIZER.decode(TOKENIZER.encode(tale)) == tale


def test_a_known_word_is_one_token_and_an_unknown_one_its_letters():
    ids = TOKENIZER.encode("Mira met Quux at\nthe mill?")
    assert [TOKENIZER.tokens[i] for i in ids] == [
        "Mira", " met", " ", "Q", "u", "u", "x", " at", "\n", "t", "h", "e", " mill", "?"]


def test_the_vocabulary_is_what_the_tales_need():
    assert 250 <= len(TOKENIZER) <= 400 and len(set(TOKENIZER.tokens)) == len(TOKENIZER)
    assert not any("{" in token and len(token) > 1 for token in TOKENIZER.tokens)
    used = {i for tale in tales(5000) + restyled(2000) for i in TOKENIZER.encode(tale)}
    used |= {i for prompt, answer in questions(2000) for i in TOKENIZER.encode(prompt + answer)}
    spaced = {i for i, t in enumerate(TOKENIZER.tokens) if t.startswith(" ") and len(t) > 2}
    assert {TOKENIZER.tokens[i] for i in spaced - used} == {" One"}     # it only opens a tale


def test_every_character_is_met_in_pretraining():
    used = {i for tale in tales(20_000) for i in TOKENIZER.encode(tale)}
    assert [t for i, t in enumerate(TOKENIZER.tokens) if len(t) == 1 and i not in used] == []


@pytest.mark.parametrize("string, position", [("caf\u00e9", 3), ("a\tb", 1), ("\u2028", 0)])
def test_characters_that_it_does_not_know(string, position):
    with pytest.raises(ValueError, match=f"position {position}"):
        TOKENIZER.encode(string)


@pytest.mark.parametrize("bad", [-1, len(TOKENIZER)])
def test_numbers_that_are_no_tokens(bad):
    with pytest.raises(ValueError, match=f"got {bad}"):
        TOKENIZER.decode([5, bad])


def test_batch():
    end, pad = TOKENIZER.end, TOKENIZER.pad
    a, b, c, space = (TOKENIZER.encode(character)[0] for character in "abc ")
    inputs, labels = TOKENIZER.batch(["ab", ("a b", "c")])
    assert inputs.tolist() == [[end, a, b, pad], [end, a, space, b]]
    assert labels.tolist() == [[a, b, end, -100], [-100, -100, -100, c]]
    assert inputs.dtype == labels.dtype == np.int64
    inputs, labels = TOKENIZER.batch(["ab"], length=5)
    assert inputs.tolist() == [[end, a, b, pad, pad]]
    assert labels.tolist() == [[a, b, end, -100, -100]]
    with pytest.raises(ValueError, match="length must be at least 3"):
        TOKENIZER.batch(["ab"], length=2)


def test_text_needs_no_torch():
    code = "import sys, lora_lib.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tale_can_be_as_long_as_asked_for():
    tale = Tale(text.random.Random(0), 40)
    assert len(tale.sentences) == 40
