"""check: the mistakes that can be seen in data, or in a trained adapter."""

import re
from dataclasses import replace
from pathlib import Path

from lora_lib.command.base import base_of, load_base, with_adapter
from lora_lib.torch.check import Finding
from lora_lib.torch.check import check as check_model
from lora_lib.tuning.data import Example, Rows, encode
from lora_lib.tuning.examples import read_examples


def check(options) -> int:
    """Print the findings in a data file or an adapter's folder; 1 if there is one."""
    target = Path(options.target)
    if not target.exists():
        raise FileNotFoundError(f"there is no file or folder {target}")
    found = _in_adapter(target, options) if target.is_dir() else _in_data(target, options)
    if not told(found):
        print(f"{target}: nothing found")
    return 1 if found else 0


def told(found: list[Finding]) -> list[Finding]:
    """Print the findings, one a line; the same list."""
    for finding in found:
        print(numbered(" ".join(str(finding).split())))
    return found


def numbered(text: str) -> str:
    """"example 4", counted from 0, as "row 5", counted from 1 as in an editor."""
    return re.sub(r"\bexample (\d+)\b", lambda match: f"row {int(match[1]) + 1}", text)


def rows_said(rows: Rows) -> str:
    """How much there is to learn, and what had no room."""
    text = str(replace(rows, cut=(), dropped=()))
    for numbers, what in ((rows.cut, "cut off"), (rows.dropped, "left out, no room for an answer")):
        if numbers:
            text += f"; {len(numbers)} {what} (the first is row {numbers[0] + 1})"
    return text


def check_room(model, rows: Rows) -> None:
    """Raise ValueError for rows that are longer than the model can read."""
    most, longest = getattr(model.config, "max_position_embeddings", None), int(rows.lengths.max())
    if most and longest > most:
        raise ValueError(f"the longest row has {longest} tokens, the model reads {most}; "
                         f"give --length {most}")


def encoded(tokenizer, examples: list[Example], file, length: int) -> Rows:
    """`encode`, with the file and its row in front of the message about a bad one."""
    try:
        return encode(tokenizer, examples, length=length)
    except ValueError as error:
        raise ValueError(f"{Path(file).name}, {numbered(str(error))}") from error


def _in_data(file, options):
    model = load_base(options.model or "smollm2", options.device)
    try:
        rows = encoded(model.tokenizer, read_examples(file), file, options.length)
    except ValueError as error:
        return [Finding("not readable", ("the file",), str(error))]
    print(f"{file.name}: {rows_said(rows)}")
    check_room(model, rows)
    return check_model(model, stage="serve", data=rows)


def _in_adapter(folder, options):
    try:
        name = options.model or base_of(folder)
    except ValueError as error:
        return [Finding("not loadable", (str(folder),), str(error))]
    model = load_base(name, options.device)
    try:
        with_adapter(model, folder)
    except (ValueError, TypeError) as error:
        return [Finding("not loadable", (str(folder),), str(error))]
    return check_model(model, stage="serve", allow={"unmerged"})
