"""The ledger: each of its claims is one that some experiment judges; its table says what it has."""

import re

import pytest

from lora_lib.experiments import ledger
from lora_lib.experiments.claims import Claim
from lora_lib.experiments.intervals import Interval


def test_a_row_has_every_model_the_sources_and_the_reason():
    claim = Claim("it helps", "1", "loss in nats", 0.1)
    small = claim.judged(Interval(0.3, 0.2, 0.4))
    real = claim.judged(Interval(0.0, -0.1, 0.05)).on("SmolLM2")
    entry = ledger.Entry("it helps", ((ledger.PAPER, ledger.AGREES),), "They differ.")
    row = ledger.table([small, real], [entry]).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("**holds**: loss in nats: +0.30")
    assert cells[2].startswith("**does not hold**") and "agrees" in cells[3]
    assert cells[4] == "They differ."
    alone = ledger.table([real], [entry]).splitlines()[2]
    assert alone.split("|")[2].strip() == "–"


def test_a_claim_that_nobody_judged_is_refused():
    with pytest.raises(ValueError, match="no verdict on the ledger's claim 'it flies'"):
        ledger.table([], [ledger.Entry("it flies", (), "")])


def test_every_claim_of_the_ledger_is_judged_and_every_model_has_its_cell():
    verdicts = ledger.all_verdicts()
    lines = ledger.table(verdicts).splitlines()
    assert len(lines) == 2 + len(ledger.LEDGER)
    judged = {(v.claim, v.model) for v in verdicts}
    for entry, line in zip(ledger.LEDGER, lines[2:]):
        cells = line.split(" | ")
        for model, cell in zip(("small", "SmolLM2"), cells[1:3]):
            assert cell.startswith("**") == ((entry.claim, model) in judged)


def test_every_source_has_an_address_and_every_entry_a_source():
    assert all(re.match(r"https://", source.url)
               for entry in ledger.LEDGER for source, _ in entry.sources)
    assert all(entry.sources and entry.why for entry in ledger.LEDGER)
    says = {word for entry in ledger.LEDGER for _, word in entry.sources}
    assert says <= {ledger.AGREES, ledger.DISAGREES, ledger.PARTLY}
    assert len({entry.claim for entry in ledger.LEDGER}) == len(ledger.LEDGER)
