"""One rule for every claim: the effect that it asserts, the effect that was measured, a verdict.

A claim says in which range an effect lies: above a margin ("LoRA forgets less, by more than 0.02
nats"), within one ("as good as full fine-tuning, to 0.05"), between two rates. The range is written
in the code before the runs are made. The verdict is read off the interval of what they measured:

- it lies inside the range: the claim *holds*;
- it lies outside: it *does not hold*;
- it reaches over an end of the range: *undecided*.

The burden of proof is the same for every claim, and either wrong verdict, on an effect at the very
end of the range, has a chance of 2.5 %. A claim of several effects (tasks, ranks) asks for more
confidence in each, so that together they keep it. What is true by a definition or a count is
`counted`, not measured; what a model cannot test gets no verdict, but a reason (`untested`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from lora_lib.experiments.intervals import CONFIDENCE, Interval

HOLDS, DOES_NOT, UNDECIDED = "holds", "does not hold", "undecided"
UNTESTED = "cannot be tested here"


@dataclass(frozen=True)
class Verdict:
    """A claim, the chapter's number where it is tested, the verdict, the effect that was measured.

    `verdict` is "holds", "does not hold", "undecided" where the data do not decide, "holds if ..."
    with the condition, or "cannot be tested here". `effect` is a short text with the numbers and
    their intervals. `found` has the intervals by their condition ("" for a claim of one effect),
    `least` and `most` the ends of the range that the claim asserts. `counted` is true of a count.
    `model` is what was trained.
    """

    claim: str
    chapter: str
    verdict: str
    effect: str
    found: Mapping[str, Interval] = field(default_factory=dict)
    least: float = -math.inf
    most: float = math.inf
    counted: bool = False
    model: str = "small"

    @property
    def parts(self) -> list[tuple[Interval, str]]:
        """Each interval that was found, and what the rule says of it alone."""
        return [(one, judge(one, self.least, self.most)) for one in self.found.values()]

    def on(self, model: str) -> "Verdict":
        """The same verdict, of runs of this model."""
        return replace(self, model=model)

    def __post_init__(self):
        known = (HOLDS, DOES_NOT, UNDECIDED, UNTESTED)
        if not (self.verdict in known or self.verdict.startswith(f"{HOLDS} if ")):
            raise ValueError(f'verdict must be one of {known}, or "holds if ...", '
                             f"got {self.verdict!r}")


@dataclass(frozen=True)
class Claim:
    """What is asserted: an effect between `least` and `most`, of which at least one is finite.

    `effect` names what is measured, with its unit and its sign ("nats, full minus LoRA"). Raises
    ValueError for a range that is empty or everything.
    """

    text: str
    chapter: str
    effect: str
    least: float = -math.inf
    most: float = math.inf

    def __post_init__(self):
        if not self.least < self.most or math.isinf(self.least) and math.isinf(self.most):
            raise ValueError("a claim needs a range with least < most and a finite end, got "
                             f"{self.least} to {self.most}")

    def judged(self, found: Interval, *, form: str = "+.2f", note: str = "") -> Verdict:
        """The verdict on one effect. `note` is added to the text of the effect."""
        return self._verdict(judge(found, self.least, self.most), {"": found},
                             found.text(form), note)

    def across(self, measure: Callable[[float], Mapping[str, Interval]], *, form: str = "+.2f",
               condition: str = "{}", note: str = "") -> Verdict:
        """The verdict on several effects, by their condition: `measure(confidence)` gives them.

        It holds if all hold, and does not if none does; if some do, it holds under their
        conditions, which `condition` turns into words. While one is undecided and none holds, it
        is undecided. Each has the confidence that leaves all together that of one (Bonferroni).
        """
        found = measure(1 - (1 - CONFIDENCE) / len(measure(CONFIDENCE)))
        each = {name: judge(one, self.least, self.most) for name, one in found.items()}
        good = [name for name, verdict in each.items() if verdict == HOLDS]
        if len(good) == len(each):
            verdict = HOLDS
        elif good:
            verdict = f"{HOLDS} if {condition.format(' or '.join(good))}"
        else:
            verdict = UNDECIDED if UNDECIDED in each.values() else DOES_NOT
        text = "; ".join(f"{name} {one.text(form)}, {each[name]}" if verdict.startswith("holds if")
                         else f"{name} {one.text(form)}" for name, one in found.items())
        return self._verdict(verdict, found, text, note)

    def _verdict(self, verdict, found, text, note):
        return Verdict(self.text, self.chapter, verdict,
                       f"{self.effect}: {text}" + (f"; {note}" if note else ""), found,
                       self.least, self.most)


def judge(found: Interval, least: float, most: float = math.inf) -> str:
    """Whether an effect lies between `least` and `most`: the one rule."""
    if least <= found.low and found.high <= most:
        return HOLDS
    return DOES_NOT if found.high < least or found.low > most else UNDECIDED


def counted(claim: str, chapter: str, true: bool, effect: str) -> Verdict:
    """The verdict on what a count, a definition or an identity decides."""
    return Verdict(claim, chapter, HOLDS if true else DOES_NOT, effect, counted=True)


def untested(claim: str, chapter: str, why: str) -> Verdict:
    """In place of a verdict: why these models cannot test a claim."""
    return Verdict(claim, chapter, UNTESTED, why)


def table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| claim | tested in | verdict | effect |", "|---|---|---|---|"]
    lines += [f"| {v.claim} | {v.chapter} | **{v.verdict}** | {v.effect} |" for v in verdicts]
    return "\n".join(lines)
