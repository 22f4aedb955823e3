"""Drawings that are not data: where the adapters of a transformer sit, which tokens count.

As in `lora_lib.plots`, each draws on `ax` if it is given, else on a figure of its own, which it
shows. W is grey, A blue, B orange.
"""

from contextlib import contextmanager

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from lora_lib.plots import BLACK, BLUE, FROZEN, GREEN, GREY, HOUSE, ORANGE


def block(*, ax=None) -> None:
    """One layer of a Llama, from top to bottom: attention and MLP, each added to the path on the
    left; beside each of the seven frozen weights its A and B."""
    with _axes(ax, (5.2, 7.0)) as ax:
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
    with _axes(ax, (5.6, 0.75 * rows + 0.3)) as ax:
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


@contextmanager
def _axes(ax, size):
    if ax is not None:
        yield ax
        return
    with plt.rc_context(HOUSE):
        yield plt.subplots(figsize=size)[1]
        plt.show()


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
