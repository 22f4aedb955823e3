"""What is read from a made-up file is known; what is read from Python's is held against inspect."""

import ast
import fractions
import inspect
import subprocess
import sys
import textwrap
import threading
import traceback

import pytest

from lora_lib.docstrings import MODULES, _functions, _paragraphs, chats, pairs, prose, score

FILE = '''
def kept(a):
    """Add one
    to a. More is said.

    And more.
    """

    # a comment
    return a + 1

class Box:
    @property
    async def inside(self):
        "Return what is inside."
        text = "two\\n"

        return text

def long(a):
    """Return a long source."""
    return [%s]

def refuses():
    """Always raise an error."""
    raise NotImplementedError

def constant():
    """Return the same thing."""
    return 1

def nothing():
    """Only this sentence is here."""

def starts_small():
    """return a sum of things."""
    return sum([])

def no_period():
    """Return a sum of things"""
    return sum([])

def short():
    """Do it."""
    return sum([])

def one_line(): "Return a sum of things."; return sum([
    1, 2])

def dotted():
    """Do what os.path does."""
    return sum([])

def wordy():
    """Return a %s thing."""
    return sum([])

def torn():
    """Return a string that starts at the margin."""
    if True:
        def inner():
            """Return one that does so too."""
            return """a
b"""
    return inner
''' % (", ".join(map(str, range(300))), "very " * 30)


def test_a_made_up_file():
    assert sorted(_functions(FILE)) == [
        ('async def inside(self):\n    text = "two\\n"\n    return text', "Return what is inside."),
        ("def dotted():\n    return sum([])", "Do what os.path does."),
        ("def kept(a):\n    # a comment\n    return a + 1", "Add one to a."),
        ('def torn():\n    if True:\n        def inner():\n            """Return one that does so '
         'too."""\n            return """a\nb"""\n    return inner',
         "Return a string that starts at the margin.")]


def test_python_agrees():
    """Pairs are what `inspect` says of the functions of modules that may be imported."""
    modules = (fractions, textwrap, threading, traceback)
    objects = [value for module in modules for value in vars(module).values()]
    objects += [f for c in filter(inspect.isclass, objects) for f in vars(c).values()]
    known = {}
    for function in filter(inspect.isfunction, objects):
        if function.__doc__ and function.__module__ in [module.__name__ for module in modules]:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
            tree.decorator_list, tree.body = [], tree.body[1:]
            known[ast.unparse(tree)] = " ".join(inspect.getdoc(function).split())
    both = [(known[text], sentence) for source, sentence in pairs("test")
            if (text := ast.unparse(ast.parse(source))) in known]
    assert len(both) >= 20
    assert all(doc.startswith(sentence) for doc, sentence in both)


def test_the_parts_are_apart_and_large_enough():
    names = [module for modules in MODULES.values() for module in modules.split()]
    assert len(names) == len(set(names))
    parts = {part: pairs(part) for part in MODULES}
    assert len(parts["train"]) >= 1000 and min(map(len, parts.values())) >= 300
    for side in (0, 1):
        texts = [pair[side] for found in parts.values() for pair in found]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("part", MODULES)
def test_every_pair_is_a_function_and_a_sentence_that_it_does_not_hold(part):
    for source, sentence in pairs(part):
        function, = ast.parse(source).body
        assert len(source) <= 600 and 3 <= len(sentence.split()) and len(sentence) <= 100
        assert ast.get_docstring(function) != sentence and score(sentence, sentence)["sentence"]


def test_paragraphs_are_plain():
    topic = """The heading
***********

A paragraph of
comma-
separated words.

   An indented one, of a list.

* An item.

x = 1 is code.


New in version 3.3: A note.

See also the rest.

The "end" is near.
"""
    assert list(_paragraphs(topic)) == ["A paragraph of comma-separated words.",
                                        'The "end" is near.']


def test_prose_is_prose():
    passages = prose(50)
    assert len(set(passages)) == 50 and prose(50) == passages != prose(50, seed=1)
    for passage in passages:
        assert 300 <= len(passage) <= 500
        assert not any(mark in passage for mark in ("::", "=", "|", "\n ", "* ", "in version"))


def test_score():
    answer = "Return the path."
    assert score(" Return the path.\n", answer) == {"exact": True, "sentence": True, "overlap": 1}
    assert score("return a path", answer) == {"exact": False, "sentence": False, "overlap": 2 / 3}
    assert not score("Return the path.\nIt is long.", answer)["sentence"]
    assert score("path path path path", answer)["overlap"] == 2 / 7     # a word counts as often
    assert score("the hat and the cat", "The cat and the hat.")["overlap"] == 1
    assert score("", answer) == {"exact": False, "sentence": False, "overlap": 0}


def test_the_same_on_every_machine():
    code = ("from lora_lib.docstrings import *\nimport zlib\n"
            "print(zlib.crc32(repr([chats(50, 0), prose(20)]).encode()))")
    assert len({subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed},
                               check=True, capture_output=True).stdout for seed in "12"}) == 1


def test_draws_and_bad_input():
    assert chats(5, 0) == chats(5, 0) != chats(5, 1)
    assert [m["role"] for m in chats(1, 0)[0]] == ["system", "user", "assistant"]
    assert len({chat[1]["content"] for chat in chats(50, 0, "test")}) == 50
    for call in (lambda: pairs("dev"), lambda: chats(10**6, 0), lambda: prose(10**6)):
        with pytest.raises(ValueError, match="must be .*, got"):
            call()
