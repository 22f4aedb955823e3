"""A whole training run of SmolLM2 beside PEFT under transformers' Trainer and TRL's SFTTrainer.

    python -m benchmarks.runs              the methods in turn, three rounds, a process for each run
    python -m benchmarks.runs --steps 2 --rounds 1 --only lora_lib       to see that it runs

Everybody trains the same adapters, from the same first values, on the same batches of tool calls
(lora_lib/calls.py) in the same order, with the same AdamW at a constant rate, in float32. Trainer and
SFTTrainer are set up as their documentation shows it; and both sides once more with two rows of a
batch at a time, which takes less memory (micro_batch_size, gradient_accumulation_steps). A run's time
is that of its training call; its memory is the most that its process held, and how much of that came
after the model was loaded. With a CUDA GPU the same command trains there, and the memory is the GPU's.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.run import DEVICE, RESULTS, machine
from lora_lib.experiments.sweep import Row, write
from lora_lib.files import atomic
from lora_lib.models import load_pretrained, smollm2
from lora_lib.torch import fine_tune, inject, save_adapter
from lora_lib.tuning.data import Rows, encode
from lora_lib.tuning.loop import _batches

BATCH, PART, RATE, RANK, ALPHA, EXAMPLES, SEED = 8, 2, 1e-3, 8, 16, 400, 0


def data(steps: int) -> tuple[Rows, list[int]]:
    """The rows, and their numbers in the order in which every method takes them."""
    from lora_lib import calls
    tokenizer = load_pretrained("smollm2").tokenizer
    rows = encode(tokenizer, calls.chats(EXAMPLES, SEED, "train"))
    order = islice(_batches(len(rows), BATCH, SEED, rows.lengths), steps)
    return rows, [int(i) for batch in order for i in batch]


def shares(steps: int) -> dict[str, float]:
    """Of the tokens of the batches: the share that a common beginning has, and that is learned."""
    rows, order = data(steps)
    labels = [rows.labels[i] for i in order]
    first = [int((row != -100).nonzero()[0]) for row in labels]
    alike = next(n for n in range(min(first)) if len({int(rows.inputs[i][n]) for i in order}) > 1)
    tokens = sum(map(len, labels))
    return {"shared": alike * len(order) / tokens,
            "learned": sum(int((row != -100).sum()) for row in labels) / tokens}


def ours(rows: Rows, order: list[int], steps: int, part: int | None = None):
    model = inject(load_pretrained("smollm2", device=DEVICE), "all-linear", RANK, ALPHA, seed=SEED)

    def run():
        return fine_tune(model, rows, steps=steps, batch_size=BATCH, lr=RATE, seed=SEED,
                         micro_batch_size=part, precision="model", progress=False)
    return model, run


def theirs():
    """PEFT's model, with the first A and B of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        first = inject(load_pretrained("smollm2"), "all-linear", RANK, ALPHA, seed=SEED)
        save_adapter(first, Path(folder) / "first", task_type="CAUSAL_LM")
        del first
        base = AutoModelForCausalLM.from_pretrained(smollm2.folder())
        return PeftModel.from_pretrained(base, Path(folder) / "first", is_trainable=True)


def settings(kind, folder: str, steps: int, part: int = BATCH, **options):
    return kind(folder, max_steps=steps, per_device_train_batch_size=part,
                gradient_accumulation_steps=BATCH // part, learning_rate=RATE,
                lr_scheduler_type="constant", train_sampling_strategy="sequential",
                logging_steps=1, save_strategy="no", report_to="none",
                use_cpu=DEVICE == "cpu", seed=SEED, disable_tqdm=True, **options)


def trainer(rows: Rows, order: list[int], steps: int, part: int = BATCH):
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    # In transformers' own form: one row of tokens, labels for the same positions.
    whole = [torch.cat([rows.inputs[i], rows.labels[i][-1:]]).tolist() for i in order]
    labels = [[-100] + rows.labels[i].tolist() for i in order]
    examples = [{"input_ids": x, "labels": y, "attention_mask": [1] * len(x)}
                for x, y in zip(whole, labels)]
    tokenizer = load_pretrained("smollm2").tokenizer
    it = Trainer(theirs(), settings(TrainingArguments, tempfile.mkdtemp(), steps, part),
                 train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer))
    return it.model, lambda: _losses(it)


def sft(rows: Rows, order: list[int], steps: int):
    """Tokens go in as they are: nothing is left to prepare."""
    import pyarrow
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    examples = Dataset(pyarrow.Table.from_pylist([
        {"input_ids": torch.cat([rows.inputs[i], rows.labels[i][-1:]]).tolist(),
         "labels": [-100] + rows.labels[i].tolist()} for i in order]),
        fingerprint="calls")                     # else it is hashed by pickling, which may fail
    it = SFTTrainer(theirs(), settings(SFTConfig, tempfile.mkdtemp(), steps, bf16=False,
                                       gradient_checkpointing=False,
                                       dataset_kwargs={"skip_prepare_dataset": True}),
                    train_dataset=examples,
                    processing_class=load_pretrained("smollm2").tokenizer)
    return it.model, lambda: _losses(it)


def _losses(it):
    it.train()
    return [entry["loss"] for entry in it.state.log_history if "loss" in entry]


METHODS = {"lora_lib": ours, "lora_lib, 2 rows at a time": partial(ours, part=PART),
           "PEFT, Trainer": trainer, "PEFT, Trainer, 2 rows at a time": partial(trainer, part=PART),
           "PEFT, SFTTrainer": sft}


def one(method: str, steps: int) -> dict:
    """One run in this process: seconds, bytes, losses."""
    rows, order = data(steps)
    model, run = METHODS[method](rows, order, steps)
    for p in model.parameters():                 # read from the file now, not while it is measured
        p.sum()
    torch.mm(*torch.ones(2, 8, 8, device=DEVICE))     # the GPU's libraries are loaded now as well
    held = _held()
    start = time.perf_counter()
    losses = run()
    _held()                                      # waits for the GPU
    seconds = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"seconds": seconds, "peak": peak, "above": peak - held, "losses": losses}


def _held():
    """The bytes that this process holds now, or its tensors on the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=list(METHODS), help="one method")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--child", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(one(args.child, args.steps)))
        return
    about = machine() | {name: version(name) for name in ("transformers", "trl")
                         if find_spec(name)} | shares(args.steps)
    slug = re.sub("[^a-z0-9]+", "-", f"{about['hardware']} {about['capability']}".lower()).strip("-")
    out = args.out or RESULTS / f"runs-{about['date']}-{slug}"
    out.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    methods, gone = args.only or list(METHODS), set()
    for i in tqdm(range(args.rounds), desc="round"):
        for method in methods[i % len(methods):] + methods[:i % len(methods)]:
            command = [sys.executable, "-m", "benchmarks.runs", "--child", method,
                       "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if "ModuleNotFoundError: No module named" in done.stderr:
                gone.add(method)
                continue
            if done.returncode:
                raise RuntimeError(f"{method} failed:\n{done.stderr[-2000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            found += [{"method": method, "round": i, "step": step, "loss": loss,
                       **{key: result[key] for key in ("seconds", "peak", "above")}}
                      for step, loss in enumerate(result["losses"])]
            write(out / "runs.csv", found)
    with atomic(out / "about.json") as file:
        file.write_text(json.dumps(about | {"absent": sorted(gone)}, indent=1) + "\n")
    for method in methods:
        if taken := [row["seconds"] for row in found if row["method"] == method]:
            print(f"{method:20} {np.median(taken):6.1f} s")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
