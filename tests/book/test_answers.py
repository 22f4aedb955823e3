"""The answers on the landing page are those of the committed run, word for word."""

import csv

import pytest

import notebooks
from lora_lib import calls
from lora_lib.experiments.sweep import RESULTS

from .markdown import parse

SHOWN = 3  # requests
SHORTEST = 40  # characters of an answer that is cut


def run() -> list[dict[str, str]]:
    with open(RESULTS / "assistant_answers.csv", newline="", encoding="utf8") as file:
        return [row for row in csv.DictReader(file) if row["task"] == "calls"]


def page() -> str:
    return (notebooks.BOOK / "index.md").read_text("utf8")


def table(text: str) -> list[list[str]]:
    """The rows of the first table of a page, each a list of its cells' words."""
    rows: list[list[str]] = []
    tokens = parse(text)
    for token, inline in zip(tokens, tokens[1:]):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "td_open":
            rows[-1].append("".join(child.content for child in inline.children or []))
        elif token.type == "table_close":
            break
    return [row for row in rows if row]  # the head has th, not td


def faults(text: str, rows: list[dict[str, str]]) -> list[str]:
    """What the first table of a page says that the run's first rows do not."""
    shown = table(text)
    if [len(cells) for cells in shown] != [3] * SHOWN:
        return [f"expected {SHOWN} rows of request, before and after"]
    found = []
    for cells, row in zip(shown, rows):
        for name, cell in zip(("request", "before", "after"), cells):
            said = " ".join(row[name].split())
            start = cell.removesuffix(" …")
            cut = name == "before" and start != cell and len(start) >= SHORTEST
            if not (said == cell or cut and said.startswith(start) and said != start):
                found.append(f"{name}: the page has {cell!r}, the run {said!r}")
        right = calls.score(row["after"], row["expected"])["exact"]
        if not right and f"`{row['expected']}`" not in " ".join(text.split()):
            found.append(f"the page does not say that right would be {row['expected']}")
    return found


def test_the_first_answers_of_the_run_stand_on_the_page():
    assert faults(page(), run()) == []


@pytest.mark.parametrize("name", ["request", "before", "after"])
@pytest.mark.parametrize("number", range(SHOWN))
def test_another_answer_is_caught(number, name):
    rows = run()
    rows[number][name] = "x" + rows[number][name]
    assert len(faults(page(), rows)) >= 1


def test_other_requests_are_caught():
    assert len(faults(page(), run()[1:])) >= SHOWN


BEFORE = "I'm sorry, but as an assistant I cannot set an alarm for you."
CALL = '{"name": "set_alarm", "arguments": {"time": "07:00"}}'


def faults_of(before: str = BEFORE, after: str = CALL, expected: str = CALL, note: str = ""):
    row = {"request": "Wake me", "before": BEFORE, "after": after, "expected": expected}
    rows = f"| Wake me | {before} | `{after}` |\n" * SHOWN
    text = f"| request | before | after |\n|---|---|---|\n{rows}\n{note}"
    return faults(text, [row] * SHOWN)


def test_an_answer_may_be_cut_at_its_end():
    assert faults_of() == faults_of(before=BEFORE[:45] + " …") == []
    for before in (BEFORE[:20] + " …", BEFORE[:45], BEFORE[4:50] + " …", BEFORE + " …"):
        assert len(faults_of(before=before)) == SHOWN


def test_a_wrong_answer_must_be_told():
    other = CALL.replace("07", "19")
    assert len(faults_of(after=other)) == SHOWN
    assert faults_of(after=other, note=f"Right would be `{CALL}`.") == []
