"""A made-up task that people pay for: a request in English -> the call of a tool, as JSON.

"Wake me up at 7 am." -> {"name": "set_alarm", "arguments": {"time": "07:00"}}

Names, titles and messages are copied as they stand. The rest follows a few rules: a time is
"HH:MM" of 24 hours, a date "MM-DD" and another day its own words, a duration counts minutes, an
amount is a number, a currency its code of three letters, an article goes. What a request does not
mention stays out of the call. Training, validation and test have their own phrasings and their
own values: names, times, days, numbers, and pairs of currencies. They share the ways to say a time
or a number, for those are the rules to learn, and the words for a currency or a means of travel,
for those must be known. Everything is drawn from Python's `random.Random(seed)` and is the same on
every machine.
"""

import json
import random
import re
from collections import Counter

from lora_lib.phrases import (BY, CURRENCIES, HOURS, MONTHS, NAMES, NUMBERS, PARTS, PHRASINGS,
                              SIGNS, TENS, VALUES, WEEKDAYS)

Pair = tuple[str, str]
Chat = list[dict[str, str]]

# Every tool and its arguments, in the order in which an answer has them; "?" marks the optional.
TOOLS = {
    "set_alarm": ("time", "day?"),
    "set_timer": ("minutes", "label?"),
    "send_message": ("to", "text"),
    "play_music": ("artist", "song?"),
    "get_weather": ("city", "day?"),
    "book_table": ("restaurant", "people", "time", "day?"),
    "convert": ("amount", "from", "to"),
    "add_event": ("title", "day", "time"),
    "navigate": ("place", "by?"),
}
SYSTEM = "Answer with one JSON call:\n" + "\n".join(
    " ".join((name, *arguments)) for name, arguments in TOOLS.items())


def _number(n, in_words):
    """A number in digits, or in words if it is below 100."""
    if n >= 100 or not in_words:
        return str(n)
    if n < 20:
        return NUMBERS[n]
    return TENS[n // 10 - 2] + (f"-{NUMBERS[n % 10]}" if n % 10 else "")


def _time(rng, hour, minute):
    """One of the ways to say a time of day; each tells the morning from the evening."""
    in_words = rng.random() < 0.5
    clock = (hour - 1) % 12 + 1
    after = hour % 12 + 1
    half = "am" if hour < 12 else "pm"
    phase = ("in the morning" if hour < 12 else "in the afternoon" if hour < 18 else
             "in the evening" if hour < 21 else "at night")
    ways = [f"{clock}:{minute:02} {half}", f"{hour}:{minute:02}" if hour > 12 else
            f"{clock}:{minute:02} {phase}"]
    if minute == 0:
        ways += [f"{clock} {half}", f"{_number(clock, in_words)} o'clock {phase}"]
    elif minute == 30:
        ways += [f"half past {_number(clock, in_words)} {phase}"] * 2
    elif minute < 30:
        past = "quarter" if minute == 15 else _number(minute, in_words)
        ways += [f"{past} past {_number(clock, in_words)} {phase}"]
    elif after not in (12, 6, 9):                   # "ten to six" is of the afternoon or evening
        to = "quarter" if minute == 45 else _number(60 - minute, in_words)
        ways += [f"{to} to {_number(after, in_words)} {phase}"]
    return rng.choice(ways)


def _duration(rng, minutes):
    in_words = rng.random() < 0.5
    hours, rest = divmod(minutes, 60)
    ways = [f"{_number(minutes, in_words)} minutes"]
    if hours:
        whole = "an hour" if hours == 1 else f"{_number(hours, in_words)} hours"
        more = f" and {_number(rest, in_words)} minutes" if rest else ""
        half = "an hour and a half" if hours == 1 else f"{_number(hours, True)} and a half hours"
        ways += [half if rest == 30 else whole + more] * 2
    return rng.choice(ways)


def _filled(rng, slot, tool, part):
    """What stands in the slot, and the arguments that it means."""
    if slot == "day" and rng.random() < 0.4:
        month, day = rng.choice(VALUES["date"][part])
        ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day // 10 != 1 else 0, "th")
        name = MONTHS[month - 1]
        phrase = rng.choice([f"on {name} {day}", f"on the {day}{ending} of {name}"])
        return phrase, {"day": f"{month:02}-{day:02}"}
    if slot == "time":                              # a third each: full hours, quarters, others
        rank = rng.choice([(0,), (15, 30, 45), (5, 10, 20, 25, 35, 40, 50, 55)])
        hour, minute = rng.choice([(hour, minute) for hour, minute in VALUES["time"][part]
                                   if hour in HOURS[tool] and minute in rank])
        return _time(rng, hour, minute), {"time": f"{hour:02}:{minute:02}"}
    if slot == "money":
        amount = rng.choice(VALUES["amount"][part])
        name, other = rng.choice(VALUES["currencies"][part])
        phrase = f"{_number(amount, rng.random() < 0.5)} {name}"
        if name in SIGNS and rng.random() < 0.5:
            phrase = f"{SIGNS[name]}{amount}"
        return phrase, {"amount": amount, "from": CURRENCIES[name], "to": CURRENCIES[other]}
    if slot == "by":
        phrase = rng.choice(list(BY))
        return phrase, {"by": BY[phrase]}
    value = rng.choice(VALUES[slot][part])
    match slot:
        case "day":
            phrase = f"on {value}" if value in WEEKDAYS else value
        case "minutes":
            phrase = _duration(rng, value)
        case "people":
            phrase = _number(value, rng.random() < 0.5)
        case "title":
            phrase = f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
        case _:
            phrase = value
    return phrase, {slot: value}


def _request(rng, part):
    tool = rng.choice(list(TOOLS))
    phrasing = rng.choice(PHRASINGS[tool][part])
    phrases, found = {}, {}
    for slot in re.findall(r"{(\w+)}", phrasing):
        if tool == "convert" and slot == "to":
            continue
        phrases[slot], meant = _filled(rng, slot, tool, part)
        found |= meant
    if tool == "convert":
        phrases["to"] = NAMES[found["to"]]
    arguments = {name: found[name] for name in _names(tool) if name in found}
    prompt = phrasing.format(**phrases)
    return prompt[0].upper() + prompt[1:], json.dumps({"name": tool, "arguments": arguments})


def _names(tool):
    return [argument.rstrip("?") for argument in TOOLS[tool]]


def requests(n: int, seed, part: str = "train") -> list[Pair]:
    """`n` different requests of "train", "validation" or "test" with the calls that they ask for.

    The tools are equally likely; towards n = 2000 those with few different requests run out.
    Raises ValueError for another part, and for more than 2000 requests.
    """
    if part not in PARTS:
        raise ValueError(f'part must be "train", "validation" or "test", got {part!r}')
    if not 0 <= n <= 2000:
        raise ValueError(f"n must be between 0 and 2000, got {n}")
    rng, pairs = random.Random(f"calls {part} {seed}"), {}
    while len(pairs) < n:
        prompt, answer = _request(rng, part)
        pairs[prompt] = answer
    return list(pairs.items())


def chats(n: int, seed, part: str = "train") -> list[Chat]:
    """The same requests as conversations: the system's message, the user's, the assistant's."""
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt},
             {"role": "assistant", "content": answer}]
            for prompt, answer in requests(n, seed, part)]


def few_shot(k: int, seed) -> Chat:
    """`k` requests of training and their calls, to stand between system's message and request.

    No tool comes again before each has come. Raises ValueError for more than 90.
    """
    if not 0 <= k <= 90:
        raise ValueError(f"k must be between 0 and 90, got {k}")
    turns, order = Counter(), []
    for chat in chats(1000, f"few {seed}"):
        tool = json.loads(chat[-1]["content"])["name"]
        turns[tool] += 1
        order.append((turns[tool], chat[1:]))
    order.sort(key=lambda pair: pair[0])
    return [message for _, messages in order[:k] for message in messages]


def score(said: str, answer: str) -> dict[str, bool]:
    """How right a text is that should be a call. Only white space around it is forgiven.

    "exact": the same name and arguments, in whatever order. "name": the right tool. "valid": a
    JSON object with a tool's name and its arguments, all that are required and no others.
    """
    try:
        call = json.loads(said)
    except (ValueError, RecursionError):
        call = None
    wanted = json.loads(answer)
    name = call.get("name") if isinstance(call, dict) else None
    valid = (isinstance(name, str) and name in TOOLS and call.keys() == {"name", "arguments"}
             and isinstance(call["arguments"], dict)
             and {a for a in TOOLS[name] if not a.endswith("?")} <= call["arguments"].keys()
             and call["arguments"].keys() <= set(_names(name)))
    return {"exact": call == wanted, "valid": valid, "name": name == wanted["name"]}
