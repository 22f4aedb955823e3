"""The options of every command, and what --help teaches."""

import argparse
import math
import re

START = """\
From your data to an adapter (LoRA) that answers: here, in PEFT, in llama.cpp.

  python -m lora_lib check data.jsonl                         is the data as it should be?
  python -m lora_lib tune data.jsonl --out adapter            train an adapter on it
  python -m lora_lib chat adapter                             ask the model with the adapter
  python -m lora_lib merge adapter --out merged               a plain transformers model
  python -m lora_lib export adapter --out adapter.gguf        for llama.cpp
"""
BEGIN = """\
where to begin: write some fifty rows like
  {"prompt": "Wake me up at 7 am", "completion": "set_alarm(time=07:00)"}
into data.jsonl, one row a line, and give the commands above from top to bottom. Each has a --help
of its own: python -m lora_lib tune --help. The course explains the rest: chapter 5 "Training",
chapter 9 "Mistakes", chapter 10 "A real model"."""

TUNE = """\
Train an adapter on your examples and save it in PEFT's format.

  python -m lora_lib tune data.jsonl --out adapter --model smollm2 --epochs 3

Before the first step it says how much there is to learn, and stops if the data would spoil the
run. A part of the data is held out: the loss there, before and after, says what was learned and
not only memorized. A run that was stopped, even by a kill, goes on when the same command is given
again: the result is the same, bit for bit on a CPU with as many threads."""
DATA = """\
the data: .jsonl, .json, .csv or .tsv in UTF-8. A row is one of
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "...", "output": "..."}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"text": "..."}                    a plain text, all of it learned
Only answers are learned, with the mark that ends them, in the model's own chat template.

where to begin: leave all options as they are. If the held-out loss hardly falls, try --lr two or
three times as large; if it rises again before the end, fewer --epochs, or more data. Chapter 6
"Targets" and chapter 7 "Hyperparameters" measure what --targets, --rank, --alpha and --lr do.

in the --out folder: adapter_config.json and adapter_model.safetensors, the adapter; tune.json, the
settings, losses, sample answers and versions. While the run lasts: checkpoint.safetensors."""

CHAT = """\
Ask the model with the adapter. Without a prompt it is a conversation; a prompt as an argument, or
lines on standard input, are answered one by one.

  python -m lora_lib chat adapter
  python -m lora_lib chat adapter "Wake me up at 7 am" --strength 0.5
  python -m lora_lib chat adapter < prompts.txt"""
CHAT_END = """\
where to begin: ask what you trained, in new words, then with --strength 0: that is the base.
Chapter 10 "A real model" moves the strength from 0 to 1.5. A folder that `merge` wrote, or the name
of a model, can be asked in the same way."""

MERGE = """\
Add the adapter to the base's weights: a plain transformers model with its tokenizer, which costs
nothing extra to run.

  python -m lora_lib merge adapter --out merged"""
MERGE_END = """\
then: AutoModelForCausalLM.from_pretrained("merged"). The adapter cannot be taken out of it again,
so keep its folder. Chapter 4 "Merging" says why the outputs are the same, and what 16 bits
round."""

CHECK = """\
Look for the mistakes that people make, in data or in a trained adapter. Each finding is one line;
the exit code is 1 if there is one, and 0 if not.

  python -m lora_lib check data.jsonl --model smollm2
  python -m lora_lib check adapter"""
CHECK_END = """\
where to begin: check the data before you pay for a run. Chapter 9 "Mistakes" shows what such
mistakes do to a model."""

EXPORT = """\
Write a GGUF file for llama.cpp: the adapter alone, or with --merged the whole model.

  python -m lora_lib export adapter --out adapter.gguf
  python -m lora_lib export adapter --out model.gguf --merged"""
EXPORT_END = """\
then: llama-cli -m base.gguf --lora adapter.gguf, or llama-cli -m model.gguf. The adapter was
trained on the base in floats; beside a base of four bits its answers may differ (chapter 12 "A
quantized base"), and a merged file in float32 is closest."""


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, and no guessing of shortened ones."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help says more\n")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="python -m lora_lib", description=START, epilog=BEGIN)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name, help, description, epilog):
        return commands.add_parser(name, help=help, description=description, epilog=epilog)

    _tune(command("tune", "train an adapter on your data", TUNE, DATA))
    chat = command("chat", "ask a model with its adapter", CHAT, CHAT_END)
    chat.add_argument("adapter", help="the adapter's folder, or a model")
    chat.add_argument("prompt", nargs="*", help="answer these and leave")
    chat.add_argument("--system", metavar="TEXT", help="the system message (default: the one that "
                      "all training rows had, if there is one)")
    chat.add_argument("--max-tokens", type=_whole(1), default=200, metavar="N",
                      help="the longest answer (default: 200)")
    _base(chat)
    _strength(chat)
    merge = command("merge", "adapter and base as one plain model", MERGE, MERGE_END)
    merge.add_argument("adapter", help="the adapter's folder")
    _out(merge, "the folder to write")
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                       help="how the weights are stored (default: float32; the others take half)")
    _base(merge)
    _strength(merge)
    check = command("check", "look for mistakes in data or an adapter", CHECK, CHECK_END)
    check.add_argument("target", help="a data file, or an adapter's folder")
    check.add_argument("--length", type=_whole(2), default=1024, metavar="N",
                       help="the most tokens of a row (default: 1024)")
    _base(check)
    export = command("export", "a GGUF file for llama.cpp", EXPORT, EXPORT_END)
    export.add_argument("adapter", help="the adapter's folder")
    _out(export, "the .gguf file to write")
    export.add_argument("--merged", action="store_true", help="the whole model, not the adapter")
    export.add_argument("--dtype", choices=("float16", "float32"), default="float16",
                        help="how the numbers are stored (default: float16)")
    _base(export)
    _strength(export)
    return top


def _tune(tune):
    tune.add_argument("data", help="your examples, see below")
    _out(tune, "the folder of the adapter")
    tune.add_argument("--model", default="smollm2", metavar="NAME",
                      help="the base: smollm2 (the default), a folder, a .gguf file, or owner/name "
                      "on the hub")
    adapter = tune.add_argument_group("the adapter")
    adapter.add_argument("--rank", type=_whole(1), default=8, metavar="R",
                         help="numbers that an update may move in; more for more to learn "
                         "(default: 8)")
    adapter.add_argument("--alpha", type=_real(0), default=16.0, metavar="A",
                         help="the update is scaled by alpha / rank (default: 16)")
    adapter.add_argument("--targets", type=_targets, default="all-linear", metavar="NAMES",
                         help="layers that get an adapter, such as q_proj,v_proj (default: "
                         "all-linear)")
    adapter.add_argument("--dropout", type=_real(0, 1, ends="left"), default=0.0, metavar="P",
                         help="share of the adapter's input set to zero in training (default: 0)")
    training = tune.add_argument_group("the training")
    training.add_argument("--lr", type=_real(0), default=5e-4, metavar="LR",
                          help="the learning rate, after a warmup; it falls along a cosine "
                          "(default: 5e-4)")
    long = training.add_mutually_exclusive_group()
    long.add_argument("--epochs", type=_real(0), metavar="E",
                      help="how often every row is seen (default: 3)")
    long.add_argument("--steps", type=_whole(1), metavar="N", help="or the number of steps")
    training.add_argument("--batch", type=_whole(1), default=8, metavar="N",
                          help="rows in a step (default: 8)")
    training.add_argument("--micro-batch", type=_whole(1), metavar="N",
                          help="so many of them go through the model at a time; fewer take less "
                          "memory, the step is the same (default: all)")
    training.add_argument("--checkpointing", action="store_true",
                          help="keep each block's input alone and compute the rest again: still "
                          "less memory, more time")
    training.add_argument("--length", type=_whole(2), default=1024, metavar="N",
                          help="the most tokens of a row; what is longer is cut off and counted "
                          "(default: 1024)")
    training.add_argument("--held-out", type=_held_out, default=0.1, metavar="PART",
                          help="a share of the data, a number of rows, or a file; 0 for none "
                          "(default: 0.1)")
    training.add_argument("--seed", type=_whole(0), default=0, metavar="N",
                          help="draws the split, the adapter's start, the order (default: 0)")
    training.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"),
                          default="auto", help="of the products (default: auto, bfloat16 where the "
                          "processor has it, float16 on a GPU that has not)")
    _device(training)
    training.add_argument("--checkpoint-every", type=_whole(1), default=20, metavar="N",
                          help="steps that a kill can cost (default: 20)")
    tune.add_argument("--samples", type=_whole(0), default=3, metavar="N",
                      help="held-out prompts to answer before and after (default: 3)")


def _out(command, help):
    command.add_argument("--out", required=True, metavar="PATH", help=help)
    command.add_argument("--force", action="store_true",
                         help="go on in spite of findings, and write over what is at --out"
                         if command.prog.endswith("tune") else "write over what is at --out")


def _base(command):
    command.add_argument("--model", metavar="NAME",
                         help="the base (default: the one that the adapter names; smollm2 for "
                         "data)" if command.prog.endswith("check") else
                         "the base (default: the one that the adapter names)")
    _device(command)


def _device(command):
    command.add_argument("--device", default="auto", metavar="NAME",
                         help="cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)")


def _strength(command):
    command.add_argument("--strength", type=_real(0, 10, ends="both"), default=1.0, metavar="S",
                         help="a factor on the adapter: 0 is the base, 1 as trained, up to about "
                         "1.5 (default: 1)")


def _whole(least):
    def read(text):
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, "
                                             f"got {text!r}")
        return int(text)
    return read


def _real(least, most=math.inf, ends="none"):
    """A finite number between the two, of which those at the `ends` count."""
    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = least < value < most or (value == least and ends != "none") or (
            value == most and ends == "both")
        if not inside:
            limits = f"greater than {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value
    return read


def _held_out(text):
    if re.search(r"\.\w*[a-z]\w*$", text):
        return text                                             # a file
    share = re.fullmatch(r"0?\.\d+", text)
    if not (share or re.fullmatch(r"\d+", text)):
        raise argparse.ArgumentTypeError("expected a share below 1, a number of rows, or a file, "
                                         f"got {text!r}")
    return (float(text) or 0) if share else int(text)


def _targets(text):
    names = [name.strip() for name in text.split(",")]
    if len(names) > 1 and all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    return text
