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
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import LogLocator, NullLocator

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
FROZEN, GRID, GREY = "#B8C4CE", "#DDDDDD", "#777777"
MEMORY = {"weights": FROZEN, "gradients": GREEN, "optimizer": PURPLE, "activations": SKY}

HOUSE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.6), "figure.dpi": 150, "figure.constrained_layout.use": True,
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
    """
    with plt.rc_context(HOUSE):
        _, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)
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
    with _axes(ax) as ax:
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
        if logx:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if logy:
            ax.set_yscale("log")
        if ylim:
            ax.set_ylim(ylim)
        _label(ax, xlabel, ylabel, title)
        if len(series) > 1 or hline:
            ax.legend()


def points(groups: dict, *, ylabel, xlabel=None, title=None, ylim=None, logy=False, hline=None,
           colors=PALETTE, ax=None) -> None:
    """Every repeat as a dot above its label, with a bar at the mean: {label: values}."""
    with _axes(ax) as ax:
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
    with _axes(ax) as ax:
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
            colors="cividis", ax=None) -> None:
    """A matrix as colours with each value written in its cell; `rows` and `columns` label it."""
    with _axes(ax) as ax:
        values = np.asarray(values, float)
        image = ax.imshow(values, cmap=colors, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            light = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)) > 0.5
            ax.text(j, i, form.format(value), ha="center", va="center", fontsize=8,
                    color="black" if light else "white")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.grid(False)
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


def matrices(out_features: int = 4096, in_features: int = 4096, rank: int = 8, *, ax=None) -> None:
    """The picture of LoRA: the frozen W, and beside it B and A, drawn with their shapes.

    W, B, and A share one scale except that the thin side of B and A is drawn wide enough to see.
    """
    with _axes(ax) as ax:
        side = max(out_features, in_features)
        d, k, thin = out_features / side, in_features / side, max(rank / side, 0.07)
        count = lambda n: f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.1f} K"
        boxes = (
            (0, k, d, FROZEN, "$W$", f"frozen\n{out_features} × {in_features}\n"
             f"{count(out_features * in_features)} parameters"),
            (k + 0.32, thin, d, ORANGE, "$B$", f"trained\n{out_features} × {rank}\n"
             f"{count(out_features * rank)}"),
            (k + thin + 0.6, k, thin, BLUE, "$A$", f"trained\n{rank} × {in_features}\n"
             f"{count(rank * in_features)}"))
        for x, width, height, color, name, caption in boxes:
            ax.add_patch(Rectangle((x, (d - height) / 2), width, height, color=color))
            big = min(width, height) > 0.3
            ax.text(x + width / 2, d / 2 if big else (d + height) / 2 + 0.07, name, fontsize=16,
                    ha="center", va="center")
            ax.text(x + width / 2, (d - height) / 2 - 0.06, caption, ha="center", va="top",
                    fontsize=9)
        for x, sign in ((k + 0.16, r"$+\;\frac{\alpha}{r}$"), (k + thin + 0.46, r"$\times$")):
            ax.text(x, d / 2, sign, fontsize=16, ha="center", va="center")
        ax.set(xlim=(-0.15, 2 * k + thin + 0.75), ylim=(-0.42, d + 0.12), aspect="equal")
        ax.axis("off")


def paths(*, backward: bool = False, ax=None) -> None:
    """The two ways through a LoRA layer: from x to h or, `backward`, from the gradient g to dL/dx.

    The frozen W is above; below it A narrows k numbers to r and B widens r to d.
    """
    with _axes(ax) as ax:
        high, low = 2.35, 0.75                               # the two paths, middle lines
        for box, color, name, at in (
                ([(3.4, 1.75), (3.4, 2.95), (6.6, 2.85), (6.6, 1.85)], FROZEN, "$W$", high),
                ([(2.5, 0.15), (2.5, 1.35), (4.0, 0.9), (4.0, 0.6)], BLUE, "$A$", low),
                ([(6.0, 0.6), (6.0, 0.9), (7.5, 1.25), (7.5, 0.25)], ORANGE, "$B$", low)):
            ax.add_patch(Polygon(box, color=color))
            ax.text(sum(x for x, _ in box) / 4, at, name, fontsize=16, ha="center", va="center",
                    color="white" if color == BLUE else "black")
        split, join = (1.25, 1.55), (8.6, 1.55)
        for points in (((0.75, 1.55), split), (split, (1.25, high), (3.35, high)),
                       (split, (1.25, low), (2.45, low)), ((4.05, low), (5.95, low)),
                       ((7.55, low), (8.6, low), join), ((6.65, high), (8.6, high), join),
                       (join, (9.3, 1.55))):
            points = points[::-1] if backward else points
            ax.plot(*zip(*points[:-1]), color=BLACK, linewidth=1.2)
            ax.annotate("", points[-1], points[-2], arrowprops={
                "arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0})
        labels = (("$g\\,W$", 2.3, high + 0.12, "left"), ("$g\\,B$", 5, low + 0.12, "center"),
                  ("$g\\,B\\,A$", 1.35, low - 0.42, "left")) if backward else (
                 ("$W x$", 7.6, high + 0.12, "center"), ("$A x$", 5, low + 0.12, "center"),
                 ("$B A x$", 7.65, low - 0.42, "left"))
        for text, x, y, side in labels:
            ax.text(x, y, text, ha=side, fontsize=12)
        ax.text(5, low - 0.14, "$r$ numbers", ha="center", va="top", fontsize=11)
        plus = split if backward else join
        ax.text(*plus, "+", ha="center", va="center", fontsize=12,
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": BLACK})
        left, right = ("$dL/dx$", "$g$") if backward else ("$x$", "$h$")
        for x, name, size, side in ((0.6, left, "$k$", "right"), (9.4, right, "$d$", "left")):
            ax.text(x, 1.6, name, ha=side, va="bottom", fontsize=15)
            ax.text(x, 1.5, f"{size} numbers", ha=side, va="top", fontsize=11)
        ax.text(8.7, 1.1, r"$\times\,\alpha/r$", va="center", fontsize=12)
        ax.set(xlim=(-1.3, 11.3), ylim=(-0.1, 3.1))
        ax.axis("off")


def merging(*, ax=None) -> None:
    """W beside B and A becomes one matrix of W's shape by merging, and comes apart again by
    unmerging. Its letters are large enough for a figure 5 wide, on a phone."""
    with _axes(ax) as ax:
        thin, middle = 0.16, 0.5
        for x, width, height, color, name, shape in (
                (0, 1, 1, FROZEN, "$W$", "d × k"), (1.48, thin, 1, ORANGE, "$B$", "d × r"),
                (1.92, 1, thin, BLUE, "$A$", "r × k"), (4.05, 1, 1, FROZEN, "$W'$", "d × k")):
            corner, big = (x, middle - height / 2), width == height
            ax.add_patch(Rectangle(corner, width, height, color=color))
            if name == "$W'$":                               # the update is in every entry
                ax.add_patch(Rectangle(corner, width, height, facecolor="none", hatch="///",
                                       edgecolor=ORANGE, linewidth=0))
            ax.text(x + width / 2, middle if big else middle + height / 2 + 0.13, name,
                    ha="center", va="center", fontsize=16,
                    bbox={"facecolor": FROZEN, "linewidth": 0, "pad": 2} if big else None)
            ax.text(x + width / 2, middle - height / 2 - 0.06, shape, ha="center", va="top",
                    fontsize=12)
        for x, sign in ((1.22, "$+\\;s$"), (1.78, r"$\times$")):
            ax.text(x, middle, sign, ha="center", va="center", fontsize=14)
        for y, start, end, name, side, at in ((0.6, 3.1, 3.88, "merge", "bottom", 0.66),
                                              (0.4, 3.88, 3.1, "unmerge", "top", 0.34)):
            ax.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": GREY})
            ax.text(3.49, at, name, ha="center", va=side, fontsize=12)
        ax.set(xlim=(-0.05, 5.1), ylim=(-0.25, 1.3), aspect="equal")
        ax.axis("off")


def number_line(numbers, weight, updates, *, form="{:.4f}", ax=None) -> None:
    """The numbers that a format has around `weight`, and where `weight` plus each update is stored.

    A sum in the shaded part is nearest to `weight` itself. `form` writes the numbers.
    """
    with _axes(ax) as ax:
        numbers = np.sort(np.asarray(numbers, float))
        own = int(np.abs(numbers - weight).argmin())
        low, high = ((numbers[own] + numbers[own + side]) / 2 for side in (-1, 1))
        ax.axvspan(low, high, color=FROZEN, alpha=0.5, linewidth=0)
        ax.plot(numbers, 0 * numbers, "|-", color=GREY, markersize=18, linewidth=1.2)
        for y, update in zip(np.linspace(2, 1, len(updates)), updates):
            stored = numbers[np.abs(numbers - weight - update).argmin()]
            color = RED if stored == numbers[own] else BLACK
            ax.annotate("", (weight + update, y), (weight, y), arrowprops={
                "arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0})
            ax.plot([weight + update, stored], [y, 0], ":", color=color)
            ax.plot(stored, 0, "o", color=color, markersize=7)
            ax.text(weight + update, y, f"  + {np.format_float_positional(update)}, stored as "
                    f"{form.format(stored)}", va="center", fontsize=12, color=color)
        for number in numbers:
            ax.text(number, -0.45, form.format(number), ha="center", va="top", fontsize=12)
        ax.set(ylim=(-1.2, 2.5), yticks=[], xticks=[])
        ax.axis("off")


def shared_base(names: tuple[str, ...] = ("last", "count", "first"), *, ax=None) -> None:
    """Many adapters on one base: each request's vector goes through the one frozen W, and through
    the A and B that its name says."""
    with _axes(ax) as ax:
        high = len(names) * 2.0
        ax.add_patch(Rectangle((2.6, 0), 5.2, high, color=FROZEN, alpha=0.6))
        ax.text(5.2, high + 0.2, "one frozen $W$ for all", ha="center", va="bottom", fontsize=12)
        for i, name in enumerate(names):
            top, low = high - 2 * i - 0.55, high - 2 * i - 1.4
            for points in (((1.4, top), (8.35, top)), ((2.0, top), (2.0, low), (3.45, low)),
                           ((4.45, low), (5.95, low)), ((6.95, low), (8.6, low), (8.6, top - 0.25)),
                           ((8.85, top), (9.6, top))):
                ax.plot(*zip(*points[:-1]), color=BLACK, linewidth=1.2)
                ax.annotate("", points[-1], points[-2], arrowprops={
                    "arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0})
            for x, sides, color, letter in ((3.5, (0.5, 0.25), BLUE, "$A$"),
                                            (6.0, (0.25, 0.5), ORANGE, "$B$")):
                (left, right) = sides
                ax.add_patch(Polygon([(x, low - left), (x, low + left), (x + 0.9, low + right),
                                      (x + 0.9, low - right)], color=color))
                ax.text(x + 0.45, low, letter, ha="center", va="center", fontsize=12,
                        color="white" if color == BLUE else "black")
            ax.text(5.2, low, name, ha="center", va="center", fontsize=10, style="italic",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
            ax.text(5.2, top + 0.08, "$W x$", ha="center", va="bottom", fontsize=11)
            ax.text(8.6, top, "+", ha="center", va="center", fontsize=12,
                    bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": BLACK})
            ax.text(1.3, top, f"wants\n{name}", ha="right", va="center", fontsize=10)
            ax.text(9.7, top, "$h$", va="center", fontsize=12)
        ax.set(xlim=(0, 10.2), ylim=(-0.1, high + 0.8))
        ax.axis("off")


@contextmanager
def _axes(ax):
    if ax is not None:
        yield ax
        return
    with plt.rc_context(HOUSE):
        yield plt.subplots()[1]
        plt.show()


def _label(ax, xlabel, ylabel, title):
    ax.set(**{k: v for k, v in (("xlabel", xlabel), ("ylabel", ylabel), ("title", title)) if v})
