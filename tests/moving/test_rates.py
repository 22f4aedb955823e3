"""The figure of the rates says what `lora_lib.experiments.rates` says of the same rows."""

import math
import re

import numpy as np
import pytest

from lora_lib.experiments import rates, small_rates, smol_rates
from lora_lib.experiments.intervals import best_rate
from lora_lib.experiments.rates import FIXED, FULL, times
from lora_lib.experiments.sweep import read_if_any
from lora_lib.moving.rates import runs
from tests.moving.node import call
from tests.moving.stored import outputs

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
    (table,) = (one.data["text/markdown"] for one in outputs("07_hyperparameters", "rates-higher")
                if "data" in one)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| (.*?) \|$", table, re.MULTILINE)
    assert len(rows) == len(small_rates.RANKS)
    for rank, best, over in rows:
        text = said[FIXED, int(rank)]
        assert f"the best rate is {best} (" in text and f", {over} times that of full" in text


@pytest.mark.parametrize("interval, text", [
    ([3.42, 2.61, 4.74], "3.4 (2.6 to 4.7)"), ([0.00153, None, 0.00176], "0.0015 (0.0018 at most)"),
    ([2, 1.88, None], "2 (1.9 at least)"), ([2, None, None], "2 (the seeds leave it open)")])
def test_an_end_that_is_not_known_is_not_said(interval, text):
    assert call("rates", "words", interval) == text


def test_every_run_is_inside_the_axes(figure):
    model, keys, found = figure
    ends = call("rates", "ends", {"runs": found})
    for key in keys:
        grid = model.grid(*key)
        assert ends["x"][0] < min(grid.rates) and max(grid.rates) < ends["x"][1]
        assert ends["y"][0] < np.nanmin(grid.test) and np.nanmax(grid.test) < ends["y"][1]


def luminance(levels):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
    return np.dot([0.2126, 0.7152, 0.0722], parts)


def test_letters_are_read_on_every_colour():
    losses = np.geomspace(0.3, 3, 60).tolist()
    lights = []
    for color, ink in call("rates", "(losses) => losses.map((loss) => shade(loss, 0.3))", losses):
        ground = luminance([int(n) / 255 for n in re.findall(r"\d+", color)])
        letters = {"#000": 0, "#fff": 1}[ink]
        assert (max(ground, letters) + 0.05) / (min(ground, letters) + 0.05) > 4.5
        lights.append(ground)
    assert (np.diff(lights) <= 1e-9).all()           # the lower the loss, the lighter
