"""The one rule: where an interval stands, and how often random data are judged wrongly."""

import math

import numpy as np
import pytest

from lora_lib.experiments import claims as c
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED, UNTESTED
from lora_lib.experiments.intervals import Interval, by_seeds, of_shares

ABOVE = c.Claim("more", "7", "nats", 0.02)
SAME = c.Claim("as good", "7", "nats", -0.05, 0.05)


@pytest.mark.parametrize("low, high, above, same", [
    (0.03, 0.04, HOLDS, HOLDS), (0.01, 0.04, UNDECIDED, HOLDS), (-0.3, 0.01, DOES_NOT, UNDECIDED),
    (0.06, 0.09, HOLDS, DOES_NOT), (-0.2, -0.1, DOES_NOT, DOES_NOT),
    (-math.inf, math.inf, UNDECIDED, UNDECIDED)])
def test_an_interval_inside_holds_outside_does_not_and_else_nothing_is_decided(
        low, high, above, same):
    found = Interval((low + high) / 2 if math.isfinite(low) else 0, low, high)
    assert ABOVE.judged(found).verdict == above and SAME.judged(found).verdict == same


def test_a_verdict_carries_what_it_was_read_off():
    found = SAME.judged(Interval(0.01, -0.02, 0.04), note="three seeds").on("SmolLM2")
    assert found.effect == "nats: +0.01 (-0.02 to +0.04); three seeds"
    assert (found.least, found.most, found.model) == (-0.05, 0.05, "SmolLM2")
    assert found.found == {"": Interval(0.01, -0.02, 0.04)} and not found.counted
    assert found.parts == [(Interval(0.01, -0.02, 0.04), HOLDS)]
    assert c.counted("2 + 2 = 4", "1", True, "4").counted
    assert c.untested("big", "7", "too small").verdict == UNTESTED


@pytest.mark.parametrize("spans, verdict", [
    ([(0.1, 0.2), (0.3, 0.4)], HOLDS), ([(-0.2, -0.1), (-0.3, 0.0)], DOES_NOT),
    ([(0.1, 0.2), (-0.3, 0.0)], "holds if on b0"), ([(0.1, 0.2), (0.0, 0.4)], "holds if on b0"),
    ([(0.0, 0.2), (-0.3, 0.0)], UNDECIDED)])
def test_several_effects_are_judged_together(spans, verdict):
    asked = []

    def measure(confidence):
        asked.append(confidence)
        return {f"b{i}": Interval(sum(span) / 2, *span) for i, span in enumerate(spans)}
    found = ABOVE.across(measure, condition="on {}")
    assert found.verdict == verdict and set(found.found) == {"b0", "b1"}
    assert asked[-1] == pytest.approx(0.975)                    # two effects: twice as careful


def test_a_claim_must_be_able_to_fail():
    for least, most in ((-math.inf, math.inf), (0.1, 0.1), (0.2, 0.1), (math.nan, 1)):
        with pytest.raises(ValueError, match="least < most"):
            c.Claim("anything", "7", "nats", least, most)
    with pytest.raises(ValueError, match="verdict must be one of"):
        c.Verdict("a", "6", "perhaps", "1")


# The hardest data: an effect just outside the range, where "holds" is wrong, and just inside it,
# where "does not hold" is.
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("claim, end", [(ABOVE, 0.02), (SAME, 0.05), (SAME, -0.05)])
def test_at_most_five_percent_of_random_data_are_judged_wrongly(claim, end, seeds):
    runs, wrong = 2000, 0
    rng = np.random.default_rng(0)
    for values in rng.normal(end, 0.02, (runs, seeds)):
        wrong += claim.judged(by_seeds(values)).verdict != UNDECIDED
    assert wrong / runs < 0.06                                  # 5 %, and what 2000 draws allow


@pytest.mark.parametrize("p", [0.5, 0.95, 0.999])
def test_equal_shares_are_seldom_called_different(p):
    runs, rng = 1000, np.random.default_rng(0)
    more = c.Claim("more right answers", "7", "share", 0)
    said = [more.judged(of_shares(*(rng.binomial(200, p, 3) / 200 for _ in range(2)), 200)).verdict
            for _ in range(runs)]
    assert np.mean([verdict != UNDECIDED for verdict in said]) <= 0.06


def test_many_conditions_are_no_way_to_be_right_by_chance():
    runs, rng = 1000, np.random.default_rng(0)
    wrong = 0
    for draws in rng.normal(0.02, 0.02, (runs, 4, 5)):
        found = ABOVE.across(lambda level: {f"rank {i}": by_seeds(values, level)
                                            for i, values in enumerate(draws)})
        wrong += found.verdict != UNDECIDED
    assert wrong / runs < 0.06
