"""The tasks' answers are worked out again here, from the prompt's text alone."""

import json
import math
import re

import pytest

from lora_lib import tasks
from lora_lib.tasks import biographies, task
from lora_lib.text import PEOPLE, Tokenizer, in_present, tales

NAMES = [f"{kind} {usual}" for kind, (_, usual) in tasks.KINDS.items()]


def small(name, **options):
    return task(name, **{"train": 200, "test": 40} | options)


def tale_and_question(prompt):
    tale, question, *_ = prompt.split("\n")
    return tale, question


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_reproducible_disjoint_and_written_in_known_tokens(name):
    one, tokenizer = small(name), Tokenizer()
    assert one == small(name) and one.train != small(name, seed=1).train
    assert (len(one.train), len(one.test), len(one.probes)) == (200, 40, 40)
    assert not set(one.train) & set(one.test) and len(set(one.test)) == 40
    for example in [*one.train, *one.test, *one.probes]:
        text = example if isinstance(example, str) else "".join(example)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["restyle 1", "restyle 3"])
def test_restyle_changes_the_tense_and_nothing_else(name):
    for prompt, answer in small(name).train:
        past, now = prompt.removesuffix("\nNow:").split(), answer.split()
        assert answer == f" {' '.join(now)}\n" and len(past) == len(now)
        assert in_present(answer) and not in_present(prompt)
        assert [w for w in past if w in PEOPLE] == [w for w in now if w in PEOPLE]
        assert 0 < sum(a != b for a, b in zip(past, now)) <= 2 * int(name.split()[1])


def test_without_openings_nothing_is_tested_that_was_trained_on():
    whole = small("restyle 1", test=200)
    bare = tasks.without_openings(whole)
    assert bare.train == whole.train and bare.probes == bare.test
    assert not any("One " in prompt + answer for prompt, answer in bare.test)
    trained = {answer.split("One ")[-1].split(" ", 2)[-1] if "One " in answer else answer[1:]
               for _, answer in whole.train}
    assert len(set(bare.test)) == len(bare.test) > 100
    assert not trained & {answer[1:] for _, answer in bare.test}
    planted = tasks.Task("restyle 1", [("Ada was sad.\nNow:", " Ada is sad.\n")],
                         [("One dry day Ada was sad.\nNow:", " One dry day Ada is sad.\n"),
                          ("One dry day Zoe was sad.\nNow:", " One dry day Zoe is sad.\n"),
                          ("Zoe was sad.\nNow:", " Zoe is sad.\n")], [])
    assert tasks.without_openings(planted).test == [("Zoe was sad.\nNow:", " Zoe is sad.\n")]


def test_instructions_are_followed():
    met = set()
    for prompt, answer in small("instructions 6", train=600).train:
        tale, do, _ = prompt.split("\n")
        word, answer = do.removeprefix("Do: "), answer.removeprefix(" ").removesuffix("\n")
        people = [w for w in re.findall("[A-Za-z]+", tale) if w in PEOPLE]
        last = re.split('(?<=[.]|")(?<!, ") ', tale)[-1]
        right = {"first": people[0], "last": people[-1], "count": str(len(people)),
                 "all": " and ".join(dict.fromkeys(people)), "echo": last}
        if word == "now":
            assert in_present(answer) and answer.split()[0] == last.split()[0]
        else:
            assert answer == right[word], prompt
        met.add(word)
    assert met == set(tasks.INSTRUCTIONS)
    assert {p.split("\n")[1] for p, _ in small("instructions 2").train} == {"Do: first", "Do: last"}


def test_records_are_json_of_what_the_tale_says():
    for prompt, answer in small("records 2").train:
        record = json.loads(answer)
        tale = prompt.removesuffix("\nJSON:")
        assert record and set(record) <= set(PEOPLE)
        for person, fields in record.items():
            assert set(fields) <= {"place", "feeling", "trade"} and person in tale
            assert all(re.search(rf"\b{value}\b", tale) for value in fields.values())


def test_two_steps_need_the_holder_and_the_place():
    for prompt, answer in small("two-step 3").train:
        tale, question = tale_and_question(prompt)
        assert re.fullmatch(r"Q: Where is the (\w+)\?", question)
        assert re.search(rf"\b{answer.strip()}\b", tale)


def test_a_dialect_replaces_its_share_of_words_and_smaller_shares_are_nested():
    known = {token[1:] for token in Tokenizer().tokens if token[1:].islower()}

    def words(texts):
        return [text.split() for text in texts]
    plain = words(tales(2000, "s"))
    changed = {}
    for share in (0.0, 0.1, 0.5, 1.0):
        foreign = words(tasks.dialect(2000, "s", share))
        pairs = {(a.strip('.?"'), b.strip('.?"')) for one, other in zip(plain, foreign)
                 for a, b in zip(one, other, strict=True) if a.strip('.?"') in known}
        assert len({a for a, _ in pairs}) == len(pairs)              # one foreign word for each
        changed[share] = {a for a, b in pairs if a != b}
        assert len(changed[share]) == pytest.approx(share * len(pairs), abs=0.05 * len(pairs) + 1)
    assert changed[0.0] == set() and changed[0.1] < changed[0.5] < changed[1.0]


def test_a_probe_is_the_last_word_of_a_test_text():
    one = small("dialect 0.5")
    for text, (prompt, answer) in zip(one.test, one.probes, strict=True):
        assert f"{prompt}{answer}." == text and answer.count(" ") == 1 and answer.startswith(" ")


def test_biographies_are_uniform_and_independent():
    pairs = biographies(1000, seed=3)
    assert pairs == biographies(1000, seed=3) and len(pairs) == 5000
    assert len({prompt for prompt, _ in pairs}) == 5000
    for i, (_, answers) in enumerate(tasks.BIOGRAPHY.values()):
        given = [answer.strip() for _, answer in pairs[i::5]]
        expected = len(given) / len(answers)
        chi = sum((given.count(a) - expected) ** 2 / expected for a in answers)
        assert set(given) <= set(answers) and chi < 3 * len(answers)
    assert tasks.BITS_PER_PERSON == pytest.approx(
        math.log2(math.prod(len(a) for _, a in tasks.BIOGRAPHY.values())))


@pytest.mark.parametrize(("name", "message"), [
    ("poems", "name must begin with one of"), ("lookup two", "takes int as its dial"),
    ("dialect 1.5", "share must be between 0 and 1, got 1.5"),
    ("instructions 7", "instructions must be 1 to 6, got 7")])
def test_unknown_tasks_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        task(name)


def test_too_many_people_are_refused():
    with pytest.raises(ValueError, match="people must be between 1 and 3000, got 5000"):
        biographies(5000)
