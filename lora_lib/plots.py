"""The pictures of the course: one function for each kind, one style, one palette.

Each function draws on `ax` if it is given (see `panels`), else on a figure of its own, which it
shows. All return None, so that a plotting cell has no output but its figure. The palette is
Okabe and Ito's, which readers with any colour vision can tell apart; markers and line styles
change along with the colours.
"""

import math
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
FROZEN, GRID, GREY = "#B8C4CE", "#DDDDDD", "#777777"
MEMORY = {"weights": FROZEN, "gradients": GREEN, "optimizer": PURPLE, "activations": SKY}

HOUSE: dict[Any, Any] = {
    "figure.figsize": (4.4, 3.0), "figure.dpi": 150, "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=PALETTE), "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "font.size": 10, "axes.titlesize": 11, "legend.framealpha": 0.9,
    "legend.edgecolor": "white", "lines.linewidth": 1.8, "lines.markersize": 5,
    "svg.hashsalt": "lora", "svg.fonttype": "path",
}


@contextmanager
def panels(columns: int = 2, rows: int = 1, *, width: float = 4.2, height: float = 3.4, **options):
    """Several pictures in one figure: `with panels(2) as (left, right): curves(..., ax=left)`.

    Gives the axes, one row's or all in reading order, and shows the figure when the block ends.
    Each has its numbers, also where `sharey` makes them the same: a phone shows one at a time.
    """
    with plt.rc_context(HOUSE):
        _, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)
        for ax in np.ravel(axes):
            ax.yaxis.set_tick_params(labelleft=True)
        yield axes.ravel() if rows * columns > 1 else [axes]
        plt.show()


def curves(series: dict, *, x=None, xlabel="step", ylabel="loss", title=None, logx=False,
           logy=False, markers=False, ylim=None, hline=None, colors=PALETTE, dots=False,
           ax=None) -> None:
    """One line for each label in `series`: {label: y}, or {label: (x, y)}.

    Where y is two-dimensional, (repeats, points), the line is the mean and the band spans from
    the least to the greatest repeat, or with `dots` each repeat is a dot. `hline` is {label:
    height} for dashed reference lines.
    """
    above = ax is None and len(series) > 2           # the legend: among lines there is no room
    with axes_or_new(ax, (4.4, 3.5) if above else None) as ax:
        for i, (label, data) in enumerate(series.items()):
            at, y = data if isinstance(data, tuple) else (x, data)
            y = np.asarray(y, float)
            at = np.arange(y.shape[-1]) if at is None else np.asarray(at, float)
            color = colors[i % len(colors)]
            ax.plot(at, y.mean(0) if y.ndim == 2 else y, LINES[i % len(LINES)], color=color,
                    marker=MARKERS[i % len(MARKERS)] if markers else None, label=label)
            if y.ndim == 2 and dots:
                ax.plot(at, y.T, MARKERS[i % len(MARKERS)], color=color, markersize=3, alpha=0.5)
            elif y.ndim == 2:
                ax.fill_between(at, y.min(0), y.max(0), color=color, alpha=0.2, linewidth=0)
        for label, height in (hline or {}).items():
            ax.axhline(height, color=BLACK, linestyle=":", linewidth=1.2, label=label)
        if logx:                     # rates in powers of ten, what is counted in powers of two
            ax.set_xscale("log", base=10 if ax.dataLim.x0 < 1 else 2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if logy:
            ax.set_yscale("log")
        if ylim:
            ax.set_ylim(ylim)
        _label(ax, xlabel, ylabel, title)
        if above:
            ax.figure.legend(loc="outside upper center", frameon=False,
                             ncols=2 if len(series) == 4 else 3)
        elif len(series) > 1 or hline:
            ax.legend()


def points(groups: dict, *, ylabel, xlabel=None, title=None, ylim=None, logy=False, hline=None,
           colors=PALETTE, ax=None) -> None:
    """Every repeat as a dot above its label, with a bar at the mean: {label: values}."""
    with axes_or_new(ax) as ax:
        for i, values in enumerate(groups.values()):
            values = np.asarray(values, float)
            spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0]
            color = colors[i % len(colors)]
            ax.plot(i + np.asarray(spread), values, MARKERS[i % len(MARKERS)], color=color)
            ax.plot([i - 0.28, i + 0.28], [values.mean()] * 2, color=color, linewidth=2.5)
        for label, height in (hline or {}).items():
            ax.axhline(height, color=BLACK, linestyle=":", linewidth=1.2, label=label)
            ax.legend()
        ax.set_xticks(range(len(groups)), list(groups))
        ax.set_xlim(-0.6, len(groups) - 0.4)
        if logy:
            ax.set_yscale("log")
        if ylim:
            ax.set_ylim(ylim)
        _label(ax, xlabel, ylabel, title)


def effects(groups: dict, *, colors: dict, markers: dict, width: float = 7.2) -> None:
    """Effects with their intervals, a row and a scale for each label: {label: verdicts}.

    A verdict, of `lora_lib.experiments.claims`, has its intervals in `parts`, each with what is
    said of it, and the range that its claim asserts, from `least` to `most`, which is shaded.
    `colors` are by what is said, `markers` by the model. The scale of a ratio is logarithmic.
    """
    with plt.rc_context(HOUSE):
        _, axes = plt.subplots(len(groups), figsize=(width, 0.62 * len(groups)), squeeze=False)
        for ax, (label, verdicts) in zip(axes[:, 0], groups.items()):
            dots = [(*part, verdict.model) for verdict in verdicts for part in verdict.parts]
            least, most = verdicts[0].least, verdicts[0].most
            ends = [x for x in (least, most, *(x for one, _, _ in dots for x in (
                one.low, one.middle, one.high))) if math.isfinite(x)]
            ratio = (max(ends) > 1.8 * min(ends) > 0
                     and min(x for x in (least, most) if math.isfinite(x)) > 0.25)
            scale, back = (math.log, math.exp) if ratio else (float, float)
            edge = 0.08 * (scale(max(ends)) - scale(min(ends)))
            left, right = back(scale(min(ends)) - edge), back(scale(max(ends)) + edge)
            inside = lambda x: min(max(x, left), right)
            ax.axvspan(inside(least), inside(most), color=FROZEN, alpha=0.35, linewidth=0)
            for i, (one, said, model) in enumerate(dots):
                ax.plot([inside(one.low), inside(one.high)], [-i, -i], color=colors[said])
                ax.plot(one.middle, -i, markers[model], color=colors[said])
            if ratio:
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_locator(NullLocator())
            ax.set(xlim=(left, right), ylim=(0.3 - len(dots), 0.7), yticks=[])
            ax.tick_params(labelsize=8)
            ax.spines["left"].set_visible(False)
            ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        plt.show()


def bars(groups: dict, *, xlabel, title=None, logx=False, unit="", digits=3, colors=None,
         ax=None) -> None:
    """Horizontal bars with their values written out: {label: value}, or {label: {part: value}},
    whose parts are stacked. `colors` are by part; without them they are the palette's, in order."""
    with axes_or_new(ax) as ax:
        parts = list(dict.fromkeys(p for v in groups.values() if isinstance(v, dict) for p in v))
        labels = list(groups)
        left = np.zeros(len(labels))
        for i, part in enumerate(parts or [None]):
            width = np.array([groups[name].get(part, 0) if parts else groups[name]
                              for name in labels], float)
            ax.barh(labels, width, left=left, label=part, edgecolor="white",
                    color=colors[part] if colors else PALETTE[i % len(PALETTE)])
            left += width
        for y, total in enumerate(left):
            ax.text(total, y, f" {total:,.{digits}g}{unit}", va="center")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.25)
        if logx:
            ax.set_xscale("log")
        _label(ax, xlabel, None, title)
        if parts:                                    # above the bars, which fill the axes
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08 if title else 1), ncols=2)


def heatmap(values, *, rows, columns, xlabel, ylabel, title=None, unit="", form="{:.2f}",
            colors="cividis", limits=None, ax=None) -> None:
    """A matrix as colours with each value written in its cell; `rows` and `columns` label it.

    `limits` are the values of the first and the last colour; maps that share them need no bar.
    """
    with axes_or_new(ax) as ax:
        values = np.asarray(values, float)
        low, high = limits or (None, None)
        image = ax.imshow(values, cmap=colors, aspect="auto", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(values):
            light = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)) > 0.5
            ax.text(j, i, form.format(value), ha="center", va="center", fontsize=9,
                    color="black" if light else "white")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.grid(False)
        if not limits:
            ax.figure.colorbar(image, ax=ax, label=unit)
        _label(ax, xlabel, ylabel, title)


def images(rows: dict, *, count: int = 8) -> None:
    """Rows of small square images, each row named: {label: (n, side * side)}, the first `count`."""
    with plt.rc_context(HOUSE):
        figure, axes = plt.subplots(len(rows), count, squeeze=False,
                                    figsize=(0.75 * count + 1, 0.85 * len(rows)))
        for line, (label, data) in zip(axes, rows.items()):
            for ax, pixels in zip(line, data):
                side = int(round(len(pixels) ** 0.5))
                ax.imshow(pixels.reshape(side, side), cmap="gray_r")
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        plt.show()


@contextmanager
def axes_or_new(ax=None, figsize=None):
    """The axes `ax` or, without them, those of a new figure of this size in inches, which is shown
    when the block ends."""
    if ax is not None:
        yield ax
        return
    with plt.rc_context(HOUSE):
        yield plt.subplots(figsize=figsize)[1]
        plt.show()


def _label(ax, xlabel, ylabel, title):
    ax.set(**{k: v for k, v in (("xlabel", xlabel), ("ylabel", ylabel), ("title", title)) if v})
