"""A ratio of times is measured in turn and does not depend on the machine's speed."""

import time

import pytest

from lora_lib.experiments.latency import SEEDS, ratio, trial, values


def test_the_ratio_is_that_of_the_times(monkeypatch):
    now, calls = [0.0], []

    def call(seconds):
        calls.append(seconds)
        now[0] += seconds * (10 if len(calls) == 2 else 1)      # the first round is not counted
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    slow, fast = (lambda s=s: call(s) for s in (0.03, 0.01))
    assert ratio(slow, fast, rounds=5) == pytest.approx(3)
    assert calls.count(0.03) == calls.count(0.01) == 5


def test_a_trial_gives_two_ratios_and_the_kept_ones_are_whole():
    assert set(trial(rounds=1)) == {"step", "call"}
    assert all(len(values(what)) == len(SEEDS) for what in ("step", "call"))
