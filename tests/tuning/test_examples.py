"""Files as people have them, read; files with a fault, refused by file, line and fix."""

import csv
import json

import pytest

from lora_lib.tuning.data import encode
from lora_lib.tuning.examples import read_examples, split_examples
from tests.tuning.tiny import byte_tokenizer


def said(role, content):
    return {"role": role, "content": content}


CHAT = [said("user", "Hi"), said("assistant", "Hello."), said("user", "Bye"),
        said("assistant", "See you.")]
WITH_SYSTEM = [said("system", "Be brief."), *CHAT]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
             "value": m["content"]} for m in WITH_SYSTEM]
PAIR = ("Why?", "So.")

ROWS = [
    ({"messages": CHAT}, CHAT),
    ({"messages": WITH_SYSTEM, "id": 7}, WITH_SYSTEM),
    ({"messages": CHAT, "system": "Be brief."}, WITH_SYSTEM),
    ({"conversations": SHAREGPT, "id": "x"}, WITH_SYSTEM),
    ({"conversations": SHAREGPT[1:], "system": "Be brief."}, WITH_SYSTEM),
    ({"conversations": SHAREGPT[1:], "system": ""}, CHAT),
    ({"prompt": "Why?", "completion": "So."}, PAIR),
    ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, CHAT[:2]),
    ({"instruction": "Why?", "input": "", "output": "So."}, PAIR),
    ({"instruction": "Why?", "input": "It is.", "output": "So.", "text": "Below is ..."},
     ("Why?\n\nIt is.", "So.")),
    ({"instruction": "Why?", "context": "It is.", "response": "So.", "category": "qa"},
     ("Why?\n\nIt is.", "So.")),
    ({"instruction": "Why?", "input": None, "output": "So."}, PAIR),
    ({"instruction": "Why?", "input": float("nan"), "output": "So."}, PAIR),
    ({"input": "Why?", "output": "So."}, PAIR),
    ({"question": "Why?", "answer": "So."}, PAIR),
    ({"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
     [said("system", "Be brief."), said("user", "Why?"), said("assistant", "So.")]),
    ({" Prompt": "Why?", "Completion ": "So."}, PAIR),
    ({"text": "A tale."}, "A tale."),
    (["Why?", "So."], PAIR), (("Why?", "So."), PAIR), (CHAT, CHAT), ("A tale.", "A tale."),
    ([said("system", ""), *CHAT], [said("system", ""), *CHAT]),
    ({"prompt": " Ünïcode\n", "completion": "\t日本\u2028 😀"}, (" Ünïcode\n", "\t日本\u2028 😀")),
]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    return path


# --- what is read -------------------------------------------------------------------------------

@pytest.mark.parametrize("row, example", ROWS)
def test_a_row_becomes_an_example(row, example):
    assert read_examples([row]) == [example]
    assert encode(byte_tokenizer(), [example]).dropped == ()


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_hold_what_lists_hold(tmp_path, ascii, end, encoding):
    """Mixed formats, blank lines, a byte order mark, line ends of every system."""
    lines = [json.dumps(row, ensure_ascii=ascii) for row, _ in ROWS]
    expected = [example for _, example in ROWS]
    assert read_examples(write(tmp_path / "a.jsonl", (end + end).join(lines), encoding)) == expected
    assert read_examples(write(tmp_path / "a.json", end.join(lines) + end, encoding)) == expected
    whole = json.dumps([row for row, _ in ROWS], ensure_ascii=ascii, indent=1)
    assert read_examples(write(tmp_path / "b.json", whole.replace("\n", end), encoding)) == expected
    assert read_examples(str(tmp_path / "b.json")) == expected


@pytest.mark.parametrize("delimiter, name", [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv"),
                                             ("\t", "A.CSV")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_as_a_spreadsheet_writes_it(tmp_path, delimiter, name, encoding):
    rows = [("Why?", "It is,\nyou; know", 'He said "so".'), ("How?", "", "x" * 200_000)]
    with open(tmp_path / name, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([("instruction", "input", "output"), *rows])
    assert read_examples(tmp_path / name) == [("Why?\n\nIt is,\nyou; know", 'He said "so".'),
                                              ("How?", "x" * 200_000)]


# --- what is refused ----------------------------------------------------------------------------

def chat(*turns):
    return json.dumps({"messages": [said(*turn) for turn in turns]})


GOOD = json.dumps({"prompt": "Why?", "completion": "So."})
FAULTS = {
    "cut.jsonl": (f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}", "cut.jsonl, line 3: this line is not JSON (",
                  "write one whole object a line"),
    "spread.jsonl": (f"[\n{GOOD}\n]", "spread.jsonl, line 1: this line is not JSON (",
                     "one list of all rows in a .json file"),
    "comma.json": (f"[\n{GOOD},\n{GOOD}\n{GOOD}]", "comma.json, line 4: this is not JSON (",
                   "must be one list of rows"),
    "names.jsonl": (f'{GOOD}\n{{"promt": "a", "completion": "b"}}',
                    'names.jsonl, line 2: no format has the columns "promt", "completion"',
                    "rename them to one of: messages; conversations; prompt and completion; "),
    "prefer.jsonl": ('{"prompt": "a", "chosen": "b", "rejected": "c"}',
                     'line 1: no format has the columns "prompt", "chosen", "rejected"', "rename"),
    "two.jsonl": ('{"prompt": "a", "question": "b", "answer": "c"}', "two.jsonl, line 1: both "
                  '"prompt" and "question" are there', "keep one"),
    "empty.jsonl": ('\n{"prompt": "a", "completion": " \\n"}', 'empty.jsonl, line 2: "completion" '
                    "is empty", "fill it in, or take the row out"),
    "none.jsonl": ('{"prompt": "a", "completion": null}', "line 1: no format has the columns",
                   "rename"),
    "number.jsonl": ('{"prompt": "2 + 2", "completion": 4}', 'line 1: "completion" must be text, '
                     "got 4", "write one text in quotes"),
    "role.jsonl": (f"{GOOD}\n{chat(('user', 'a'), ('tool', 'b'))}", "role.jsonl, line 2: message 2 "
                   'has the role "tool"', "expected one of system, user, human, assistant, gpt"),
    "twice.jsonl": (chat(("user", "a"), ("user", "b"), ("assistant", "c")),
                    "line 1: message 2 is the user's, expected the assistant's", "take turns"),
    "first.jsonl": (chat(("assistant", "a"), ("user", "b")),
                    "line 1: message 1 is the assistant's, expected the user's", "take turns"),
    "late.jsonl": (chat(("user", "a"), ("system", "b"), ("assistant", "c")),
                   "line 1: message 2 is the system's, expected the assistant's", "at most one"),
    "systems.jsonl": ('{"system": "s", "messages": [{"role": "system", "content": "t"}]}',
                      "line 1: message 2 is the system's", "at most one system message"),
    "last.jsonl": (chat(("user", "a"), ("assistant", "b"), ("user", "c")),
                   "line 1: the last of the 3 messages must be the assistant's", "take it out"),
    "no.jsonl": ('{"messages": []}', "line 1: the last of the 0 messages must be", "add the"),
    "parts.jsonl": (chat(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")),
                    "line 1: message 1 (user) must be text, got [", "write one text in quotes"),
    "null.jsonl": (chat(("user", "a"), ("assistant", None)),
                   "line 1: message 2 (assistant) must be text, got null", "quotes"),
    "half.jsonl": ('{"prompt": "a", "completion": "b \\ud83d"}', 'line 1: "completion" holds half '
                   "of a character", "take it out"),
    "loose.jsonl": ("3", "line 1: expected an object with columns, a pair of texts", "got 3"),
    "cells.csv": ('prompt,completion\n"a\nb",c\nd,e, f\n', "cells.csv, line 4: 3 cells, but the "
                  "first line names 2 columns", "put quotes around"),
    "quote.csv": ('prompt,completion\na,b\nc,"d\n\ne,f\n', "quote.csv, line 3: this is not CSV",
                  "put quotes around text"),
    "header.csv": ("Why?,So.\nHow?,Thus.\n", 'header.csv, line 2: no format has the columns "why?"',
                   "rename them"),
    "chat.csv": ('messages\n"[{""role"": ""user""}]"\n', 'chat.csv, line 2: "messages" must be a '
                 "list of messages", "JSON Lines can"),
    "void.csv": ("", "void.csv holds no rows", "expected at least one"),
    "head.csv": ("prompt,completion\n", "head.csv holds no rows", "expected at least one"),
    "void.jsonl": ("\n \n", "void.jsonl holds no rows", "expected at least one"),
    "void.json": ("[]", "void.json holds no rows", "expected at least one"),
    "data.parquet": ("PAR1", "data.parquet: expected a file that ends in .jsonl, .ndjson, .json, "
                     ".csv, .tsv", ".tsv"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_file_line_and_fix(tmp_path, name):
    text, place, fix = FAULTS[name]
    with pytest.raises(ValueError) as error:
        read_examples(write(tmp_path / name, text))
    message = str(error.value)
    assert place in message and fix in message and message.startswith(name)
    assert "\n" not in message and len(message) < 400


def test_the_first_of_many_bad_rows_is_named_and_the_rest_are_counted(tmp_path):
    bad = '{"prompt": "a", "completion": ""}'
    path = write(tmp_path / "a.jsonl", "\n".join([GOOD, bad, GOOD, bad, bad[:-1], GOOD]))
    with pytest.raises(ValueError, match=r"^a.jsonl, line 2: .*\(the first of 3 bad rows\)$"):
        read_examples(path)


def test_the_line_of_a_row_in_a_list_is_the_one_where_it_begins(tmp_path):
    rows = [{"prompt": "a\n", "completion": "b"}] * 3 + [{"prompt": "a"}]
    text = "\n\n" + json.dumps(rows, indent=2)
    line = 1 + text[:text.rindex("{")].count("\n")
    with pytest.raises(ValueError, match=f"a.json, line {line}: "):
        read_examples(write(tmp_path / "a.json", text))


def test_bytes_that_are_not_utf_8(tmp_path):
    path = write(tmp_path / "a.csv", "question,answer\na,b\nc,café\n", "latin-1")
    with pytest.raises(ValueError, match="a.csv, line 3: a byte that is not UTF-8; save the file"):
        read_examples(path)


def test_rows_in_memory_are_named_by_their_number():
    with pytest.raises(ValueError, match=r'the list, index 1: "answer" is empty'):
        read_examples([{"question": "a", "answer": "b"}, {"question": "a", "answer": ""}])
    with pytest.raises(ValueError, match="the list holds no rows"):
        read_examples([])
    with pytest.raises(ValueError, match="expected a list of rows, got a dict"):
        read_examples({"train": [{"question": "a", "answer": "b"}]})
    with pytest.raises(ValueError, match=r"frame.to_dict\('records'\)"):
        read_examples(type("Frame", (), {"itertuples": None, "__iter__": lambda s: iter("ab")})())


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "a.jsonl")


# --- two parts ----------------------------------------------------------------------------------

MANY = [(f"Question {i % 40}", f"Answer {i}") for i in range(100)]


def asked(examples):
    return {prompt.lower() for prompt, _ in examples}


@pytest.mark.parametrize("held_out, count", [(0.1, 10), (10, 10), (0.5, 50), (0.02, 2), (3, 3)])
def test_no_prompt_is_in_both_parts(held_out, count):
    """Forty prompts, each in two or three examples."""
    train, test = split_examples(MANY, held_out, seed=1)
    assert not asked(train) & asked(test) and sorted(train + test) == sorted(MANY)
    assert max(count - 2, 0) <= len(test) <= count
    assert [e for e in MANY if e in train] == train and [e for e in MANY if e in test] == test


def test_the_seed_alone_decides():
    assert split_examples(MANY, 0.1, seed=1) == split_examples(MANY, 0.1, seed=1)
    assert split_examples(MANY, 0.1, seed=1) != split_examples(MANY, 0.1, seed=2)


def test_the_same_prompt_in_other_words_spaces_and_forms():
    same = [("Why  not?", "a"), ("why not? ", "b"),
            [said("system", "s"), said("user", "WHY\nNOT?"), said("assistant", "c")], "Why not?"]
    other = [(f"Question {i}", "a") for i in range(4)]
    for seed in range(8):
        train, test = split_examples(same + other, 4, seed=seed)
        assert len(test) == 4
        assert all(e in train for e in same) or all(e in test for e in same)


@pytest.mark.parametrize("held_out", [0, 1.0, 100, -1, 200])
def test_both_parts_must_hold_something(held_out):
    with pytest.raises(ValueError, match=f"both sides, got {held_out}"):
        split_examples(MANY, held_out)


def test_prompts_that_are_all_the_same_cannot_be_split():
    with pytest.raises(ValueError, match="no prompt stands in 2 or fewer of the 10 examples"):
        split_examples([("Why?", str(i)) for i in range(10)], 0.2)
