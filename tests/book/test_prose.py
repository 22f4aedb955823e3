"""The check of prose numbers sees each planted number and lets the supported ones pass."""

from decimal import Decimal

import pytest

from . import numbers, prose
from .sample import chapter, stdout


def faults_of(text: str, output: str = "") -> list[str]:
    notebook = chapter()
    notebook.cells = [notebook.cells[2], notebook.cells[3]]
    notebook.cells[0].source = text
    notebook.cells[1].outputs = [stdout(output)]
    return prose.faults(notebook)


def test_a_clean_chapter_passes():
    assert prose.faults(chapter()) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("16.8M", "16.9M"),
        ("65,536", "65,537"),
        ("0.4 %", "0.5 %"),
        ("0.391 %", "0.392 %"),
        ("0.391 %", "0.3910 %"),  # a digit that nothing printed
        ("4096 \\times", "8192 \\times"),
        ("4096, 8 -->", "4096 -->"),  # the mark forgets a number
        ("4096, 8 -->", "4096, 8, 16 -->"),  # the mark keeps one that is gone
        ("4096, 8 -->", "4096 and 8 -->"),
        ("[paper](https://arxiv.org/abs/2106.09685)", "paper"),  # the link goes
    ],
)
def test_a_planted_number_is_caught(right, wrong):
    notebook = chapter()
    cell = notebook.cells[2]
    assert right in cell.source
    cell.source = cell.source.replace(right, wrong)
    assert len(prose.faults(notebook)) == 1


def test_a_changed_output_leaves_the_prose_behind():
    notebook = chapter()
    notebook.cells[3].outputs = [stdout("16,777,216 and 65,536: 0.00591\n")]
    assert len(prose.faults(notebook)) == 2  # 0.4 % and 0.391 %


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("reaches 0.93", "accuracy 0.9312"),
        ("reaches 93 %", "accuracy 0.9312"),
        ("reaches **93.1%**", "accuracy 93.12%"),
        ("reaches 0.93", "accuracy 93.12%"),
        ("reaches $93\\,\\%$", "np.float64(0.9312)"),
        ("between 92-95 %", "0.918 0.951"),
        ("from 4 to 7 percent", "0.041 0.068"),
        ("loses 3.2 points", "change -3.2"),
        ("loses \u22123.2 points", "change -3.2"),
        ("16.8 million weights", "16777216"),
        ("16.8M weights", "16,777,216"),
        ("a 7B model", "6,738,415,616"),
        ("65{,}536 is $65{,}536$ or $65\\,536$".replace("65{,}536 is", "It is"), "65_536"),
        ("about $3 \\times 10^{-4}$", "3.1e-04"),
        ("about 3e-4 or 3×10⁻⁴", "0.00031"),
        ("$10^{-3}$", "0.001"),
        ("12 MB on disk", "12,345,678 bytes"),
        ("12 ms a step", "0.0123"),
        ("4096x8", "(4096, 8)"),
        ("64-128-10", "[64, 128, 10]"),
        ("$\\frac{\\alpha}{r} = 2$, $W^{12}_{34}$, $x_{10}$, $2r$, $\\tfrac12$", ""),
        ("`rank=8`\n\n```python\nrank = 16\n```", ""),
        ("float64 on a T4, GPT-3, Llama-2, version 1.2.3, 2-D", ""),
        ("## Exercise 4\n\nExercise 4 is hard.", ""),
        ("# 3. Initialization", ""),
        ("See [chapter 3](03_initialization.ipynb): it gets 0.77.", ""),
        ("Back to [exercise 12](#exercise-12).", ""),
        ("8 of 16\n\n<!-- given: 8, 16 -->", ""),
        ("1. first\n2. second", ""),
    ],
)
def test_supported_numbers_pass(text, output):
    assert faults_of(text, output) == []


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("reaches 0.94", "accuracy 0.9312"),
        ("reaches 94 %", "accuracy 0.9312"),
        ("reaches 0.9312", "accuracy 0.93"),
        ("reaches 0.930", "accuracy 0.93"),
        ("65K numbers", "65,536"),  # rounds to 66K
        ("gains \u22123.2 points", "change 3.2"),
        ("16.8M weights", "16.8"),
        ("$8$ directions", ""),
        ("$r \\in \\{1, 2, 4\\}$", ""),
        ("$$\nr = 16\n$$", ""),
        ("\\begin{align}\nr &= 16\n\\end{align}", ""),
        ("$10^{-4}$", "0.001"),
        ("rank-8 updates", ""),
        ("rank 1", ""),
        ("## 8 directions are enough", ""),
        ("- a list of 12 items", ""),
        ("> quoted 12", ""),
        ("| rank |\n|---|\n| 12 |", ""),
        ("See Chapter 3.", ""),
        ("It gets 0.77. See [chapter 3](03_initialization.ipynb).", ""),
        ("It gets 0.77, see [above](#above).", ""),
        ("| a | 12 |\n|---|---|\n| [b](c.md) | 3 |", ""),
        ("rank 8", "float8 and w8"),  # digits of a name print nothing
    ],
)
def test_unsupported_numbers_are_caught(text, output):
    assert len(faults_of(text, output)) == 1


def test_what_counts_as_printed():
    notebook = chapter()
    cell = notebook.cells[3]
    cell.source = "rank = 31"
    cell.outputs = [
        stdout("11"),
        {"output_type": "stream", "name": "stderr", "text": "12"},
        {
            "output_type": "display_data",
            "data": {
                "text/plain": "13",
                "text/html": "<style>.a { width: 14px }</style><td width='15'>16</td>"
                "<script>\nmount(made, 18);\n</script>",
                "image/svg+xml": "<svg>17</svg>",
            },
        },
    ]
    assert [number.text for number in prose.printed(notebook)] == ["11", "13", "16"]


@pytest.mark.parametrize(
    ("text", "size", "resolution"),
    [
        ("65,536", "65536", "1"),
        ("16.8M", "16800000", "100000"),
        ("7B", "7000000000", "1000000000"),
        ("1.50e-3", "0.0015", "0.00001"),
        ("10^{-3}", "0.001", "0.001"),
        ("x = -3.2", "-3.2", "0.1"),
        (".5", "0.5", "0.1"),
        ("3.1 GiB", "3.1", "0.1"),
    ],
)
def test_a_number_has_a_size_and_a_resolution(text, size, resolution):
    (number,) = numbers.find(text)
    assert number.values[0].size == Decimal(size)
    assert number.values[0].resolution == Decimal(resolution)
