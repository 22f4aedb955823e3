"""A made-up corpus: tiny tales, questions about them, the same tales in another tense, tokens.

A tale is a walk through a small world. Its state (who is where, who holds what) grows with every
sentence, so that the last sentence, and the answer to any question, can be computed from it.
Everything is drawn from Python's `random.Random(seed)` and is the same on every machine.
"""

import random
import re
from collections.abc import Sequence

import numpy as np

PEOPLE = "Ada Anna Hugo Ines Ivan Karl Lena Maya Mira Nora Omar Otto Pavel Ravi Tomas Zoe".split()
PLACES = ("barn bridge castle cave field forest garden harbor island lake market mill orchard "
          "river school tower").split()
THINGS = ("basket bell book coin cup drum flute hat key lamp letter map mirror ring rope "
          "shell").split()
COLORS = "black blue brown gray green red white yellow".split()
FEELINGS = "angry brave calm glad hungry proud sad tired".split()
TRADES = "baker cook doctor farmer miller painter sailor weaver".split()
WEATHER = "cold cloudy dry rainy snowy sunny warm windy".split()
TIMES = "day evening morning night".split()
LISTS = {"place": PLACES, "thing": THINGS, "color": COLORS, "feeling": FEELINGS, "trade": TRADES,
         "weather": WEATHER, "time": TIMES}

# What can happen, and the ways to tell it. A verb stands as [past|present]: one table, two styles.
EVENTS = {
    "is": ("{p} [was|is] at the {place}.", "{p} [waited|waits] at the {place}."),
    "goes": ("{p} [walked|walks] to the {place}.", "{p} [ran|runs] to the {place}.",
             "{p} [went|goes] to the {place}."),
    "meets": ("{p} [met|meets] {q} at the {place}.", "{p} [saw|sees] {q} at the {place}."),
    "gets": ("{p} [had|has] a {color} {thing}.", "{p} [found|finds] a {color} {thing}."),
    "gives": ("{p} [gave|gives] the {thing} to {q}.", "{q} [got|gets] the {thing} from {p}."),
    "feels": ("{p} [felt|feels] {feeling}.", "{p} [was|is] {feeling}."),
    "works": ("{p} [was|is] a {trade}.",),
    "asks": ('{p} [asked|asks], "{question}"',),
    "reads": ("{p} [read|reads] the sign {sign}.",),
}
# What can be known: how an ending states it, and the question that asks for it.
# No tale ends with where a thing is: to answer, one must find who holds it, then where they are.
FACTS = {
    "where": ("{key} [was|is] at the {answer}", "Where is {key}?"),
    "holder": ("the {key} [belonged|belongs] to {answer}", "Who has the {key}?"),
    "thing": ("{key} [had|has] the {answer}", "What does {key} have?"),
    "feeling": ("{key} [felt|feels] {answer}", "How does {key} feel?"),
    "trade": ("{key} [was|is] a good {answer}", "What is the trade of {key}?"),
    "color": ("the {key} [was|is] {answer}", "What color is the {key}?"),
    "sign": ("{key} [thought|thinks] of {answer}", "Which sign does {key} know?"),
    "thing's place": (None, "Where is the {key}?"),
}
OPENING, ENDING = "One {weather} {time} ", "In the end {facts}."
PROMPT, ANSWER = "{tale}\nQ: {question}\nA:", " {answer}\n"
# The shares in the corpus of tales in the present tense, of invented names, and of signs: three
# random characters, so that a model meets every character and learns to copy it.
PRESENT, STRANGERS, SIGNS = 0.1, 0.05, 0.1


class Tale:
    """A cast of two or three people, what happens to them in `length` sentences, and the facts.

    `strangers` is the share of people with an invented name. The state maps names to words:
    `where`, `feeling`, `trade` and `sign` by person, `holder` and `color` by thing. `sentences`
    still hold their verbs as [past|present].
    """

    def __init__(self, rng: random.Random, length: int, strangers: float = 0.0):
        self.rng = rng
        self.where, self.feeling, self.trade, self.sign = {}, {}, {}, {}
        self.holder, self.color = {}, {}
        self.cast = self._cast(2 if rng.random() < 0.75 else 3, strangers)
        self.sentences = []
        while len(self.sentences) < length:
            self._continue()

    def _cast(self, size, strangers):
        names = []
        while len(names) < size:
            name = stranger(self.rng) if self.rng.random() < strangers else self.rng.choice(PEOPLE)
            if name not in names:
                names.append(name)
        return names

    def _continue(self):
        """Draw an event; add its sentence if it can happen now."""
        kind = self.rng.choice(list(EVENTS))
        words = {name: self.rng.choice(choices) for name, choices in LISTS.items()}
        words["p"] = self.rng.choice(self.cast)
        if kind == "gives" and self.holder:
            words["thing"] = self.rng.choice(list(self.holder))
            words["p"] = self.holder[words["thing"]]
        words["q"] = self.rng.choice([q for q in self.cast if q != words["p"]])
        words["question"] = self._question(words["p"])
        words["sign"] = "".join(chr(self.rng.randrange(33, 127)) for _ in range(3))
        if self._happens(kind, words):
            sentence = self.rng.choice(EVENTS[kind]).format(**words)
            if not self.sentences and self.rng.random() < 0.5:
                sentence = OPENING.format(**words) + sentence
            self.sentences.append(sentence)

    def _happens(self, kind, words):
        """Change the state by one event, or return False if the state does not allow it."""
        p, q, place, thing = (words[name] for name in ("p", "q", "place", "thing"))
        together = p in self.where and self.where[p] == self.where.get(q)
        match kind:
            case "is" if p not in self.where:
                self.where[p] = place
            case "goes" if self.where.get(p, place) != place:
                self.where[p] = place
            case "meets" if not together:
                self.where[p] = self.where[q] = place
            case "gets" if thing not in self.holder and len(self.holder) < 2:
                self.holder[thing], self.color[thing] = p, words["color"]
            case "gives" if self.holder.get(thing) == p:
                self.holder[thing] = q
            case "feels":
                self.feeling[p] = words["feeling"]
            case "works" if p not in self.trade:
                self.trade[p] = words["trade"]
            case "reads" if p not in self.sign and self.rng.random() < SIGNS:
                self.sign[p] = words["sign"]
            case "asks" if words["question"]:
                pass
            case _:
                return False
        return True

    def _question(self, asker):
        """A question about anything but the asker; None if nothing is known."""
        asked = [(kind, key) for kind, key, _ in self.facts() if key != asker]
        if asked:
            kind, key = self.rng.choice(asked)
            return FACTS[kind][1].format(key=key)

    def facts(self) -> list[tuple[str, str, str]]:
        """Everything that is known in the end, as (kind of fact, key, answer)."""
        held = list(self.holder.values())
        known = {
            "where": self.where, "holder": self.holder, "feeling": self.feeling,
            "trade": self.trade, "color": self.color, "sign": self.sign,
            "thing": {p: thing for thing, p in self.holder.items() if held.count(p) == 1},
            "thing's place": {thing: self.where[p] for thing, p in self.holder.items()
                              if p in self.where},
        }
        return [(kind, key, answer) for kind, table in known.items()
                for key, answer in table.items()]

    def pick(self, kinds: Sequence[str]) -> tuple[str, str, str] | None:
        """One of the facts of these kinds, each kind as likely as another, or None."""
        facts = [fact for fact in self.facts() if fact[0] in kinds]
        if not facts:
            return None
        kind = self.rng.choice(list(dict.fromkeys(kind for kind, _, _ in facts)))
        return self.rng.choice([fact for fact in facts if fact[0] == kind])

    def text(self, tense: int = 0) -> str:
        """The tale so far, in the past (0) or the present (1)."""
        return VERB.sub(lambda verb: verb[1 + tense], " ".join(self.sentences))


VERB = re.compile(r"\[(\w+)\|(\w+)\]")
PAST = {past for ways in EVENTS.values() for way in ways for past, _ in VERB.findall(way)}
PAST |= {past for end, _ in FACTS.values() for past, _ in VERB.findall(end or "")}
SCENE = re.compile("^( ?)" + OPENING.format(weather=f"(?:{'|'.join(WEATHER)})",
                                            time=f"(?:{'|'.join(TIMES)})"))


def stranger(rng: random.Random) -> str:
    """An invented name of four letters, such as "Veto", which no vocabulary holds."""
    while True:
        name = (rng.choice("BDFGKLMNPRSTVZ") + rng.choice("aeiou")
                + rng.choice("bdfgklmnprstvz") + rng.choice("aeiou"))
        if name not in PEOPLE:
            return name


def _tale(rng, length, kinds, strangers):
    """A tale that knows a fact of one of these kinds, and the fact."""
    while True:
        tale = Tale(rng, rng.choice(length), strangers)
        if fact := tale.pick(kinds):
            return tale, fact


def _ended(rng, tense):
    """A tale and, half of the time on a line of its own, an ending that states one or two facts."""
    stated = [kind for kind, (ending, _) in FACTS.items() if ending]
    tale, fact = _tale(rng, (2, 3, 4), stated, STRANGERS)
    facts = dict.fromkeys([fact, tale.pick(stated)])           # the same one twice counts once
    facts = [FACTS[kind][0].format(key=key, answer=answer) for kind, key, answer in facts]
    tale.sentences[-1] += rng.choice(" \n") + ENDING.format(facts=" and ".join(facts))
    return tale.text(tense)


def tales(n: int, seed: int = 0) -> list[str]:
    """`n` tales of three to five sentences; one in ten is told in the present tense.

    The last sentence states facts that follow from the ones before it: to predict its last word,
    a model must look it up in the tale.
    """
    rng = random.Random(f"tales {seed}")
    return [_ended(rng, rng.random() < PRESENT) for _ in range(n)]


def restyled(n: int, seed: int = 0) -> list[str]:
    """`n` tales, all in the present tense. `in_present` checks a text for it."""
    rng = random.Random(f"restyled {seed}")
    return [_ended(rng, True) for _ in range(n)]


def in_present(text: str) -> bool:
    """Whether no verb of the tales' stands in the past tense."""
    return PAST.isdisjoint(re.findall(r"\w+", text))


def without_opening(text: str) -> str:
    """A tale, or an answer with its space, without the words that set its scene: "One dry day "."""
    return SCENE.sub(r"\1", text)


def questions(n: int, seed: int = 0, kinds: Sequence[str] = tuple(FACTS), *,
              length: Sequence[int] = (3, 4), strangers: float = 0.0) -> list[tuple[str, str]]:
    """`n` pairs (prompt, answer): a tale without an ending, a question on a new line, its answer.

    `kinds` says which facts to ask for, out of `FACTS`: of those that a tale knows, each is as
    likely as another. A tale's number of sentences is drawn from `length`; more make it harder,
    and so do people with an invented name, whose share is `strangers`. The prompt ends in "A:",
    the answer is a space, a word (or a sign) and a newline; no text in `tales` has this form.
    Raises ValueError for an unknown kind.
    """
    if not kinds or not set(kinds) <= set(FACTS):
        raise ValueError(f"kinds must be some of {list(FACTS)}, got {kinds!r}")
    rng = random.Random(f"questions {seed}")
    pairs = []
    for _ in range(n):
        tale, (kind, key, answer) = _tale(rng, length, kinds, strangers)
        prompt = PROMPT.format(tale=tale.text(), question=FACTS[kind][1].format(key=key))
        pairs.append((prompt, ANSWER.format(answer=answer)))
    return pairs


class Tokenizer:
    """Text to token numbers and back: known words whole, all else letter by letter.

    A word of the tales, with the space before it, is one token; any other printable ASCII
    character, and the newline, is a token too, so nothing is lost: decode(encode(text)) == text.
    `pad` fills up a batch; `end` stands before and after every text. `len()` counts the tokens.
    """

    PIECE = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)

    def __init__(self):
        parts = [*PEOPLE, *sum(LISTS.values(), []), OPENING, ENDING, *sum(EVENTS.values(), ()),
                 *(part or "" for pair in FACTS.values() for part in pair)]
        text = re.sub(r"\{\w+\}", "", " ".join(parts))             # without the {slots}
        words = sorted(set(re.findall(r"[A-Za-z]+", text)))
        characters = ["\n", *map(chr, range(32, 127))]
        bare = [word for word in words if word[0].isupper()]        # these can begin a text
        self.tokens = ["<pad>", "<end>", *characters, *bare, *(f" {word}" for word in words)]
        self.pad, self.end = 0, 1
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError at a character that is neither printable ASCII nor a newline."""
        if bad := re.search(r"[^\n -~]", text):
            raise ValueError(f"text must be printable ASCII and newlines, got {bad[0]!r} at "
                             f"position {bad.start()}")
        ids = []
        for piece in self.PIECE.findall(text):
            ids += [self._ids[t] for t in ([piece] if piece in self._ids else piece)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without `pad` and `end`. Raises ValueError for a number that is no token."""
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < len(self)]:
            raise ValueError(f"token numbers must be between 0 and {len(self) - 1}, got {bad[0]}")
        return "".join(self.tokens[i] for i in ids if i not in (self.pad, self.end))

    def batch(self, examples: Sequence[str | tuple[str, str]],
              length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Texts, or pairs (prompt, answer), as two integer arrays (n, length): inputs and labels.

        labels[i, t] is the token that follows inputs[i, t], or -100 where the loss shall not look:
        on padding, and on a prompt. `end` opens every row; it also closes a text, but an answer
        closes itself. `length` is the longest row's unless given; ValueError if one is longer.
        """
        rows, counted = [], []
        for example in examples:
            prompt, rest = ("", example) if isinstance(example, str) else example
            start = [self.end, *self.encode(prompt)]
            after = self.encode(rest) + [self.end] * isinstance(example, str)
            rows.append(start + after)
            counted.append(len(after))
        longest = max(map(len, rows), default=1) - 1
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"length must be at least {longest}, the longest row's, got {length}")
        inputs = np.full((len(rows), length), self.pad)
        labels = np.full((len(rows), length), -100)
        for i, (row, count) in enumerate(zip(rows, counted, strict=True)):
            inputs[i, :len(row) - 1] = row[:-1]
            labels[i, len(row) - 1 - count:len(row) - 1] = row[len(row) - count:]
        return inputs, labels
