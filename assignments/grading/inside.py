"""The learner's side: run as a process of its own, inside the sandbox.

It reads requests from its standard input and answers on its standard output; the learner's cells
get neither. A request is (what, arguments): ("run", source), ("fetch", names), or
("call", number, arguments, named arguments).
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path

LONGEST = 20_000    # characters of a cell's output that are kept


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)

    from grading import wire
    from IPython.core.interactiveshell import InteractiveShell
    InteractiveShell.history_load_length = 0
    shell = InteractiveShell.instance(colors="nocolor", xmode="Minimal", history_manager=None)
    shell.displayhook.write_output_prompt = lambda: None
    functions = []

    def keep(function):
        functions.append(function)
        return len(functions) - 1

    def folder(files):
        path = Path(tempfile.mkdtemp())
        wire.write_folder(path, files)
        return path

    while size := requests.read(8):
        what, *arguments = wire.unpack(requests.read(int.from_bytes(size, "big")), folder=folder)
        try:
            if what == "run":
                answer = run(shell, *arguments)
            elif what == "fetch":
                answer = fetch(shell.user_ns, *arguments)
            else:
                answer = call(functions, *arguments)
            reply = wire.pack(answer, keep)
        except TypeError as error:
            reply = wire.pack({"error": "TypeError", "says": f"the tests cannot take {error}"})
        except MemoryError:
            reply = wire.pack({"error": "MemoryError", "says": "no memory left for the answer"})
        replies.write(len(reply).to_bytes(8, "big") + reply)
        replies.flush()


def run(shell, source):
    """Run one cell; its text, and the error that ended it, if any."""
    from IPython.utils.capture import capture_output
    with capture_output() as captured:
        done = shell.run_cell(source, store_history=False)
    error = done.error_before_exec or done.error_in_exec
    text = captured.stdout + captured.stderr
    for output in captured.outputs:
        text += output.data.get("text/plain", "") + "\n"
    if len(text) > LONGEST:
        text = text[:LONGEST] + f"\n... and {len(text) - LONGEST} characters more"
    return {"text": text, **({} if error is None else named(error))}


def fetch(namespace, names):
    """Those of the names that are defined and that a message can hold."""
    from grading import wire
    found = {}
    for name in names:
        if name in namespace:
            try:
                wire.pack(namespace[name], lambda function: 0)
            except TypeError:
                continue
            found[name] = namespace[name]
    return found


def call(functions, number, arguments, named_arguments):
    """The function's result, and its arguments as they are after the call."""
    try:
        result = functions[number](*arguments, **named_arguments)
    except BaseException as error:                   # SystemExit and KeyboardInterrupt too
        traceback.clear_frames(error.__traceback__)
        return named(error)
    return {"result": result, "after": (arguments, named_arguments)}


def named(error):
    return {"error": type(error).__name__, "says": str(error)[:2000]}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
