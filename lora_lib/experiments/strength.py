"""SmolLM2's answers against the strength of an adapter: its updates times a share of their scaling.

    python -m lora_lib.experiments.strength     ten minutes on one core

The adapter is that of the run of LoRA on tool calls, seed 0, of `assistant`. At strength 0 the
model is the base, at 1 it is as trained.
"""

import torch
from torch import nn

from lora_lib import calls
from lora_lib.experiments import assistant
from lora_lib.experiments.sweep import RESULTS, Row, read, write
from lora_lib.torch import lora_modules
from lora_lib.tuning.data import encode
from lora_lib.tuning.evaluation import loss_and_match, replies

STRENGTHS = (0, 0.125, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
ASKED = (0, 1, 3, 5)                 # of the test's first requests, those whose answers are kept
MOST = 40                            # tokens of an answer


def trained() -> nn.Module:
    """The assistant after the run of LoRA."""
    lr = assistant.best_lr(read("assistant"), "calls", "LoRA")
    model = assistant.fresh("LoRA", seed=0)
    rows = encode(model.tokenizer, assistant.chats("calls", assistant.TRAINED, 0, "train"))
    assistant.train(model, rows, lr=lr, steps=assistant.STEPS["calls"], seed=0, progress=False)
    return model


def measured(model: nn.Module) -> list[Row]:
    """At every strength: the loss and the share of right calls on the test, and what the model
    says to a few requests, a row for each."""
    test = assistant.chats("calls", assistant.TESTED, 0, "test")
    some = [test[i] for i in ASKED]
    full = {name: layer.scaling for name, layer in lora_modules(model).items()}
    found: list[Row] = []
    for strength in STRENGTHS:
        for name, layer in lora_modules(model).items():
            layer.scaling = strength * full[name]
        loss, right = loss_and_match(model, model.tokenizer, test, 16)
        said = replies(model, model.tokenizer, [chat[:-1] for chat in some], max_new_tokens=MOST)
        found += [{"strength": strength, "loss": loss, "right": right,
                   "request": chat[1]["content"], "expected": chat[-1]["content"], "said": text}
                  for chat, text in zip(some, said)]
    return found


def data(rows: list[Row]) -> dict:
    """The rows as the figure `lora_lib/moving/strength.js` takes them."""
    strengths = {row["strength"]: [] for row in rows}
    for row in rows:
        strengths[row["strength"]].append(row)
    asked = [{"request": row["request"], "expected": row["expected"]}
             for row in next(iter(strengths.values()))]
    answer = lambda row: {"text": row["said"],
                          "right": calls.score(row["said"], row["expected"])["exact"] == 1}
    return {"asked": asked, "tested": assistant.TESTED, "strengths": [
        {"strength": strength, "loss": round(some[0]["loss"], 4),
         "right": round(some[0]["right"], 4), "said": [answer(row) for row in some]}
        for strength, some in strengths.items()]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(RESULTS / "strength.csv", measured(trained()))
