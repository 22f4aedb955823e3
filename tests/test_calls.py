"""The requests are read by a reader that knows English numbers and times, not the generator."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from lora_lib.calls import TOOLS, chats, few_shot, requests, score
from lora_lib.phrases import PARTS, PHRASINGS, VALUES

ANSWER = '{"name": "get_weather", "arguments": {"city": "Oslo", "day": "05-17"}}'
ONES = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen").split()
WORTH = {word: n for n, word in enumerate(ONES, 1)} | {"quarter": 15, "half": 30}
WORTH |= {ten: n for n, ten in zip(range(20, 100, 10), "twenty thirty forty fifty sixty seventy "
                                                       "eighty ninety".split())}
NUMBER = f"((?:{'|'.join(WORTH)})(?:-(?:{'|'.join(ONES[:9])}))?|\\d+)"
PHASE = "(am|pm|in the morning|in the afternoon|in the evening|at night)"
MONTH = "(January|February|March|April|May|June|July|August|September|October|November|December)"
WEEKDAY = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
MONEY = {"dollar": "USD", "$": "USD", "euro": "EUR", "€": "EUR", "pound": "GBP", "£": "GBP",
         "yen": "JPY", "franc": "CHF", "rupee": "INR", "yuan": "CNY", "won": "KRW",
         "peso": "MXN", "zloty": "PLN"}


def number(word):
    return int(word) if word.isdigit() else sum(WORTH[part] for part in word.split("-"))


def time_in(text):
    """The one time of day that a text names, as HH:MM; None if it names none."""
    ways = [(f"{NUMBER} (past|to) {NUMBER} {PHASE}", lambda m, way, h, phase:
             (h * 60 + (m if way == "past" else -m), phase)),
            (rf"(\d+):(\d\d) {PHASE}", lambda h, m, phase: (h * 60 + m, phase)),
            (r"(\d+):(\d\d)", lambda h, m: (h * 60 + m, None)),
            (f"{NUMBER}(?: o'clock)? {PHASE}", lambda h, phase: (h * 60, phase))]
    for pattern, meaning in ways:
        if found := re.search(rf"(?<![\w-]){pattern}(?!\w)", text):
            minutes, phase = meaning(*(number(group) if re.fullmatch(NUMBER, group) else group
                                       for group in found.groups()))
            if phase not in (None, "am", "in the morning"):
                minutes += 12 * 60
            return f"{minutes // 60:02}:{minutes % 60:02}"


def day_in(text):
    names = MONTH[1:-1].split("|")
    if found := re.search(rf"{MONTH} (\d+)|the (\d+)(?:st|nd|rd|th) of {MONTH}", text):
        month, day = found[1] or found[4], found[2] or found[3]
        return f"{names.index(month) + 1:02}-{int(day):02}"
    if found := re.search(rf"today|tomorrow|next {WEEKDAY}|(?<=on ){WEEKDAY}", text):
        return found[0]


def minutes_in(text):
    if found := re.search(f"(an|{NUMBER})( and a half)? hours?( and a half| and {NUMBER} minutes)?",
                          text):
        hours = 1 if found[1] == "an" else number(found[1])
        half = 30 if "and a half" in found[0] else 0
        return 60 * hours + half + (number(found[5]) if found[5] else 0)
    return number(re.search(f"{NUMBER} minutes", text)[1])


def money_in(text):
    """Amount, currency, other currency, in the order of the call."""
    names = "|".join(map(re.escape, MONEY))
    amount = re.search(rf"[$€£](\d+)|{NUMBER} (?:{names})", text)
    start = re.search(names, amount[0])[0]
    other = re.search(f"(?<![\\w])(?:{names})", text.replace(amount[0], ""))[0]
    return number(amount[1] or amount[2]), MONEY[start], MONEY[other]


def test_the_reader_reads():
    for text, time in (("7 am", "07:00"), ("19:35", "19:35"), ("7:05 in the evening", "19:05"),
                       ("quarter to nine in the morning", "08:45"),
                       ("half past 6 in the evening", "18:30"),
                       ("twenty-five past ten at night", "22:25"), ("at Saffron", None)):
        assert time_in(text) == time, text
    assert [day_in(text) for text in ("on the 3rd of May", "on May 30", "next Friday", "on Sunday",
                                      "at 7 pm")] == ["05-03", "05-30", "next Friday", "Sunday",
                                                      None]
    assert [minutes_in(text) for text in (
        "an hour", "an hour and a half", "two and a half hours", "2 hours and five minutes",
        "forty-five minutes")] == [60, 90, 150, 125, 45]
    assert money_in("How many won are ninety-nine dollars?") == (99, "USD", "KRW")
    assert money_in("$40 in yen") == (40, "USD", "JPY")


@pytest.mark.parametrize("part", PARTS)
def test_each_answer_can_be_read_from_its_request(part):
    pairs = requests(2000, 0, part)
    assert len(dict(pairs)) == 2000
    for prompt, answer in pairs:
        call = json.loads(answer)
        name, found = call["name"], call["arguments"]
        assert json.dumps(call) == answer and all(score(answer, answer).values())
        assert list(found) == [a for a in (a.rstrip("?") for a in TOOLS[name]) if a in found]
        assert prompt[0].isupper() and prompt[-1] in ".?", prompt
        expected = {
            "time": time_in, "day": day_in, "minutes": minutes_in,
            "people": lambda text: number(next(
                group for group in re.search(
                    f"(?:for|are|Find|Could|has) {NUMBER}(?! past| to|:| o'clock)(?=[ ,.?])|"
                    f"{NUMBER} of us", text).groups() if group)),
            "amount": lambda text: money_in(text)[0], "from": lambda text: money_in(text)[1],
            "by": lambda text: (re.search(" (?:on|by) (foot|bike|car|bus|train)", text) or
                                [None, None])[1],
        }
        for argument in (a.rstrip("?") for a in TOOLS[name]):
            if name == "convert" and argument == "to":
                assert found["to"] == money_in(prompt)[2], prompt
            elif argument in expected:
                assert expected[argument](prompt) == found.get(argument), (prompt, argument)
            elif argument in found:                     # copied as it stands, once
                value = re.escape(found[argument])
                assert len(re.findall(rf"(?<!\w){value}(?!\w)", prompt)) == 1, prompt
            else:                                       # not mentioned
                known = [v for values in VALUES[argument].values() for v in values]
                assert not any(re.search(rf"\b{re.escape(v)}\b", prompt) for v in known), prompt


def test_the_parts_share_no_phrasing_and_no_value():
    for i, part in enumerate(PARTS):
        for other in PARTS[i + 1:]:
            for tool in TOOLS:
                assert not set(PHRASINGS[tool][part]) & set(PHRASINGS[tool][other])
            for values in VALUES.values():
                assert values[part] and not set(values[part]) & set(values[other])
    drawn = {part: requests(2000, 1, part) for part in PARTS}

    def values(part):
        calls = [json.loads(answer) for _, answer in drawn[part]]
        found = {(c["name"], name, value) for c in calls for name, value in c["arguments"].items()
                 if c["name"] != "convert" and name != "by"}
        return found | {tuple(c["arguments"].values())[1:] for c in calls if c["name"] == "convert"}

    assert not values("train") & (values("validation") | values("test"))
    assert not values("validation") & values("test")


def test_every_phrasing_and_tool_is_drawn():
    for part in PARTS:
        tools = Counter(json.loads(answer)["name"] for _, answer in requests(200, 2, part))
        assert set(tools) == set(TOOLS) and min(tools.values()) > 200 / len(TOOLS) / 3
        pairs = requests(2000, 2, part)
        for tool in TOOLS:
            for phrasing in PHRASINGS[tool][part]:
                pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(phrasing))
                assert any(re.fullmatch(pattern, prompt, re.I) for prompt, _ in pairs), phrasing


def test_no_value_stands_in_two_slots():
    values = [v for slot in VALUES.values() for part in slot.values() for v in part
              if isinstance(v, str)]
    assert len(values) == len(set(values))


def test_the_same_on_every_machine():
    code = "from lora_lib.calls import requests; print(requests(50, 5, 'test'))"
    runs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True,
                           capture_output=True, text=True, encoding="utf8").stdout
            for seed in "12"}
    assert runs == {f"{requests(50, 5, 'test')}\n"}
    assert requests(50, 5, "test") != requests(50, 6, "test")


def test_the_score_sees_each_fault():
    def verdict(said):
        return "".join(key[0] for key, right in score(said, ANSWER).items() if right)

    call = json.loads(ANSWER)
    assert verdict(ANSWER) == verdict(f"\n {ANSWER}\n") == "evn"
    assert verdict(json.dumps({"arguments": {"day": "05-17", "city": "Oslo"},
                               "name": "get_weather"})) == "evn"
    assert verdict(json.dumps(call | {"arguments": {"city": "Oslo"}})) == "vn"
    assert verdict(json.dumps(call | {"arguments": {"city": "oslo", "day": "05-17"}})) == "vn"
    assert verdict(json.dumps(call | {"arguments": {"day": "05-17"}})) == "n"
    assert verdict(json.dumps(call | {"arguments": {"city": "Oslo", "room": "hall"}})) == "n"
    assert verdict(json.dumps(call | {"arguments": ["Oslo"]})) == "n"
    assert verdict(json.dumps(call | {"id": 1})) == "n"
    assert verdict('{"name": "get_weather"}') == "n"
    assert verdict('{"name": "set_alarm", "arguments": {"time": "07:00"}}') == "v"
    assert verdict('{"name": "get_wether", "arguments": {"city": "Oslo"}}') == ""
    assert verdict('{"name": ["get_weather"], "arguments": {"city": "Oslo"}}') == ""
    for said in ("", "Oslo", "[]", "null", f"```json\n{ANSWER}\n```", ANSWER + ".", ANSWER * 2,
                 ANSWER[:-1], ANSWER.replace('"', "'"), "[" * 10**5):
        assert verdict(said) == "", said


def test_messages():
    (system, user, assistant), = chats(1, 3, "test")
    assert [(user["content"], assistant["content"])] == requests(1, 3, "test")
    assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]
    for name, arguments in TOOLS.items():
        assert f"{name} {' '.join(arguments)}" in system["content"].splitlines()


def test_examples_for_the_prompt_show_every_tool():
    shown = few_shot(len(TOOLS), 0)
    assert [m["role"] for m in shown] == ["user", "assistant"] * len(TOOLS)
    assert {json.loads(m["content"])["name"] for m in shown[1::2]} == set(TOOLS)
    assert few_shot(4, 0) == shown[:8] and few_shot(4, 1) != shown[:8]
    assert len(few_shot(90, 0)) == 180


def test_bad_input():
    with pytest.raises(ValueError, match="part must be .* got 'dev'"):
        requests(1, 0, "dev")
    for n in (-1, 2001):
        with pytest.raises(ValueError, match=f"n must be between 0 and 2000, got {n}"):
            requests(n, 0)
    with pytest.raises(ValueError, match="k must be between 0 and 90, got 91"):
        few_shot(91, 0)
