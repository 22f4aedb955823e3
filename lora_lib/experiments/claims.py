"""What an experiment says about a claim: the row that the chapters and the summary print."""

from collections.abc import Iterable
from dataclasses import dataclass

HOLDS, DOES_NOT, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Verdict:
    """A claim, the chapter's number where it is tested, the verdict, the effect that was measured.

    `verdict` is "holds", "does not hold", "undecided" where the data do not decide, or
    "holds if ..." with the condition; `effect` is a short text with the numbers and their 95 %
    intervals.
    """

    claim: str
    chapter: str
    verdict: str
    effect: str

    def __post_init__(self):
        known = (HOLDS, DOES_NOT, UNDECIDED)
        if not (self.verdict in known or self.verdict.startswith(f"{HOLDS} if ")):
            raise ValueError(f'verdict must be one of {known}, or "holds if ...", '
                             f"got {self.verdict!r}")


def table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| claim | tested in | verdict | effect |", "|---|---|---|---|"]
    lines += [f"| {v.claim} | {v.chapter} | **{v.verdict}** | {v.effect} |" for v in verdicts]
    return "\n".join(lines)
