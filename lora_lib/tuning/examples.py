"""A user's own data as examples: JSON Lines, JSON, CSV, or rows in memory, in the usual columns."""

import codecs
import csv
import io
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lora_lib.tuning.data import Example, Message, conversation

ASKED = ("prompt", "instruction", "question")
BELOW = ("input", "context")                           # goes below what is asked
ANSWERS = ("completion", "output", "response", "answer")
SYSTEM = ("system", "system_prompt")
CHATS = ("messages", "conversations")
UNDERSTOOD = ("messages; conversations; prompt and completion; instruction, input and output; "
              "instruction, context and response; question and answer; text")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}


def read_examples(source: str | os.PathLike | Iterable) -> list[Example]:
    """Examples for `encode`, each a text, a pair (prompt, answer), or a conversation.

    `source` is a .jsonl, .json, .csv or .tsv file in UTF-8, or an iterable of rows. A row is a dict
    with columns such as those in `UNDERSTOOD`, a pair, a list of messages, or a text; rows may
    differ. What stands in "input" or "context" goes below the instruction, a "system" column in
    front. Messages have "role" and "content", or ShareGPT's "from" and "value"; after an optional
    system message, user and assistant take turns, and the assistant has the last word. Other
    columns are left out.

    Raises ValueError for what cannot be read so. It names the file, the first bad row by its line,
    the fix, and how many rows are bad. Raises FileNotFoundError if there is no such file.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        rows, name = _file_rows(path), path.name
    elif isinstance(source, Mapping) or hasattr(source, "itertuples"):
        raise ValueError("expected a list of rows, got a "
                         f"{type(source).__name__}; pass one of its parts, or for a pandas frame "
                         "frame.to_dict('records')")
    else:
        rows, name = ((f"index {i}", row) for i, row in enumerate(source)), "the list"
    examples, faults = [], []
    try:
        for where, row in rows:
            try:
                examples.append(_example(row))
            except ValueError as error:
                faults.append(f"{name}, {where}: {error}")
    except _Unreadable as error:
        faults.append(f"{name}, line {error.line}: {error}")
    if faults:
        more = f" (the first of {len(faults)} bad rows)" if len(faults) > 1 else ""
        raise ValueError(faults[0] + more)
    if not examples:
        raise ValueError(f"{name} holds no rows; expected at least one")
    return examples


def split_examples(examples: Sequence[Example], held_out: float | int = 0.1, seed: int = 0
                   ) -> tuple[list[Example], list[Example]]:
    """(train, held out), with no prompt in both: what was learned by heart is no test.

    `held_out` is a share below 1, or a number of examples; where prompts repeat it may be a few
    less. Case and spacing do not tell prompts apart. Both parts keep the order of `examples`.
    Raises ValueError if one of them would be empty.
    """
    n = len(examples)
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * n))
    if not 0 < count < n:
        raise ValueError(f"held_out must leave some of the {n} examples on both sides, "
                         f"got {held_out}")
    same = {}
    for i, example in enumerate(examples):
        same.setdefault(_asked(example), []).append(i)
    groups, chosen = list(same.values()), set()
    random.Random(seed).shuffle(groups)
    for group in groups:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    if not chosen:
        raise ValueError(f"no prompt stands in {count} or fewer of the {n} examples, so none can "
                         "be held out whole")
    return ([e for i, e in enumerate(examples) if i not in chosen],
            [e for i, e in enumerate(examples) if i in chosen])


def _asked(example):
    text = example if isinstance(example, str) else next(
        m["content"] for m in conversation(example) if m["role"] == "user")
    return " ".join(text.split()).casefold()


# --- files to rows, each with the line where it begins ------------------------------------------

def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    readers = {".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _table, ".tsv": _table}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path.name}: expected a file that ends in {', '.join(readers)}")
    raw = path.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}: a byte that is not UTF-8; save the file as "
                         "UTF-8") from error
    for line, row in reader(text.replace("\r\n", "\n").replace("\r", "\n")):
        yield f"line {line}", row


class _Unreadable(Exception):
    """The rest of a file cannot be read from this line on."""

    def __init__(self, line, message):
        super().__init__(message)
        self.line = line


def _lines(text):
    """JSON Lines. Not str.splitlines, which also breaks at characters that a string may hold."""
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except json.JSONDecodeError as error:
                raise _Unreadable(line, f"this line is not JSON ({error.msg}, column "
                                  f"{error.colno}); write one whole object a line, or one list "
                                  "of all rows in a .json file") from error


def _json(text):
    """One list of rows; JSON Lines under this name will do too."""
    if not text.lstrip().startswith("["):
        yield from _lines(text)
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise _Unreadable(error.lineno, f"this is not JSON ({error.msg}, column {error.colno}); "
                          "the file must be one list of rows") from error
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    end, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while text[start := between.match(text, end).end()] != "]":
        line += text.count("\n", end, start)
        row, end = decode(text, start)
        yield line, row
        line += text.count("\n", start, end)


def _table(text):
    """CSV, by comma, semicolon or tab, whichever the first line has most of."""
    header = text.partition("\n")[0]
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True,
                        delimiter=max(",;\t", key=header.count))
    names, start = None, 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cells):
                continue
            if names is None:
                names = cells
            elif len(cells) != len(names):
                raise _Unreadable(line, f"{len(cells)} cells, but the first line names "
                                  f"{len(names)} columns; put quotes around text with commas, "
                                  "quotes or line breaks")
            else:
                yield line, dict(zip(names, cells))
    except csv.Error as error:
        raise _Unreadable(start, f"this is not CSV ({error}); put quotes around text with commas "
                          "or line breaks, and write a quote within it twice") from error


# --- one row to an example ----------------------------------------------------------------------

def _example(row) -> Example:
    if isinstance(row, str):
        return _text(row, "the text")
    if isinstance(row, Mapping):
        return _columns(row)
    if isinstance(row, (list, tuple)):
        if len(row) == 2 and all(isinstance(part, str) for part in row):
            return _text(row[0], "the prompt"), _text(row[1], "the answer")
        if row and all(isinstance(part, Mapping) for part in row):
            return _messages(row)
    raise ValueError("expected an object with columns, a pair of texts, a list of messages, or a "
                     f"text, got {_short(row)}")


def _columns(row):
    row = {str(name).strip().lower(): value for name, value in row.items()
           if value is not None and value == value}             # pandas writes NaN for nothing
    system = _one(row, SYSTEM)
    front = [] if not row.get(system) else [
        {"role": "system", "content": _text(row[system], f'"{system}"')}]
    if chat := _one(row, CHATS):
        return _messages([*front, *_list(row[chat], chat)])
    asked, below, answer = (_one(row, names) for names in (ASKED, BELOW, ANSWERS))
    if not asked and answer == "output":                        # "input" and "output" alone
        asked, below = below, None
    if asked and answer:
        if isinstance(row[asked], list):                        # as TRL has it: two lists
            return _messages([*front, *row[asked], *_list(row[answer], answer)])
        prompt = _text(row[asked], f'"{asked}"')
        if below and row[below]:
            prompt += "\n\n" + _text(row[below], f'"{below}"')
        pair = prompt, _text(row[answer], f'"{answer}"')
        return front + conversation(pair) if front else pair
    if "text" in row and not front:
        return _text(row["text"], '"text"')
    raise ValueError(f"no format has the columns {', '.join(map(_short, row)) or '(none)'}; rename "
                     f"them to one of: {UNDERSTOOD}")


def _one(row, names):
    """The one of `names` that the row has."""
    present = [name for name in names if name in row]
    if len(present) > 1:
        raise ValueError(f'both "{present[0]}" and "{present[1]}" are there; keep one of them')
    return present[0] if present else None


def _list(value, name):
    if not isinstance(value, (list, tuple)):
        raise ValueError(f'"{name}" must be a list of messages, got {_short(value)}; a table '
                         "cannot hold one, JSON Lines can")
    return value


def _messages(raw) -> list[Message]:
    messages = []
    for i, message in enumerate(raw, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i} must be an object with role and content, got "
                             f"{_short(message)}")
        said = message.get("role", message.get("from"))
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise ValueError(f"message {i} has the role {_short(said)}; expected one of "
                             f"{', '.join(ROLES)}")
        content = message.get("content", message.get("value"))
        if role != "system" or content != "":                   # empty: without a system prompt
            content = _text(content, f"message {i} ({role})")
        due = "user" if not messages or messages[-1]["role"] != "user" else "assistant"
        if role != due and (i > 1 or role != "system"):
            raise ValueError(f"message {i} is the {role}'s, expected the {due}'s; user and "
                             "assistant must take turns, behind at most one system message")
        messages.append({"role": role, "content": content})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"the last of the {len(messages)} messages must be the assistant's, for "
                         "there is no answer behind it; take it out, or add the answer")
    return messages


def _text(value, name):
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {_short(value)}; write one text in quotes")
    if not value.strip():
        raise ValueError(f"{name} is empty; fill it in, or take the row out")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} holds half of a character (a lone surrogate, as where an emoji "
                         "was cut in two); take it out")
    return value


def _short(value):
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 40 else text[:37] + "..."
