"""The kept results are those of the experiments as they stand, and verdicts follow from them."""

import importlib
import math

import pytest

from lora_lib.experiments import (batches, claims, enough, filled, foundations, minilm_rates,
                                  small_rates, smol, smol_facts, smol_rates, smol_studies,
                                  smol_updates, sweep, targets, trial)

MODULES = sorted(path.stem for path in (sweep.RESULTS.parent).glob("*.py")
                 if "def verdicts" in path.read_text("utf8"))


@pytest.mark.parametrize("function, points, name", [
    (foundations.trial, foundations.points, "foundations"),
    (trial.redrawn, targets.points, "targets"),
    (targets.facts, targets.facts_points, "targets_facts"),
    (trial.redrawn, small_rates.points, "small_rates"),
    (trial.redrawn, batches.points, "batches"),
    (enough.trial, lambda: [p for task in enough.SETTING for p in enough.points(task)]
     + enough.more(), "enough"),
    (filled.trial, filled.RUNS.points, "filled"),
    (minilm_rates.trial, minilm_rates.points, "minilm_rates"),
    (smol.trial, smol_rates.points, "smol_rates"),
    (smol_facts.trial, smol_facts.RUNS.points, "smol_facts"),
    (smol_updates.trial, smol_updates.points, "smol_updates"),
    (smol_updates.dissected, smol_updates.own_points, "smol_updates_dissected"),
    *((smol.trial, lambda study=study: smol_studies.points(study), "smol_studies")
      for study in ("targets", "start", "batch")),
])
def test_every_point_has_been_run(function, points, name):
    assert points() and not sweep.lacking(function, points(), name)


@pytest.mark.parametrize("path", sorted(sweep.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_results_are_small_and_whole(path):
    rows = sweep.read(path)
    assert path.stat().st_size < 100_000 and rows
    assert not any(math.isnan(v) for row in rows for v in row.values() if isinstance(v, float))


def test_experiments_give_verdicts_and_no_claim_is_judged_twice():
    found = [v for module in MODULES
             for v in importlib.import_module(f"lora_lib.experiments.{module}").verdicts()]
    assert len(found) > 30 and all(isinstance(v, claims.Verdict) for v in found)
    assert len({(v.claim, v.model) for v in found}) == len(found)


def test_a_measure_of_the_foundations_comes_out_again():
    for what in ("lora rank 8 accuracy", "lost by merging two in all layers",
                 "error of an input gradient without the adapter"):
        again = foundations.trial(what, foundations.SEEDS[0])["value"]
        assert again == pytest.approx(foundations.values(what)[0], abs=0.05)
