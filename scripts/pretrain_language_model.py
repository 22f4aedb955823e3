"""Pretrain the course's language model on generated tales, from nothing: about ten minutes on two
CPU cores. Writes the weights that `lora_lib.torch.load_pretrained` reads.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_lib.files import atomic
from lora_lib.models.tales import WEIGHTS, LanguageModel, LanguageModelConfig
from lora_lib.text import Tokenizer, tales
from lora_lib.torch import fine_tune, mean_loss, warmup_cosine

ROW, BATCH, LR, WEIGHT_DECAY = 80, 32, 3e-3, 0.1
HELD_OUT = 1000


def pack(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (rows, ROW), each row with as many whole texts as fit, end between them.

    Several texts in a row waste less padding than one, and train the later positions as well.
    A text too long for a row is left out.
    """
    rows, row = [], [tokenizer.end]
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.end]
        if len(ids) > ROW:
            continue
        if len(row) + len(ids) > ROW + 1:
            rows.append(row)
            row = [tokenizer.end]
        row = row + ids
    rows.append(row)
    tokens = torch.full((len(rows), ROW + 1), -100)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    inputs = tokens[:, :-1].clone()
    inputs[inputs == -100] = tokenizer.pad
    return inputs, tokens[:, 1:].contiguous()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tales", type=int, default=200_000, help="how many to train on")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights and the tales")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "tales.safetensors")
    parser.add_argument("--checkpoint", type=Path, help="a file to resume from, if it exists")
    args = parser.parse_args()

    tokenizer = Tokenizer()
    model = LanguageModel(LanguageModelConfig(len(tokenizer)), seed=args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(tokenizer)} tokens, {args.tales:,} tales")
    losses = fine_tune(model, pack(tokenizer, tales(args.tales, args.seed)), steps=args.steps,
                       batch_size=BATCH, lr=LR, weight_decay=WEIGHT_DECAY, seed=args.seed,
                       checkpoint=args.checkpoint, checkpoint_every=500,
                       schedule=warmup_cosine(args.steps, warmup=args.steps // 25, final=0.02))
    print(f"training loss {losses[-1]:.4f}")

    held_out_seed = args.seed + 1
    model.to(torch.bfloat16).float()         # judge the weights that will be stored
    loss = mean_loss(model, tokenizer, tales(HELD_OUT, held_out_seed))
    print(f"held-out loss {loss:.4f} nats a token")
    record = {"config": asdict(model.config), "tokens": tokenizer.tokens, "seed": args.seed,
              "steps": args.steps, "tales": args.tales, "held_out_loss": loss,
              "held_out_tales": HELD_OUT, "held_out_seed": held_out_seed}
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    with atomic(args.out) as path:
        save_file(weights, path, {key: json.dumps(value) for key, value in record.items()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
