"""The figure of the rates says what `lora_lib.experiments.rates` says of the same rows."""

import math

import numpy as np
import pytest

from lora_lib.experiments import rates, small_rates, smol_rates
from lora_lib.experiments.intervals import best_rate
from lora_lib.experiments.rates import FIXED, FULL, times
from lora_lib.experiments.sweep import read_if_any
from lora_lib.moving.rates import runs
from tests.moving.node import call
from tests.moving.stored import table

MODELS = {"small": (small_rates, small_rates.RANKS, small_rates.SCHEMES),
          "SmolLM2": (smol_rates, rates.RANKS, rates.SCHEMES)}


@pytest.fixture(scope="module", params=MODELS)
def figure(request):
    """A model's module, its methods and what the page is given of them."""
    model, ranks, schemes = MODELS[request.param]
    if len(read_if_any(model.NAME)) < len(model.points()):
        pytest.skip(f"the runs of {request.param} are not whole")
    keys = [FULL, *((scheme, rank) for scheme in schemes for rank in ranks)]
    return model, keys, runs(model.grid, ranks, schemes)


@pytest.fixture(scope="module")
def said(figure):
    _, keys, found = figure
    return dict(zip(keys, call("rates", "(all) => all.map((run) => sentence(run, all[0]))", found)))


def test_mean_losses(figure):
    model, keys, found = figure
    for key, points in zip(keys, call("rates", "(all) => all.map(means)", found), strict=True):
        grid = model.grid(*key)
        at, losses, whole = zip(*points)
        assert at == grid.rates and list(whole) == grid.shared.tolist()
        assert losses == pytest.approx(np.nanmean(grid.test, axis=0), rel=1e-12)


def test_best_rates_and_losses(figure, said):
    model, keys, _ = figure
    full = model.grid(*FULL)
    for key in keys[1:]:
        grid = model.grid(*key)
        best, over = best_rate(*grid.curve), times(grid, full)
        for text, shown in ((said[key].split("the best rate is ")[1], best.middle),
                            (said[key].split("), ")[1], over.middle),
                            (said[key].split("which is ")[1], best_rate(*full.curve).middle)):
            digit = 10 ** (math.floor(math.log10(shown)) - 1)            # the second; losses are rounded
            assert float(text.split(" ")[0]) == pytest.approx(shown, abs=0.51 * digit)
        assert f"LoRA {grid.own().mean():.3f}, full {full.own().mean():.3f}." in said[key]


def test_the_table_of_the_chapter(figure, said):
    if figure[0] is not small_rates:
        pytest.skip("the table is of the small model")
    rows = table("07_hyperparameters", "rates-higher")[2:]           # the first is of full
    assert len(rows) == len(small_rates.RANKS)
    for method, best, over in rows:
        text = said[FIXED, int(method.removeprefix("LoRA, rank "))]
        assert f"the best rate is {best}" in text and f", {over} times that of full" in text
