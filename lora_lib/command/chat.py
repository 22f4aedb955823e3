"""chat: ask a model with its adapter, at any strength."""

import sys
from pathlib import Path

from lora_lib.command.base import load_adapted, load_base
from lora_lib.command.folder import DONE, RUNNING, read_record
from lora_lib.torch.peft_format import CONFIG
from lora_lib.tuning.evaluation import reply


def chat(options) -> int:
    """Answer the prompts in the arguments, else those on standard input, else talk."""
    folder = Path(options.adapter)
    if (folder / CONFIG).exists() or (folder / RUNNING).exists():
        model = load_adapted(folder, options.model, options.device, options.strength)
    elif options.model or options.strength != 1:
        raise ValueError(f"{folder} holds no adapter ({CONFIG}), so --model and --strength say "
                         "nothing; leave them out to ask it as a model")
    else:
        model = load_base(options.adapter, options.device, "no adapter is at")
    system = options.system
    if system is None and (folder / DONE).exists():
        system = read_record(folder / DONE).get("system")
    start = [{"role": "system", "content": system}] if system else []

    def answer(messages):
        return reply(model, model.tokenizer, messages, max_new_tokens=options.max_tokens)

    if not options.prompt and sys.stdin.isatty():
        _talk(answer, start)
        return 0
    for prompt in options.prompt or (line.strip() for line in sys.stdin):
        if prompt:
            print(answer([*start, {"role": "user", "content": prompt}]), flush=True)
    return 0


def _talk(answer, start):
    """A conversation; every answer sees what was said before."""
    import readline  # noqa: F401  (input() can then edit a line)
    print("/new starts again, Ctrl-D leaves.")
    messages = list(start)
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()
            return
        if prompt == "/new":
            messages = list(start)
        elif prompt:
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": answer(messages)})
            print(messages[-1]["content"])
