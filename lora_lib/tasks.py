"""Tasks for the language model, made up by the project, each with a dial for its difficulty.

A task is a name with its dial, such as "lookup 3" or "dialect 0.5"; `task` makes it. Like the
tales, everything is drawn from Python's `random.Random` and is the same on every machine.
"""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_lib.text import (COLORS, FEELINGS, PEOPLE, PLACES, THINGS, TRADES, Tale,
                           Tokenizer, questions, stranger, tales, without_opening)

Pair = tuple[str, str]
SENTENCE = re.compile('(?<=[."]) ')


@dataclass(frozen=True)
class Task:
    """Examples to train on, others to take the loss on, and pairs to count right answers on.

    `train` and `test` are texts, or pairs (prompt, answer) of which only the answer counts;
    `probes` are pairs: `test` itself where that is pairs.
    """

    name: str
    train: list[str | Pair]
    test: list[str | Pair]
    probes: list[Pair]


def task(name: str, *, train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """The task `name`, "kind" or "kind dial", with that many examples; no test one is trained on.

    lookup L        answer a question about a tale of L sentences (2)
    two-step L      the same, where the answer takes two steps: who holds it, where are they? (3)
    restyle L       retell L sentences in the present tense (1)
    instructions N  follow one of the first N of `INSTRUCTIONS` (6)
    records L       state a tale of L sentences as JSON (2)
    dialect S       go on with tales of which the share S of the words is foreign (1.0); a probe
                    is the last word of such a tale, which follows from the rest

    The number in brackets is the dial's when none is given. Raises ValueError for another kind.
    """
    kind, _, given = name.partition(" ")
    if kind not in KINDS:
        raise ValueError(f"name must begin with one of {list(KINDS)}, got {name!r}")
    make, usual = KINDS[kind]
    try:
        dial = type(usual)(given) if given else usual
    except ValueError:
        raise ValueError(f"{kind!r} takes {type(usual).__name__} as its dial, "
                         f"got {name!r}") from None
    examples = make(train + 2 * test + 100, f"{kind} {dial} {seed}", dial)
    seen = set(examples[:train])
    held_out = list(dict.fromkeys(e for e in examples[train:] if e not in seen))[:test]
    probes = [_last_word(e) if isinstance(e, str) else e for e in held_out]
    return Task(name, examples[:train], held_out, probes)


def without_openings(on: Task) -> Task:
    """A task of pairs, tested on its tales without the openings, which are random and only to be
    copied. What is left of a pair is left out if it occurs twice, or in training."""
    bare = lambda pairs: [(without_opening(prompt), without_opening(answer))
                          for prompt, answer in pairs]
    seen = set(bare(on.train))
    test = [pair for pair in dict.fromkeys(bare(on.test)) if pair not in seen]
    return Task(on.name, on.train, [*test], test)


def _last_word(text: str) -> Pair:
    prompt, _, last = text.removesuffix(".").rpartition(" ")
    return prompt, f" {last}"                       # another fact could follow in place of "."


def _short_tale(rng, length, known=lambda tale: True) -> Tale:
    while not known(tale := Tale(rng, length)):
        pass
    return tale


def lookup(n: int, seed, length: int, kinds: Sequence[str] = ("where", "feeling", "trade")):
    """Pairs of `lora_lib.text.questions` on tales of `length` sentences."""
    return questions(n, seed, kinds, length=(length,))


def two_step(n: int, seed, length: int) -> list[Pair]:
    """Questions for the place of a thing: who holds it, then where they are."""
    return questions(n, seed, ["thing's place"], length=(length,))


def restyle(n: int, seed, length: int) -> list[Pair]:
    """A tale in the past tense, and the same in the present."""
    rng = random.Random(seed)
    made = (_short_tale(rng, length) for _ in range(n))
    return [(f"{tale.text(0)}\nNow:", f" {tale.text(1)}\n") for tale in made]


def _names(text):
    return [word for word in re.findall(r"\w+", text) if word in PEOPLE]


# What can be asked for, by a word that no tale has; the function gives the answer's text.
INSTRUCTIONS: dict[str, Callable[[Tale], str]] = {
    "first": lambda tale: _names(tale.text())[0],
    "last": lambda tale: _names(tale.text())[-1],
    "echo": lambda tale: SENTENCE.split(tale.text())[-1],
    "count": lambda tale: str(len(_names(tale.text()))),
    "all": lambda tale: " and ".join(dict.fromkeys(_names(tale.text()))),
    "now": lambda tale: SENTENCE.split(tale.text(1))[-1],
}


def instructions(n: int, seed, count: int) -> list[Pair]:
    """A tale, one of `count` instructions, and what it asks for."""
    if not 1 <= count <= len(INSTRUCTIONS):
        raise ValueError(f"instructions must be 1 to {len(INSTRUCTIONS)}, got {count}")
    rng, pairs = random.Random(seed), []
    for _ in range(n):
        tale = _short_tale(rng, rng.choice((1, 2)))
        word = rng.choice(list(INSTRUCTIONS)[:count])
        pairs.append((f"{tale.text()}\nDo: {word}\nA:", f" {INSTRUCTIONS[word](tale)}\n"))
    return pairs


def records(n: int, seed, length: int) -> list[Pair]:
    """A tale, and what it says of places, feelings and trades, as JSON of one object a person."""
    rng, pairs = random.Random(seed), []
    fields = {"where": "place", "feeling": "feeling", "trade": "trade"}
    for _ in range(n):
        tale = _short_tale(rng, length, lambda t: t.where or t.feeling or t.trade)
        record = {}
        for kind, person, value in tale.facts():
            if kind in fields:
                record.setdefault(person, {})[fields[kind]] = value
        pairs.append((f"{tale.text()}\nJSON:", f" {json.dumps(record)}\n"))
    return pairs


def _vocabulary() -> list[str]:
    """Every word of the tales but names and "One", in a fixed order that is no order at all."""
    words = [t[1:] for t in Tokenizer().tokens if t.startswith(" ") and t[1:].islower()]
    random.Random("dialect").shuffle(words)
    return words


def foreign(word: str) -> str:
    """A made-up word of as many letters, always the same: vowels and consonants stay such."""
    rng = random.Random(f"foreign {word}")
    return "".join(rng.choice("aeiou" if c in "aeiou" else "bdfgklmnprstvz") for c in word)


def dialect(n: int, seed, share: float) -> list[str]:
    """Tales in which the share `share` of the vocabulary stands in foreign words.

    The words of a smaller share are among those of a larger one. Names stay.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    words = _vocabulary()
    table = {word: foreign(word) for word in words[:round(share * len(words))]}
    return [re.sub(r"\b[a-z]+\b", lambda m: table.get(m[0], m[0]), text)
            for text in tales(n, seed)]


KINDS: dict[str, tuple[Callable[..., list], int | float]] = {
    "lookup": (lookup, 2), "two-step": (two_step, 3), "restyle": (restyle, 1),
    "instructions": (instructions, 6), "records": (records, 2), "dialect": (dialect, 1.0)}

# What a biography states of a person: (question, the answers there are).
BIOGRAPHY = {
    "place": ("Where is {name}?", PLACES), "thing": ("What does {name} have?", THINGS),
    "trade": ("What is the trade of {name}?", TRADES), "color": ("What color is {name}?", COLORS),
    "feeling": ("How does {name} feel?", FEELINGS),
}
BITS_PER_PERSON = sum(math.log2(len(answers)) for _, answers in BIOGRAPHY.values())


def biographies(people: int, seed: int = 0) -> list[Pair]:
    """Five questions and answers about each of `people` invented persons; nothing gives them away.

    Every answer is drawn independently and uniformly, so a person is worth `BITS_PER_PERSON`
    bits. Raises ValueError when there are not that many names.
    """
    rng = random.Random(f"biographies {seed}")
    if not 1 <= people <= 3000:                     # of 4900 names
        raise ValueError(f"people must be between 1 and 3000, got {people}")
    names = {}
    while len(names) < people:
        names[stranger(rng)] = None
    return [(f"Q: {question.format(name=name)}\nA:", f" {rng.choice(answers)}\n")
            for name in names for question, answers in BIOGRAPHY.values()]
