"""What people say in the requests of `lora_lib.calls`: the phrasings and the values, by part.

A change here changes the requests that the committed sweep was measured on.
"""

PARTS = ("train", "validation", "test")
# The phrasings of each tool: those of training, of validation, and of the test.
TEXTS = {
    "set_alarm": """
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
What is the fastest way {by} to {place}?""",
}
PHRASINGS = {tool: dict(zip(PARTS, (block.split("\n") for block in text.strip().split("\n\n"))))
             for tool, text in TEXTS.items()}

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
