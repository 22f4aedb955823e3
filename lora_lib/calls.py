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

Pair = tuple[str, str]
Chat = list[dict[str, str]]

PARTS = ("train", "validation", "test")
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

# The phrasings of each tool: those of training, of validation, and of the test.
PHRASINGS = {"set_alarm": """
Wake me up at {time}.
Set an alarm for {time}.
Set an alarm for {time} {day}.
I need to get up at {time} {day}.
Please wake me {day} at {time}.
Can you set my alarm to {time}?
Alarm at {time} {day}, please.
I want to be awake by {time}.
Make sure I am up at {time} {day}.

Let the alarm ring at {time}.
I have to be out of bed {day} at {time}.

I must not sleep beyond {time}.
My day starts at {time} {day}, so wake me then.
Could you get me up at {time}?
Get me out of bed {day} at {time}, please.""",
             "set_timer": """
Set a timer for {minutes}.
Set a timer of {minutes} for the {label}.
Start a {label} timer for {minutes}.
Count down {minutes}.
Tell me after {minutes}.
The {label} needs {minutes}, please time it.
Can you time {minutes} for me?
Timer for {minutes}, please.
Remind me of the {label} in {minutes}.

Please start a countdown of {minutes}.
Time the {label} for {minutes}.

Let me know after {minutes}, please.
My {label} takes {minutes}, so watch the clock.
Give me a signal in {minutes}.
Check the clock for the {label}: {minutes} from now.""",
             "send_message": """
Tell {to} that {text}.
Text {to} that {text}.
Send a message to {to}: {text}.
Write to {to} that {text}.
Let {to} know that {text}.
Please message {to} that {text}.
Can you tell {to} that {text}?
Send {to} a text saying {text}.
New message for {to}: {text}.

Drop {to} a line saying {text}.
Inform {to} that {text}.

{to} should hear from me that {text}.
Could you pass on to {to} that {text}?
I want {to} to know that {text}.
Give {to} this note: {text}.""",
             "play_music": """
Play something by {artist}.
Play {song} by {artist}.
Put on {artist}.
I want to hear {song} by {artist}.
Play some music by {artist}, please.
Can you put on {song} by {artist}?
Start the song {song} by {artist}.
I would like to listen to {artist}.
Let me hear {artist} with {song}.

Turn on some songs by {artist}.
Please play me {song} from {artist}.

I am in the mood for {artist}.
Could we have {song} by {artist} now?
Let us dance to {song}, the one by {artist}.
How about a few tunes from {artist}?""",
             "get_weather": """
What is the weather in {city}?
What will the weather be like in {city} {day}?
Will it rain in {city} {day}?
How warm is it in {city}?
Give me the forecast for {city} {day}.
Is it sunny in {city}?
Weather in {city} {day}, please.
Tell me the weather for {city}.
Does it snow in {city} {day}?

How is the weather over in {city}?
Show me the forecast for {city} {day}.

Do I need an umbrella in {city} {day}?
Is it cold outside in {city}?
Can I expect sunshine in {city} {day}?
I am off to {city}, should I take a coat?""",
             "book_table": """
Book a table for {people} at {restaurant} at {time}.
Reserve a table for {people} people at {restaurant} {day} at {time}.
I need a table for {people} at {restaurant} {day} at {time}.
Get us a table at {restaurant} at {time}, we are {people}.
Table for {people} at {restaurant}, {time}, please.
Can you book {restaurant} for {people} people {day} at {time}?
Please reserve {restaurant} at {time} for {people} people.
Make a reservation for {people} at {restaurant} {day} at {time}.
We are {people} and want to eat at {restaurant} at {time}.

Find {people} seats at {restaurant} for {time}.
Please hold a table for {people} at {restaurant} {day} at {time}.

Dinner for {people} at {restaurant} {day} at {time}, please reserve.
Could {people} of us eat at {restaurant} at {time}?
See that {restaurant} has {people} places for us {day} at {time}.
I am taking friends to {restaurant} at {time}, {people} of us in all.""",
             "convert": """
Convert {money} to {to}.
How much is {money} in {to}?
What is {money} in {to}?
Change {money} into {to}.
Please convert {money} into {to}.
How many {to} are {money}?
I have {money}, what is that in {to}?
Can you turn {money} into {to}?
Give me the value of {money} in {to}.

Express {money} in {to}.
How many {to} do I get for {money}?

What would {money} be worth in {to}?
It costs {money}, so how much is that in {to}?
I want to swap {money} for {to}.
If I pay with {money}, how many {to} is that?""",
             "add_event": """
Add {title} to my calendar {day} at {time}.
Put {title} in my calendar {day} at {time}.
Schedule {title} {day} at {time}.
I have {title} {day} at {time}.
Please add {title} at {time} {day}.
Create an event: {title} {day} at {time}.
Can you schedule {title} {day} at {time}?
Note {title} {day} at {time}.
There is {title} {day} at {time}, please add it.

Enter {title} in my schedule {day} at {time}.
Please plan {title} for me {day} at {time}.

Save the date: {title} {day} at {time}.
Could you mark {title} {day} at {time}?
Keep {time} {day} free for {title}.
My diary needs {title} {day} at {time}.""",
             "navigate": """
Take me to {place}.
Navigate to {place} {by}.
How do I get to {place}?
Show me the way to {place} {by}.
I want to go to {place} {by}.
Directions to {place}, please.
Find a route to {place} {by}.
Can you guide me to {place}?
How do I get to {place} {by}?

Lead me to {place}.
What is the best route to {place} {by}?

Which way is {place}?
I am going {by} to {place}, which way is it?
Could you bring me to {place}?
What is the fastest way {by} to {place}?"""}
PHRASINGS = {tool: dict(zip(PARTS, (block.split("\n") for block in text.strip().split("\n\n"))))
             for tool, text in PHRASINGS.items()}

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
BY = {"on foot": "foot", "by bike": "bike", "by car": "car", "by bus": "bus", "by train": "train"}
CURRENCIES = {"dollars": "USD", "euros": "EUR", "pounds": "GBP", "yen": "JPY", "francs": "CHF",
              "rupees": "INR", "yuan": "CNY", "won": "KRW", "pesos": "MXN", "zloty": "PLN"}
NAMES = {code: name for name, code in CURRENCIES.items()}
SIGNS = {"dollars": "$", "euros": "€", "pounds": "£"}
HOURS = {"set_alarm": range(5, 24), "book_table": range(17, 22), "add_event": range(8, 21)}


def _listed(text):
    return [value.strip() for value in text.split(",")]


# Every value there is. Of five, three go to training, one to validation, one to the test.
VALUES = {
    # From 12 to 1 there is no time: people disagree on what 12 am is.
    "time": [(hour, minute) for hour in range(5, 23) if hour != 12 for minute in range(0, 60, 5)],
    "day": ["today", "tomorrow", *WEEKDAYS, *(f"next {day}" for day in WEEKDAYS)],
    "date": [(month, day) for month in range(1, 13) for day in range(1, 29)],
    "minutes": [*range(2, 30), *range(30, 180, 5)],
    "people": list(range(2, 17)),
    "amount": [*range(3, 100), *range(100, 1000, 10)],
    "currencies": [(a, b) for a in CURRENCIES for b in CURRENCIES if a != b],
    "to": _listed("""Ada, Anna, Ben, Carla, Daniel, Elena, Farid, Grace, Hugo, Ines, Ivan, Julia,
        Karl, Lena, Liam, Maria, Maya, Nadia, Nora, Olga, Omar, Paula, Peter, Priya, Ravi, Rosa,
        Sam, Sofia, Tariq, Tom, Uma, Victor, Wei, Yusuf, Zoe, Amir, Bruno, Clara, Felix, Mina"""),
    "text": _listed("""I will be late, dinner is ready, the train is delayed, I am on my way,
        the meeting is cancelled, we won the game, the keys are under the mat, I found the book,
        the car is fixed, lunch is on me, the door is open, I passed the exam, the cat is fine,
        we need more milk, the plumber is here, I lost my phone, the show starts soon,
        she got the job, the baby is asleep, my flight has landed, the parcel has arrived,
        I cannot come, the dog needs a walk, we are at the beach, he forgot his coat,
        the shop is closed, I miss you, the report is done, the bus is full, it is snowing here,
        I am at the office, the tickets are sold out, the soup was great, we moved the sofa,
        the wifi is down"""),
    "artist": _listed("""Copper Foxes, Nina Vale, Night Ferries, Oscar Lund, Paper Tigers,
        Mara Quinn, Slow Clocks, Jonah Reed, Velvet Owls, Silver Canyon, Tess Holloway,
        Brass Monkeys, Leo Marchetti, Cold Harbor, Lost Umbrellas, Ruby Santos,
        Iron Daisies, Theo Blake, Glass Mountain, Wild Pianos, Ella Strand, Dust and Honey,
        Quiet Riots, Max Okoro, Northern Lanterns, Tin Soldiers, Iris Kane, Blue Corridor,
        Early Birds, Sander Holm"""),
    "song": _listed("""Paper Boats, Midnight Rain, Golden Road, Open Windows, The Last Dance,
        Silver Line, Falling Leaves, Seven Bridges, Sugar and Salt, Empty Streets, Long Way Home,
        Summer Letters, Cold Coffee, Stay Tonight, River of Stars, Broken Compass, Dancing Alone,
        Red Balloon, Under the Ice, Hello Stranger, Lemon Tree Lane, Wooden Heart, Slow Motion,
        Ten Thousand Miles, Velvet Sky, Morning Train, Ghost Town, Sleepless, Wild Flowers,
        Burning Maps"""),
    "city": _listed("""Paris, London, Tokyo, Madrid, Chicago, Berlin, Cairo, Oslo, Toronto, Vienna,
        Boston, Rome, Sydney, Lisbon, Mumbai, Dublin, Seattle, Prague, Nairobi, Helsinki, Denver,
        Athens, Seoul, Lima, Budapest, Miami, Zurich, Istanbul, Glasgow, Bangkok, Dallas, Hamburg,
        Lagos, Warsaw, Montreal, Naples, Osaka, Porto, Geneva, Santiago"""),
    "restaurant": _listed("""Blue Lantern, Casa Verde, The Old Mill, Golden Dragon, Chez Margot,
        Luigi's, Spice Garden, The Green Door, Sakura House, La Paloma, Harbor Grill, Bella Roma,
        The Copper Pot, Taj Palace, Olive Branch, Rosie's Diner, El Toro, The White Swan,
        Bamboo Court, Petit Jardin, Salt and Pepper, Corner Bistro, Red Pepper, Mama Lucia,
        The Fisherman, Saffron, Alpenhof, Lucky Noodle, The Garden Room, Casa Pepe"""),
    "title": _listed("""dentist appointment, team meeting, piano lesson, birthday party,
        haircut, job interview, tennis match, doctor visit, yoga class, staff outing, board meeting,
        school concert, swimming lesson, eye test, video call, house viewing, dance class,
        car service, book club meeting, chess game, farewell party, parents' meeting,
        phone interview, guitar lesson, wedding rehearsal, cooking class, budget review,
        football match, museum tour, garden party, choir practice session, bank appointment,
        project review, flu shot, theater visit"""),
    "label": _listed("""pasta, rice, bread, soup, cake, pizza, muffins, tea, stew, pie, lasagna,
        oatmeal, roast, beans, chicken, fish, quiche, curry, chili, salmon, lentil soup, risotto,
        ham, turkey, pudding"""),
    "place": _listed("""Central Station, City Hall, Lincoln Park, 14 Elm Street, Grand Hotel,
        Riverside Mall, 27 Oak Avenue, Union Square, Saint Mary Hospital, 8 Mill Lane,
        Victoria Bridge, Market Square, 112 Park Road, Northgate School, Ocean Beach, Kings Cross,
        55 Maple Drive, Liberty Stadium, Hillside Library, 3 Station Road, Castle Museum,
        East Harbor, 61 Cedar Street, Botanic Garden, Queens Theater, Westfield Airport,
        40 Church Street, Lakeside Campground, Memorial Church, 9 Bridge Street"""),
}


def _share(values, part):
    return [value for i, value in enumerate(values)
            if ("train", "train", "train", "validation", "test")[i % 5] == part]


VALUES = {slot: {part: _share(values, part) for part in PARTS} for slot, values in VALUES.items()}


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
    """`k` requests of training and their calls, to stand between system's message and request."""
    return [message for chat in chats(k, f"few {seed}") for message in chat[1:]]


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
