"""
The seeds of make_weights.py: openings and plots of stories, and beginnings of what users ask. Words and templates, combined at
random, all written for this; SmolLM2 tells the stories along the plots, and writes what users ask. No data set was used.
"""
import re
from pathlib import Path
from typing import NamedTuple

# ---- Stories

GIRLS = """
Lily Mia Anna Sara Lucy Emma Zoe Rosie Ella Ruby Molly Nora Ivy Clara Poppy Grace Daisy Hazel Bella Amy Luna Kate Alice Olive Sophie
Maya Nina Tina Lola Holly Penny Fiona Greta Heidi Iris Julia Kitty Lena Maggie Nelly Olga Paula Rita Stella Tilly Wendy Willow Zara
""".split()
BOYS = """
Tom Ben Max Leo Sam Jack Tim Finn Noah Oscar Toby Hugo Felix Theo Milo Jasper Owen Charlie Pip Eli Fred Peter Adam Bobby Carl Danny
Emil Frank George Harry Ian Jonas Kevin Luke Martin Nick Otto Paul Robin Simon Teddy Victor Walter Arthur Bruno Dennis Gus Henry
""".split()
NAMES = GIRLS + BOYS
ANIMALS = """
fox rabbit bear mouse cat dog duck frog pig lamb pony squirrel hedgehog turtle monkey penguin puppy goat hen deer robot beaver otter
badger koala panda raccoon donkey hamster sheep parrot crow sparrow chick goose mole dragon zebra camel
""".split()
TRAITS = """
little small kind brave shy happy clever curious lazy quiet funny gentle hungry sleepy silly young polite careful strong
playful cheerful friendly busy patient lively merry dreamy stubborn noisy calm proud bold tiny helpful thoughtful
""".split()
PLACES = (
    "in the forest", "by the river", "in a small village", "on a farm", "near the sea", "in a big garden", "by a deep well",
    "on a green hill", "in a little house", "by the lake", "in a quiet town", "at the edge of the woods", "in a wooden hut",
    "by a tall tree", "in a cozy cottage", "near a waterfall", "next to a school", "by the pond", "in a green valley",
    "at the end of a long road", "near an old bridge", "behind the mountains", "near a windmill", "next to a bakery",
    "at the foot of a mountain", "in a sunny meadow", "on a small island", "by an apple orchard", "near a castle",
    "between two rivers", "under a big oak", "in the middle of a big city", "near the train station", "next to a church")
THINGS = {
    "toy": "toy car, toy train, doll, teddy bear, kite, drum, toy robot, wooden horse, toy boat, toy truck, puppet, music "
        "box, rag doll, toy rocket, toy tractor, stuffed elephant, toy castle",
    "food": "cake, apple pie, sandwich, pizza, cherry cake, loaf of bread, pumpkin pie, big pancake, carrot cake, berry "
        "pie, cheese sandwich, waffle, peach tart, lemon cake",
    "breakable": "blue vase, teapot, big plate, flower pot, white bowl, red cup, jar, little glass, mirror, lamp, candle "
        "holder, china bowl, picture frame",
    "flying": "kite, red balloon, paper plane, yellow balloon, blue hat, toy plane, scarf, green balloon, straw hat, "
        "feather, paper bird",
    "plant": "sunflower, red flower, rose bush, blue flower, bean plant, tulip, yellow flower, daisy, lily, tomato plant, "
        "pumpkin",
    "skill": "ride a bike, climb a tree, skate, jump rope, dance, ski, do a cartwheel, swim, walk on a rope, ride a pony, "
        "whistle, juggle, paint, catch a ball, count to a hundred, row a boat",
    "treasure": "golden ring, silver bell, necklace, shiny key, gold coin, little watch, music box, silver spoon, red "
        "ribbon, pearl, blue marble, brass compass, bracelet",
    "fruit": "apples, pears, plums, cherries, peaches, oranges, nuts, figs, lemons, apricots, mangos",
    "float": "toy boat, paper boat, little ship, wooden duck, little raft, wooden boat, toy sailboat, bark boat",
    "hot": "apple pie, cherry pie, loaf of bread, chocolate cake, pumpkin pie, pizza, plum cake, potato pie",
    "music": "drum, trumpet, flute, violin, horn, guitar, tuba, banjo, whistle",
    "built": "tower of blocks, sand castle, little house of sticks, castle of blocks, stone tower, toy village, fort, "
        "castle of mud, tower of cups, bridge of sticks, palace of sand",
    "sweets": "cookies, candies, chocolate cookies, honey cookies, lemon drops, little cakes, muffins, donuts, caramels, "
        "cupcakes",
    "newfood": "pumpkin soup, spinach, tomato soup, broccoli, rice pudding, onion soup, mushroom soup, vegetable stew, bean "
        "soup, cabbage, fish soup"}
# How a story begins: with whom it is about, or with the day on which it happens. {N} is the hero, a {A} {B}; {O} is a brother
# or sister, {brothers}; {he} {his} {him} are the hero's pronouns.
OPENINGS = """
Once upon a time, there was a {A} {B} named {N}. {N} lived {P}.
Once upon a time, {P}, there lived a {A} {B} named {N}.
Once upon a time, there was a {A} {B} named {N}.
Once upon a time, there was a {B} named {N}. {He} was very {A}.
Once upon a time, {N} the {B} lived {P}.
Once upon a time, there lived a {A} {B}. {His} name was {N}.
Once upon a time, a {A} {B} lived {P}. {His} name was {N}.
Once upon a time, in a land far away, there was a {A} {B} named {N}.
Once upon a time, there were two {brothers} named {N} and {O}. {N} was the {A} one.
Once upon a time, there was a {A} {B} who lived {P} with {his} mom. {His} name was {N}.
There was once a {A} {B} named {N} who lived {P}.
There once was a {B} called {N}. {He} was very {A}.
There was a {B} named {N}. {He} lived {P}.
There was a {A} {B} called {N}.
There lived a {A} {B} {P}. {His} name was {N}.
Once there was a {A} {B} called {N}. {He} liked to play {P}.
Once, {P}, there was a {A} {B} named {N}.
Long ago, a {A} {B} named {N} lived {P}.
Long ago, {P}, lived a {A} {B} named {N}.
Long, long ago, there was a {A} {B} named {N}.
A long time ago, there was a {B} named {N}. {He} lived {P}.
Many years ago, a {A} {B} named {N} lived {P}.
Far, far away, {P}, lived a {A} {B} named {N}.
Far away, {P}, there lived a {B} named {N}. {He} was very {A}.
In a land far away, there was a {A} {B} named {N}.
Not far from here, {P}, lived a {B} named {N}.
In a small village, there lived a {A} {B} named {N}.
In a big forest, there was a {A} {B} called {N}.
In a little town by the sea, there lived a {B} named {N}.
In the middle of a green forest lived {N}, a {A} {B}.
Deep in the forest, there lived a {A} {B} named {N}.
Behind seven hills, {P}, lived a {A} {B} named {N}.
On a green hill, there was a little house. A {A} {B} named {N} lived there.
At the end of the road, there was a small house. There lived {N}, a {A} {B}.
By a blue lake, there lived a {B} named {N} who was very {A}.
Near the big woods lived a {A} {B}. {His} name was {N}.
High up on a hill lived a {A} {B} named {N}.
Somewhere {P}, there lived a {A} {B} named {N}.
Have you heard of {N}? {He} was a {A} {B} who lived {P}.
Do you know {N} the {B}? {He} lived {P}, and {he} was very {A}.
Let me tell you a story about {N}. {He} was a {A} {B}.
I know a story about a {A} {B} named {N}.
I will tell you about a {B} named {N}. {He} lived {P}.
I once knew a {A} {B}. {His} name was {N}.
This is the story of {N}, a {A} {B}.
This is a story about a {B} named {N}. {He} was {A}, and {he} lived {P}.
Here is a story about a {A} {B} named {N}.
Listen, and I will tell you about {N}, a {A} {B}.
My friend {N} was a {A} {B}. {He} lived {P}.
Hello! This is a story about a {A} {B} named {N}.
Hello! Do you want to hear a story about {N} the {B}? {He} lived {P}.
Hello, children! Today I will tell you about a {A} {B} named {N}.
"Hello! My name is {N}," said the {A} {B}. {N} lived {P}.
"Hello," said a {A} {B}. "I am {N}." {He} lived {P}.
Hi! Do you know {N}? {He} was a {A} {B}.
"Who are you?" asked the old owl. "I am {N}," said the {A} {B}.
{N} was a {A} {B} who lived {P}.
{N} was a {A} {B}.
{N} was a {B}. {He} was very {A}, and {he} lived {P}.
{N} the {B} was very {A}. {He} lived {P}.
{N} the {B} lived {P}.
{N} lived {P}. {He} was a {A} {B}.
{N} and {his} mom lived {P}. {N} was a {A} {B}.
{N} liked to play {P}. {He} was a {A} {B}.
A {A} {B} named {N} lived {P}.
A {B} named {N} lived {P}. {He} was very {A}.
The {A} {B} {N} lived {P}.
The {B} {P} was called {N}. {He} was very {A}.
Everyone {P} knew {N}, the {A} {B}.
Everybody loved {N}. {He} was a {A} {B} who lived {P}.
Two {brothers} lived {P}. They were called {N} and {O}. {N} was the {A} one.
Two {brothers}, {N} and {O}, lived {P}. This is the story of {N}.
Two little {brothers} lived with their mom {P}. One of them was called {N}.
Two friends lived {P}. One of them was a {A} {B} named {N}.
Two children lived {P}. One of them was called {N}.
Three {brothers} lived {P}. The smallest one was called {N}.
Mom had a {A} little {B}. {His} name was {N}.
Mom and {N} lived {P}. {N} was a {A} {B}.
""".strip().split("\n")
DAYS = """
One day, a {A} {B} named {N} woke up early.
One day, a {B} named {N} was playing {P}.
One day, a {B} was playing {P}. {His} name was {N}.
One day, {N} the {B} went for a walk. {He} lived {P}.
One day, there was a {A} {B} {P}. {His} name was {N}.
One day, {N} and {his} {brother} {O} were playing {P}. {N} was a {A} {B}.
One morning, {N} woke up and looked out of the window.
One morning, {N} the {B} woke up and ran outside.
One morning, a {A} {B} named {N} sat {P}.
One sunny day, {N} the {B} was playing {P}.
One sunny morning, a {A} {B} named {N} ran outside.
It was a sunny day. {N} the {B} was playing {P}.
It was a sunny day, and a {A} {B} named {N} was outside.
It was a beautiful morning. {N}, a {A} {B}, woke up {P}.
It was a nice day {P}. A {A} {B} named {N} was outside.
It was early in the morning. {N} the {B} was already awake.
The sun was shining. A {A} {B} named {N} was playing {P}.
The sun came up {P}. {N} the {B} opened {his} eyes.
The birds were singing. {N} the {B} woke up and smiled.
On a sunny day, {N} the {B} was playing {P}.
Early one morning, a {A} {B} named {N} woke up.
Mom opened the door. "Good morning, {N}," she said to the {A} {B}.
"Good morning, {N}!" said {his} mom. {N} was a {A} {B}.
"Wake up, {N}!" called {his} mom. {N} was a {A} {B} who lived {P}.
"Hello, {N}!" said the old owl. "Good morning," said {N}, the {A} {B}.
"Mom, can I go out and play?" asked {N}. {He} was a {A} {B}. "Yes, {N}," said {his} mom.
""".strip().split("\n")
QUESTIONS = (
    "Tell me a story about a {B}.", "Can you tell me a story about a {B} named {N}?", "What happened to {N} the {B}?",
    "Please tell me a short story about a {A} {B}.", "Do you know a story about a {B} and a {C}?", "Tell me a story, please.")
# A block a plot: "kind of THINGS: summary", then the parts of the story, a line each: wordings to choose from between " / ", of
# which each goes with all of the next part. {F} is a friend, a {C}, with the pronouns {fhe} {fhis} {fhim}; {T} is the thing.
PLOTS = [block.split("\n") for block in (Path(__file__).parent / "prompts/story_plots.txt").read_text().strip().split("\n\n")]


class Plot(NamedTuple):
    """One story to tell."""
    ask: str                            # for a model that takes instructions
    question: str                       # a short one, for the model that is to learn from the story
    opening: str                        # the story's beginning
    parts: list                         # how it goes on: for each part its wordings, each with a space in front


def cast(rng, kind="none"):
    """Who and what a story is about, by the names that the templates have for it."""
    (he, name), (other, friend) = (rng.choice([("he", BOYS), ("she", GIRLS)]) for _ in range(2))
    being = lambda he: rng.choice(ANIMALS) if rng.random() < 0.7 else "boy" if he == "he" else "girl"
    N, F, O = rng.choice(name), rng.choice(friend), rng.choice(name)
    while len({N, F, O}) < 3:
        F, O = rng.choice(friend), rng.choice(name)
    words = dict(N=N, F=F, O=O, A=rng.choice(TRAITS), B=being(he), C=being(other), P=rng.choice(PLACES),
                 T=rng.choice(THINGS.get(kind, "").split(", ")), brother="brother" if he == "he" else "sister")
    while words["B"] == words["C"]:
        words["C"] = rng.choice(ANIMALS)
    words["brothers"] = words["brother"] + "s"
    for key, who in ("", he), ("f", other):
        for form, female in ("he", "she"), ("his", "her"), ("him", "her"), ("himself", "herself"):
            word = form if who == "he" else female
            words |= {key + form: word, key + form.capitalize(): word.capitalize()}
    return words


def fill(text, words):
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.format(**words))
    return re.sub(r"(^|[.!?] \"?)([a-z])", lambda found: found[1] + found[2].upper(), text)


def opening(rng, words=None):
    """The first sentences of a story."""
    return fill(rng.choice(OPENINGS + DAYS), words or cast(rng))


def plot(rng):
    """One of prompts/story_plots.txt, filled in."""
    (head, *lines), begin = rng.choice(PLOTS), rng.choice(OPENINGS + DAYS)
    kind, summary = head.split(": ", 1)
    words = cast(rng, kind)
    parts = [line.split(" / ") for line in lines]
    if begin in DAYS:                                                       # then the plot can't begin with "One day", too
        for pattern, instead in ("One day, ", ""), ("One night, ", "That night, "), (r"One (?:\w+ )?(\w+), ", r"The next \1, "):
            parts[0] = [re.sub("^" + pattern, instead, wording) for wording in parts[0]]
    return Plot(fill("Write a story for young children about a {A} {B} named {N}. In the story, " + summary +
                     ". Use short sentences and simple words.", words), fill(rng.choice(QUESTIONS), words), fill(begin, words),
                [[" " + fill(wording, words) for wording in part] for part in parts])


# ---- What users ask

VERBS = """
count find remove sort get check is sum filter reverse compute merge split convert max min has make add
largest next unique common even odd prime string list digit longest smallest
""".split()
NOUNS = """
numbers words letters digits elements list string vowels pairs primes characters sum product values
positive duplicates prefix index average difference sequence palindrome brackets matrix numbers_in_list
""".split()
ARGUMENTS = (
    "numbers: List[int]) -> int", "numbers: List[float]) -> float", "string: str) -> str", "n: int) -> int",
    "lst)", "text: str) -> bool", "strings: List[str]) -> List[str]", "a: int, b: int) -> int", "s)", "n)",
    "arr, k)", "x, y)", "words)", "numbers: List[int]) -> List[int]", "string: str) -> int",
    "string: str, n: int) -> bool")
DOCS = (
    "", "", " ", " Return", " Given", " Check if", " You are given", " Write a function that", " Find",
    " For a given", " Input", "\n    Given a", "\n    Return", "\n    You're given", "\n    Create a function",
    "\n    This function takes", "\n    Write a function")
SUMS = (
    "{name} has {n}", "{name} bought {n}", "{name} sells", "{name} is", "{name} earns ${n}", "{name} wants to",
    "{name} reads", "A store", "A train", "A farmer has {n}", "There are {n}", "In a class of {n}", "If {name}",
    "{name} and {other}", "At the", "{name} spends", "{name} works {n} hours", "{name} makes", "{name}'s",
    "A pack of", "{n} people", "Each", "{name} runs {n} miles", "{name} is {n} years old", "{name} had ${n}",
    "{name} gave {other} {n}", "{name} needs", "On Monday, {name}", "The price of")
ASKED = (
    "Write", "Compose", "Draft an email", "Imagine you are", "Describe", "Explain", "What is", "What are", "How",
    "Why", "Could you", "Can you", "Please", "Pretend to be", "Act as", "You are", "Suppose", "Write a Python",
    "Write a C++ program", "Implement", "Given", "Extract", "Read the", "Evaluate the following", "Identify",
    "Summarize", "Compare", "In the", "Help me", "Edit the", "Write a short story", "Write a poem",
    "Write a blog post", "Create a", "Design a", "Develop", "Discuss", "Analyze", "Which", "Let's", "If", "Solve",
    "Find the", "Calculate", "A", "Translate", "Provide", "Tell me", "Who", "Now you are", "List", "Give me",
    "Think about", "The", "Consider", "Assume", "Write a persuasive", "Rewrite", "What would", "Is it", "Rate",
    "Construct", "Embody")


def beginnings(rng):
    """Endless beginnings of user turns: free, general, code stubs, code requests, sums."""
    while True:
        n = rng.choice([rng.randint(2, 20), rng.randint(10, 100), 1000])
        words = dict(name=rng.choice(NAMES), other=rng.choice(NAMES), n=n)
        verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
        name = f"{verb}_{noun}"
        examples = f" {verb.capitalize()} the {noun.replace('_', ' ')} and return the result.\n    >>> {name}("
        imports = rng.choice(["from typing import List\n\n\n", "\n", "", "\n\n", "import math\n\n\n"])
        kind = rng.random()
        if kind < 0.08:
            yield ""
        elif kind < 0.3:
            yield rng.choice(ASKED)
        elif kind < 0.63:
            yield f'{imports}def {name}({rng.choice(ARGUMENTS)}:\n    """{rng.choice([*DOCS, *[examples] * 6])}'
        elif kind < 0.68:
            yield rng.choice(("Write a Python function that", "Write a Python function to", "Write a Python program",
                              "Create a function"))
        else:
            yield rng.choice(SUMS).format(**words)
