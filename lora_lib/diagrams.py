"""Drawings: the matrices of LoRA, the ways through a layer, merging, where adapters sit.

As in `lora_lib.plots`, each draws on `ax` if it is given, else on a figure of its own, which it
shows. W is grey, A blue, B orange.
"""

import numpy as np
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from lora_lib.plots import BLACK, BLUE, FROZEN, GREEN, GREY, ORANGE, RED, axes_or_new


def block(*, ax=None) -> None:
    """One layer of a Llama, from top to bottom: attention and MLP, each added to the path on the
    left; beside each of the seven frozen weights its A and B."""
    with axes_or_new(ax, (5.2, 7.0)) as ax:
        draw = _Drawing(ax)
        draw.arrow((1, 14), (1, 0))
        ax.text(1, 14.2, "$x$, one vector a token", ha="left", fontsize=11)
        for top, kinds, middle, last in (
                (13.2, ("q_proj", "k_proj", "v_proj"), "attention: each token\nlooks at those "
                 "before it", "o_proj"),
                (6.4, ("gate_proj", "up_proj"), "silu(gate) × up,\neach token alone", "down_proj")):
            draw.line((1, top), (5.5, top))
            draw.box(5.5, top - 0.5, 2.4, "norm")
            draw.arrow((5.5, top), (5.5, top - 0.15))
            places = [3.0, 5.5, 8.0] if len(kinds) == 3 else [4.0, 7.2]
            for x, name in zip(places, kinds):
                draw.arrow((5.5, top - 0.85), (x, top - 1.45))
                draw.weight(x, top - 1.9, name)
                draw.arrow((x, top - 2.35), (5.5 + (x - 5.5) * 0.45, top - 2.9))
            draw.box(5.5, top - 3.35, 5.0, middle, 0.85)
            draw.arrow((5.5, top - 3.8), (5.5, top - 4.25))
            draw.weight(5.5, top - 4.7, last)
            draw.line((5.5, top - 5.15), (5.5, top - 5.5), (1.2, top - 5.5))
            ax.text(1, top - 5.5, "+", ha="center", va="center", fontsize=12, bbox={
                "boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": BLACK})
        for x, color, name in (
                (4.9, FROZEN, "$W$, frozen"), (7.2, BLUE, "$A$"), (8.3, ORANGE, "$B$")):
            ax.add_patch(Rectangle((x, -0.45), 0.3, 0.3, color=color))
            ax.text(x + 0.4, -0.3, name, va="center", fontsize=10)
        ax.set(xlim=(0.2, 10), ylim=(-0.8, 14.7))
        ax.axis("off")


def counted(pieces: list[str], right: list[str], *, columns: int = 6, ax=None) -> None:
    """Tokens in reading order, each above the one that is to follow it; "" where that does not
    count. A space is written as a dot."""
    rows = -(-len(pieces) // columns)
    shown = lambda piece: piece.replace(" ", "·").replace("\n", "↵")
    with axes_or_new(ax, (5.6, 0.75 * rows + 0.3)) as ax:
        for i, (piece, after) in enumerate(zip(pieces, right)):
            x, y = i % columns, -(i // columns)
            ax.add_patch(Rectangle((x + 0.03, y + 0.02), 0.94, 0.4, color=FROZEN))
            ax.text(x + 0.5, y + 0.22, shown(piece), ha="center", va="center", fontsize=10)
            if after:
                ax.add_patch(Rectangle((x + 0.03, y - 0.42), 0.94, 0.4, color=GREEN))
            ax.text(x + 0.5, y - 0.22, shown(after) or "–", ha="center", va="center", fontsize=10,
                    color="white" if after else GREY)
        ax.set(xlim=(0, columns), ylim=(0.5 - rows, 0.5))
        ax.axis("off")


def matrices(out_features: int = 4096, in_features: int = 4096, rank: int = 8, *, ax=None) -> None:
    """The picture of LoRA: the frozen W, and beside it B and A, drawn with their shapes.

    W, B, and A share one scale except that the thin side of B and A is drawn wide enough to see.
    """
    with axes_or_new(ax) as ax:
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
    with axes_or_new(ax) as ax:
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
    with axes_or_new(ax) as ax:
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
    with axes_or_new(ax) as ax:
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
    with axes_or_new(ax) as ax:
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


class _Drawing:
    """Boxes and arrows on axes."""

    def __init__(self, ax):
        self.ax = ax

    def box(self, x, y, width, text, height=0.7):
        self.ax.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, facecolor="white", edgecolor=BLACK,
            boxstyle="round,pad=0,rounding_size=0.15"))
        self.ax.text(x, y, text, ha="center", va="center", fontsize=9)

    def weight(self, x, y, name):
        """A frozen weight, and beside it the two thin matrices."""
        self.ax.add_patch(Rectangle((x - 1.05, y - 0.4), 1.5, 0.8, color=FROZEN))
        self.ax.text(x - 0.3, y, name, ha="center", va="center", fontsize=9)
        self.ax.add_patch(Rectangle((x + 0.5, y - 0.4), 0.14, 0.8, color=ORANGE))
        self.ax.add_patch(Rectangle((x + 0.7, y + 0.26), 0.5, 0.14, color=BLUE))

    def line(self, *points):
        self.ax.plot(*zip(*points), color=BLACK, linewidth=1.1)

    def arrow(self, start, end):
        self.ax.annotate("", end, start, arrowprops={
            "arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1})
