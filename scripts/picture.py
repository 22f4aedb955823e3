"""Draw the picture of LoRA that the landing page and the README show: book/_static/lora.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

from lora_lib import diagrams, plots  # noqa: E402

TARGET = Path(__file__).parents[1] / "book" / "_static" / "lora.svg"

with plots.panels(1, width=6.4, height=3.4) as (ax,):
    diagrams.matrices(ax=ax)
    plt.savefig(TARGET, metadata={"Date": None}, facecolor="white")
