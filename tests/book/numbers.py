"""Numbers as people write them: 65,536, 16.8M, 93 %, 1e-3, 10^{-3}, 12 MB.

A written number stands for one value or a few (93 % is 93 of a hundred and 0.93), each known to
a resolution, the size of its last digit: 0.93 is known to 0.01 and 16.8M to 100,000.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

_SUFFIX = {"K": 3, "k": 3, "M": 6, "B": 9, "T": 12}
_WORD = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_BYTES = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TIME = {"ms": Decimal("1e-3"), "µs": Decimal("1e-6"), "us": Decimal("1e-6")}

_SPACE = r"[ \u00a0\u2009\u202f]"  # plain, no-break, thin and narrow no-break
_GROUPED = r"[0-9]{1,3}(?:[,_\u00a0\u2009\u202f][0-9]{3})+"
_NUMBER = re.compile(
    rf"""
    (?<![\w.])                                  # not inside a name such as float64 or lora_2
    (?P<digits> (?:{_GROUPED}|[0-9]+) (?:\.[0-9]+)? | \.[0-9]+ )
    (?P<exponent> [eE][-+]?[0-9]+ )?
    (?:
        (?P<percent> {_SPACE}* \\?% | {_SPACE}+ (?:percent|per{_SPACE}cent) \b )
      | (?P<suffix> [KkMBT] ) (?![\w])
      | {_SPACE} (?P<word> {"|".join(_WORD)} ) \b
      | {_SPACE}? (?P<bytes> {"|".join(_BYTES)} ) (?!\w)
      | {_SPACE}? (?P<time> {"|".join(_TIME)} ) (?!\w)
    )?
    """,
    re.VERBOSE,
)
# GPT-3, CIFAR-10, Llama-2: a word with two capitals, or a known one, owns the number after it.
_OWNER = re.compile(r"(?:[A-Za-z]*[A-Z][A-Za-z]*[A-Z][A-Za-z]*|Llama)-$")
_VERSION = re.compile(r"(?<![\w.])v?[0-9]+(?:\.[0-9]+){2,}(?![\w])")
_DIMENSION = re.compile(r"(?<![\w.])[0-9]-?D\b")
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


@dataclass(frozen=True)
class Value:
    """One reading of a written number: its size and the size of its last digit."""

    size: Decimal
    resolution: Decimal


@dataclass(frozen=True)
class Number:
    """A number as it stands in a text: where, how it is written, and what it may mean."""

    text: str
    start: int
    values: tuple[Value, ...]

    def agrees(self, shown: "Number") -> bool:
        """Whether this number is `shown`, or `shown` rounded.

        Rounding may drop digits and never add them: 0.93 agrees with a shown 0.9312, and
        0.9312 does not agree with a shown 0.93. A minus sign may be left out ("falls by 3").
        """
        return any(_rounds(own, other) for own in self.values for other in shown.values)


def _rounds(own: Value, other: Value) -> bool:
    size = other.size if own.size < 0 else abs(other.size)
    return other.resolution <= own.resolution and abs(size - own.size) * 2 <= own.resolution


def find(text: str) -> list[Number]:
    """The numbers in `text`, left to right; digits that belong to a name are not numbers."""
    text = _unified(text)
    numbers = []
    for match in _NUMBER.finditer(text):
        before = text[: match.start()]
        if _OWNER.search(before):
            continue
        numbers.append(Number(match.group(), match.start(), _values(match, before)))
    return _share_percent(numbers, text)


def _unified(text: str) -> str:
    """`text` with one spelling of the minus sign, powers of ten, products, and no versions."""
    text = text.replace("\u2212", "-")
    text = re.sub(
        r"(?<=10)-?[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m.group().translate(_SUPERSCRIPTS), text
    )
    text = re.sub(r"(?<=[0-9])\s*[x×·]\s*10\^\{?([-+]?[0-9]+)\}?", r"e\1", text)
    text = re.sub(r"(?<![\w.])10\^\{?([-+]?[0-9]+)\}?", r"1e\1", text)
    text = re.sub(r"(?<=[0-9])[x×](?=[0-9])", " × ", text)
    for names in (_VERSION, _DIMENSION):
        text = names.sub(lambda m: "_" * len(m.group()), text)
    return text


def _values(match: re.Match, before: str) -> tuple[Value, ...]:
    digits = re.sub(r"[,_\u00a0\u2009\u202f]", "", match["digits"])
    size = Decimal(digits + (match["exponent"] or ""))
    resolution = Decimal(1).scaleb(size.as_tuple().exponent)
    if re.search(r"(?:^|[\s(\[{=<>≤≥≈~,:±|/*+])-$", before):
        size = -size
    scales: list = [1]
    if match["percent"]:
        scales = [1, Decimal("0.01")]
    elif match["suffix"] or match["word"]:
        power = _SUFFIX.get(match["suffix"]) or _WORD[match["word"]]
        scales = [10**power]
    elif match["bytes"]:
        scales = [1, _BYTES[match["bytes"]]]
    elif match["time"]:
        scales = [1, _TIME[match["time"]]]
    return tuple(Value(size * scale, resolution * scale) for scale in scales)


def _share_percent(numbers: list[Number], text: str) -> list[Number]:
    """Let the first of two numbers share the sign of the second: 95-100 %, 4 to 7 %."""
    shared = list(numbers)
    for index, (first, second) in enumerate(zip(numbers, numbers[1:])):
        between = text[first.start + len(first.text) : second.start]
        if len(second.values) == 2 and re.fullmatch(r"\s*(?:-|–|to|and|or)\s*", between):
            if "%" in second.text or "cent" in second.text:
                extra = tuple(Value(v.size / 100, v.resolution / 100) for v in first.values)
                shared[index] = Number(first.text, first.start, first.values + extra)
    return shared
