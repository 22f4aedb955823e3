"""tune: a data file in, an adapter out; stopped and given again, it goes on exactly."""

import hashlib
import json
import math
import platform
from pathlib import Path

import torch
import transformers

import lora_lib
from lora_lib.command.base import device_of, full_name, load_base, naming
from lora_lib.command.findings import check_room, encoded, rows_said, told
from lora_lib.command.folder import CHECKPOINT, RUNNING, finished, opened, steps_done, write_record
from lora_lib.torch import (check, fine_tune, inject, lora_modules, lora_parameters, mean_loss,
                            save_adapter, warmup_cosine)
from lora_lib.tuning.data import conversation, encode
from lora_lib.tuning.evaluation import replies
from lora_lib.tuning.examples import read_examples, split_examples

MANY = 0.1           # a share of rows cut off or left out that spoils a run
NO_ROOM = ("cut off", "left out")
POINTS = 4           # held-out losses on the way of a run of at least POINTS * 10 steps


def tune(options) -> int:
    """Train as the options say; 1 if the data or the model has findings, and no --force."""
    folder, examples = Path(options.out), read_examples(options.data)
    apart = read_examples(options.held_out) if isinstance(options.held_out, str) else []
    settings = _settings(options, examples, apart)
    record, state = opened(folder, settings, options.force)
    if state == "finished":
        print(f"{folder} holds this very run, finished: held-out loss "
              f"{_path(record)}. --force trains again.")
        return 0
    model = load_base(settings["model"], options.device)
    every = encoded(model.tokenizer, examples, options.data, options.length)
    print(f"{Path(options.data).name}: {rows_said(every)}")
    check_room(model, every)
    train, held = _split([e for i, e in enumerate(examples) if i not in every.dropped], apart,
                         options)
    rows = encode(model.tokenizer, train, length=options.length)
    file = options.held_out if apart else options.data
    held_rows = encoded(model.tokenizer, held, file, options.length) if held else None
    if options.batch > len(rows):
        raise ValueError(f"--batch {options.batch} is more than the {len(rows)} rows to train on; "
                         f"give --batch {len(rows)}, or more data")
    steps = options.steps or math.ceil(settings["epochs"] * len(rows) / options.batch)
    with naming("--targets and --rank"):
        inject(model, options.targets, options.rank, options.alpha, options.dropout,
               seed=options.seed)
    if options.checkpointing:
        with naming("--checkpointing"):
            _checkpointing(model)
    _say_sizes(model, steps, len(rows), len(held), settings)
    few = len(every.cut) + len(every.dropped) < MANY * len(examples)
    if told(check(model, stage="start", data=every, allow=NO_ROOM if few else ())) \
            and not options.force:
        print("Nothing was trained. Mend the data, or give --force to go on all the same.")
        return 1
    if state == "new":
        (folder / CHECKPOINT).unlink(missing_ok=True)            # another run's, under --force
        record |= _before(model, held, options) | {
            "file": Path(options.data).name,
            "rows": {"training": len(train), "held out": len(held)},
            "system": _system(train), "versions": _versions()}
    _train(model, rows, held_rows, steps, folder, record, settings, options)
    _after(model, held, record, options)
    save_adapter(model, folder, base_model_name_or_path=settings["model"], task_type="CAUSAL_LM")
    finished(folder, record)
    print(f"Saved in {folder}. Ask it: python -m lora_lib chat {folder}")
    return 0


def _checkpointing(model):
    """Switch transformers' checkpointing on, under the name that it has in this release."""
    old = "gradient_checkpointing_enable"
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
    enable({"use_reentrant": False})


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere it is slower than float32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def _settings(options, examples, apart):
    """All that decides what comes out: the same settings are the same run."""
    names = ("rank", "alpha", "targets", "dropout", "lr", "epochs", "steps", "batch", "length",
             "held_out", "seed", "samples", "micro_batch", "checkpointing")
    settings = {"model": full_name(options.model)}
    settings |= {name: getattr(options, name) for name in names}
    settings["epochs"] = options.epochs or (None if options.steps else 3)
    settings["device"] = device_of(options.device)
    settings["precision"] = options.precision
    if options.precision == "auto" and settings["device"] == "cpu":
        settings["precision"] = "bfloat16" if cpu_has_bfloat16() else "float32"
    said = json.dumps([examples, apart], ensure_ascii=True)
    settings["data"] = hashlib.sha256(said.encode()).hexdigest()[:16]
    return settings


def _split(examples, apart, options):
    """Examples to train on, and examples held out."""
    if apart or not options.held_out:
        return examples, apart
    with naming(f"--held-out {options.held_out}"):
        return split_examples(examples, options.held_out, options.seed)


def _say_sizes(model, steps, rows, held, settings):
    print(f"{rows:,} rows to train on, {held:,} held out")
    trained = sum(p.numel() for p in lora_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    print(f"rank {settings['rank']} on {len(lora_modules(model))} layers: {trained:,} of {total:,} "
          f"numbers are trained ({trained / total:.2%}); the adapter's file takes "
          f"{4 * trained / 1e6:.2f} MB")
    print(f"{steps:,} steps of {settings['batch']} rows ({steps * settings['batch'] / rows:.1f} "
          f"epochs), lr {settings['lr']}, {settings['precision']} on {settings['device']}")


def _before(model, held, options):
    """What the base answers, and room for losses; B is zero, so the model is the base still."""
    asked = [conversation(e) for e in held if not isinstance(e, str)][:options.samples]
    said = replies(model, model.tokenizer, [chat[:-1] for chat in asked])
    return {"held-out loss": {}, "samples": [
        {"messages": chat[:-1], "wanted": chat[-1]["content"], "before": text}
        for chat, text in zip(asked, said)]}


def _measure(model, held, step, record, options):
    """The held-out loss after `step` steps, into the record."""
    losses = record["held-out loss"]
    if held and str(step) not in losses:
        losses[str(step)] = mean_loss(model, model.tokenizer, held, options.batch)
        print(f"step {step}: held-out loss {losses[str(step)]:.4f}", flush=True)


def _train(model, rows, held, steps, folder, record, settings, options):
    """`fine_tune` in parts, each of which goes on from the checkpoint: between them we measure."""
    parts = POINTS if held and steps >= 10 * POINTS else 1
    done, checkpoint = steps_done(folder), folder / CHECKPOINT
    if not done:
        _measure(model, held, 0, record, options)
        write_record(folder / RUNNING, record)
    else:
        print(f"Going on from step {done} of {steps}")
    precision = "model" if settings["precision"] == "float32" else settings["precision"]
    for end in (steps * (i + 1) // parts for i in range(parts)):
        if end < done:
            continue
        try:
            record["losses"] = fine_tune(
                model, rows, steps=end, batch_size=options.batch, lr=options.lr,
                schedule=warmup_cosine(steps, warmup=steps // 20), seed=options.seed,
                precision=precision, micro_batch_size=options.micro_batch, checkpoint=checkpoint,
                checkpoint_every=options.checkpoint_every)
        except ValueError as error:
            raise ValueError(f"{error}; delete {checkpoint} to start over") from error
        _measure(model, held, end, record, options)
        write_record(folder / RUNNING, record)


def _after(model, held, record, options):
    """Answers of the tuned model beside the base's."""
    losses = record["held-out loss"]
    if losses and list(losses.values())[-1] > 1.02 * min(losses.values()):
        print(f"The held-out loss was lower before ({_path(record)}): the adapter learns the rows "
              "by heart. Fewer epochs, or more data, would do better.")
    samples = record["samples"]
    if samples:
        said = replies(model, model.tokenizer, [sample["messages"] for sample in samples])
        for sample, text in zip(samples, said):
            sample["after"] = text
            print(f"\n  prompt: {sample['messages'][-1]['content']}")
            for name in ("wanted", "before", "after"):
                print(f"  {name}: " + sample[name].replace("\n", "\n    "))
        print()


def _path(record):
    """The held-out losses in their order."""
    losses = record["held-out loss"].values()
    return ", ".join(f"{loss:.4f}" for loss in losses) or "not measured"


def _system(examples):
    """The system message that all examples have, for `chat`; None if there is no such."""
    first = {e[0]["content"] if isinstance(e, list) and e[0]["role"] == "system" else None
             for e in examples}
    return first.pop() if len(first) == 1 else None


def _versions():
    return {"python": platform.python_version(), "lora_lib": lora_lib.__version__,
            "torch": torch.__version__, "transformers": transformers.__version__}
