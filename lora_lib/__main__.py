"""`python -m lora_lib`: the commands of `lora_lib.command`."""

import sys

from lora_lib.command import main

if __name__ == "__main__":
    # A log shows a line when it is said.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    raise SystemExit(main())
