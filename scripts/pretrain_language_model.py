"""Pretrain the course's language model on generated tales, from nothing: about ten minutes on two
CPU cores. Writes the weights that `lora_lib.torch.load_pretrained` reads.
"""

import argparse
from pathlib import Path

from lora_lib.models.pretraining import WIDTH, pretrain
from lora_lib.models.tales import WEIGHTS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tales", type=int, default=200_000, help="how many to train on")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights and the tales")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "tales.safetensors")
    parser.add_argument("--checkpoint", type=Path, help="a file to resume from, if it exists")
    args = parser.parse_args()
    pretrain(args.out, width=args.width, steps=args.steps, texts=args.tales, seed=args.seed,
             checkpoint=args.checkpoint)


if __name__ == "__main__":
    main()
