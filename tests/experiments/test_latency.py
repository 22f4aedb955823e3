"""A ratio of times is measured in turn and does not depend on the machine's speed."""

import time

from lora_lib.experiments.latency import SEEDS, ratio, trial, values


def test_the_ratio_is_that_of_the_times():
    calls = []
    slow, fast = (lambda s=s: (calls.append(s), time.sleep(s)) for s in (0.03, 0.01))
    assert 2 < ratio(slow, fast, rounds=5) < 4
    assert calls.count(0.03) == calls.count(0.01)


def test_a_trial_gives_two_ratios_and_the_kept_ones_are_whole():
    assert set(trial(rounds=1)) == {"step", "call"}
    assert all(len(values(what)) == len(SEEDS) for what in ("step", "call"))
