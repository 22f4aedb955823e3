"""From your data to an adapter on the command line: tune, chat, merge, check, export.

    python -m lora_lib --help

Torch is imported by the commands themselves, so that --help answers at once.
"""

import os
import shlex
import sys
from importlib import import_module

from lora_lib.command.options import parser

# Where each command lives; the function has its name.
MODULES = {"tune": "tune", "chat": "chat", "merge": "ship", "export": "ship", "check": "findings"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code.

    0 is well, 1 is a finding, 2 is bad input, said in one line on stderr, 130 is Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    try:
        module = import_module(f"lora_lib.command.{MODULES[options.command]}")
        return getattr(module, options.command)(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if options.command == "tune":
            from lora_lib.command.folder import how_to_go_on
            again = shlex.join(["python", "-m", "lora_lib", *argv])
            print(how_to_go_on(options.out, again), file=sys.stderr)
        return 130
    except BrokenPipeError:                      # whoever read our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        return _refuse(options, error)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise                                # ours, not the user's: with its traceback
        return _refuse(options, "there is not enough memory; try a smaller --batch or --length, "
                       f"or a smaller model ({type(error).__name__})")


def _refuse(options, error):
    if isinstance(error, OSError) and error.filename:
        error = f"{error.strerror}: {error.filename}"         # without the number
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        text += '; pip install "lora-lib[peft]" brings what the commands need'
    print(f"lora_lib {options.command}: {text if len(text) <= 500 else text[:497] + '...'}",
          file=sys.stderr)
    return 2
