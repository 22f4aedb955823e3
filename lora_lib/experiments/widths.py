"""Why LoRA wants a rate about ten times as high: does the ratio grow as the root of the width?

In the limit of wide layers, AdamW's best rate for a whole weight falls as 1 / width (muP, arXiv
2203.03466), and that of LoRA's A and B, at one rank, as 1 / sqrt(width) (arXiv 2602.06204 has such
a law). If so, their ratio grows as sqrt(width): the factor of ten that is found on real models, and
the much smaller one on small models, would be one law.

Written down before the runs that test it, with nothing fitted but one point, the small model's
(width 96, rank 16, alpha = 16, `hyperparameters`: 2.8 times):
- the slope of log(ratio) against log(width), over small models of four widths, is 1/2: its interval
  lies within 0.25 and 0.75
- `predicted(384)`, MiniLM's ratio, and `predicted(576)`, SmolLM2's, are right within a factor of
  two
Coarse grids of chapters 10 and 14 were known: SmolLM2 at alpha = 2r had its best among 0.0005,
0.001, 0.002 for LoRA and among 0.00005, 0.0001, 0.0002 for full fine-tuning.
"""

BASE_WIDTH, BASE_RATIO = 96, 2.8
SLOPE = 1 / 2


def predicted(width: int) -> float:
    """How many times LoRA's best rate is full fine-tuning's, by the law, at rank 16, alpha = 16."""
    return BASE_RATIO * (width / BASE_WIDTH) ** SLOPE
