"""A task on real text: the source of a Python function -> the first sentence of its docstring.

The functions are those of Python's own standard library, which comes with every Python under the
PSF license. Nothing of it is kept here, so the text depends on the version of Python that reads
it: from 3.11 to 3.13 most pairs are the same, and some are not. The parts have their own modules.
`prose` gives passages of the language reference (`pydoc_data.topics`, same license): English that
is not the task's, on which forgetting can be measured.
"""

import ast
import random
import re
import sysconfig
from collections import Counter
from functools import lru_cache
from importlib import import_module
from pathlib import Path

Pair = tuple[str, str]
Chat = list[dict[str, str]]

SYSTEM = "Say in one sentence what the function does."
LONGEST_SOURCE, LONGEST_SENTENCE = 600, 100         # characters
SHORTEST_SENTENCE = 3                               # words
# Files and packages of Python 3.11 to 3.13 (a package counts as one module); `datetime` is split in
# two from 3.12 on, so one of them may be missing.
MODULES = {
    "train": """_collections_abc _pyio _strptime abc argparse ast asyncio base64 bdb bisect
        cProfile calendar code codeop collections concurrent configparser contextlib copy csv
        ctypes dataclasses datetime _pydatetime difflib dis doctest email enum filecmp fileinput
        fnmatch functools genericpath getpass gettext glob graphlib gzip hashlib heapq html http
        imaplib inspect ipaddress json keyword linecache locale lzma mailbox mimetypes
        modulefinder multiprocessing netrc nturl2path numbers opcode operator optparse os
        pathlib pdb pickle pickletools pkgutil platform plistlib posixpath ntpath pprint profile
        pstats py_compile pyclbr queue quopri random re reprlib rlcompleter runpy sched secrets
        selectors shelve shlex shutil smtplib socket socketserver sqlite3 ssl stat statistics
        stringprep struct subprocess symtable sysconfig tempfile""",
    "validation": "bz2 compileall cmd decimal _pydecimal ftplib importlib logging poplib site",
    "test": """fractions string tarfile textwrap threading timeit tokenize trace traceback tty
        types typing unittest urllib uuid warnings wave weakref webbrowser wsgiref xml xmlrpc
        zipapp zipfile zipimport zoneinfo""",
}
# A paragraph from a capital letter to a period, without the signs of code and without history.
PROSE = r"(?!See |\w+ in version)[A-Z][^|=<>{}\[\]_*]*[.]"
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def _sentence(docstring):
    """The first sentence of a docstring on one line, or None where there is none to be had."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    found = re.match(r"[A-Z][^`:;<>|]*?[a-z)\]'\"]\.(?= [A-Z]|$)", paragraph)
    if found and len(found[0]) <= LONGEST_SENTENCE and len(found[0].split()) >= SHORTEST_SENTENCE:
        return found[0]


def _source(text, node):
    """A function without its docstring, blank lines and the indentation that its lines share.

    None if a line has less indentation, or the docstring stands on the line of the name.
    """
    lines = text.split("\n")
    first, doc, last = node.lineno - 1, node.body[0], node.end_lineno
    kept = [line for line in lines[first:doc.lineno - 1] + lines[doc.end_lineno:last]
            if line.strip()]
    if doc.lineno > node.lineno and not any(line[:node.col_offset].strip() for line in kept):
        return "\n".join(line[node.col_offset:].rstrip() for line in kept)


def _does(body):
    """Whether there is more than one `pass`, `raise`, constant or `return` of a constant."""
    match body:
        case [] | [ast.Pass() | ast.Raise() | ast.Expr(ast.Constant())
                   | ast.Return(None | ast.Constant())]:
            return False
    return True


def _functions(text):
    """(source, first sentence) of the functions and methods of a file that has them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function) and (doc := ast.get_docstring(node)) and _does(node.body[1:]):
            source, sentence = _source(text, node), _sentence(doc)
            if source and sentence and len(source) <= LONGEST_SOURCE:
                yield source, sentence


def _files(module):
    root = Path(sysconfig.get_path("stdlib"))
    if (root / module).is_dir():
        return sorted(path for path in (root / module).rglob("*.py")
                      if "test" not in path.relative_to(root).parts)
    return [path for path in (root / f"{module}.py",) if path.is_file()]


@lru_cache
def pairs(part: str = "train") -> tuple[Pair, ...]:
    """All pairs of "train", "validation" or "test", in an order that is always the same.

    Of functions with the same source or the same sentence one stays. Raises ValueError for another
    part.
    """
    if part not in MODULES:
        raise ValueError(f'part must be "train", "validation" or "test", got {part!r}')
    sources, sentences, found = set(), set(), []
    for name in MODULES:                            # what an earlier part has is not in a later one
        found = []
        for module in sorted(MODULES[name].split()):
            for path in _files(module):
                for source, sentence in _functions(path.read_text("utf8")):
                    if source not in sources and sentence.lower() not in sentences:
                        sources.add(source)
                        sentences.add(sentence.lower())
                        found.append((source, sentence))
        if name == part:
            break
    found.sort()
    random.Random(f"docstrings {part}").shuffle(found)
    return tuple(found)


def chats(n: int, seed, part: str = "train") -> list[Chat]:
    """`n` pairs, drawn without repetition, as messages of the system, the user, the assistant.

    Raises ValueError when the part has fewer.
    """
    everything = pairs(part)
    if not 0 <= n <= len(everything):
        raise ValueError(f"n must be between 0 and {len(everything)}, the pairs of {part}, got {n}")
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": source},
             {"role": "assistant", "content": sentence}]
            for source, sentence in random.Random(f"docstrings {seed}").sample(everything, n)]


def score(said: str, answer: str) -> dict[str, bool | float]:
    """How good a sentence is. "exact": the same, but for white space around it. "sentence": one
    line from a capital letter to a period. "overlap": F1 of the words that the two share.
    """
    said = said.strip()
    words, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (said, answer))
    shared = (words & wanted).total()
    return {"exact": said == answer.strip(),
            "sentence": "\n" not in said and said[:1].isupper() and said.endswith("."),
            "overlap": 2 * shared / max(1, words.total() + wanted.total())}


def _paragraphs(text):
    """The plain paragraphs of a topic: no code, list, table or heading."""
    for block in re.split(r"\n{2,}", text.strip("\n")):
        line = " ".join(block.replace("-\n", "-").split())
        if re.fullmatch(PROSE, line) and not re.search("^ ", block, re.M):
            yield line


@lru_cache
def _passages():
    found, known = [], set()
    for _, text in sorted(import_module("pydoc_data.topics").topics.items()):
        passage = []
        for paragraph in _paragraphs(text):
            if paragraph not in known:
                known.add(paragraph)
                passage.append(paragraph)
            if len("\n\n".join(passage)) >= 300:
                found.append("\n\n".join(passage))
                passage = []
    return [passage for passage in found if len(passage) <= 500]


def prose(count: int, seed=0) -> list[str]:
    """`count` passages of 300 to 500 characters, whole paragraphs of one topic.

    Raises ValueError for more passages than there are.
    """
    passages = _passages()
    if not 0 <= count <= len(passages):
        raise ValueError(f"count must be between 0 and {len(passages)}, got {count}")
    return random.Random(f"prose {seed}").sample(passages, count)
