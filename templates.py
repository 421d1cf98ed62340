"""
The seeds of make_weights.py: plots of stories, and beginnings of what users ask. Words and templates, combined at random, all
written for this; SmolLM2 writes what users ask, and a sentence here and there in the stories. Nothing is taken from a data set.
"""
import re
from pathlib import Path
from typing import NamedTuple

# ---- Stories

GIRLS = "Lily Mia Anna Sara Lucy Emma Zoe Rosie Ella Ruby Molly Nora Ivy Clara Poppy Grace Daisy Hazel Bella Amy Luna Kate".split()
BOYS = "Tom Ben Max Leo Sam Jack Tim Finn Noah Oscar Toby Hugo Felix Theo Milo Jasper Owen Charlie Pip Eli Fred Peter".split()
NAMES = GIRLS + BOYS
ANIMALS = """
fox rabbit bear mouse cat dog duck frog pig lamb pony squirrel hedgehog turtle monkey penguin puppy goat hen deer robot
""".split()
STRANGE = {*ANIMALS, *"""
boy girl man woman king queen prince princess lion tiger elephant whale dragon monster wolf he him his himself she her herself
""".split()}
PLAIN = {*"""
a the and so but was were is had felt very too of in on at to with it he she they his her him them their all up down out again soon
sun sky wind soft blew blow through trees tree shone shining shine bright brightly blue dark gray white clouds cloud warm cool cold
day night morning evening birds bird sang sing singing song flew air leaves grass flowers green full stars moon quiet still
sad happy scared afraid worried glad proud tired hungry lonely angry excited surprised better alone smiled smile heart big little
beating fast could not hardly wait know what do say nothing for while long as there be did didn see saw look looked went walked ran
sat stood home house friend friends mom water eat play played together thing place way time both one never seen before today now
then here love loved like liked wanted want go come came made make good very much more so all
""".split()}
TRAITS = """
little small old kind brave shy happy clever curious lazy quiet funny gentle hungry sleepy silly young polite careful strong
playful cheerful friendly
""".split()
PLACES = (
    "in the forest", "by the river", "in a small village", "on a farm", "near the sea", "in a big garden",
    "on a green hill", "in a little house", "by the lake", "in a quiet town", "at the edge of the woods",
    "by a tall tree", "in a cozy cottage", "near a waterfall", "next to a school", "by the pond", "in a green valley",
    "at the end of a long road", "near an old bridge")
THINGS = {
    "toy": "toy car, toy train, doll, teddy bear, kite, drum, toy robot, wooden horse, toy boat, toy truck, puppet, music box",
    "food": "cake, apple pie, sandwich, pizza, cherry cake, loaf of bread, pumpkin pie, big pancake, carrot cake, berry pie",
    "breakable": "blue vase, teapot, big plate, flower pot, white bowl, red cup, jar, little glass, mirror",
    "flying": "kite, red balloon, paper plane, yellow balloon, blue hat, toy plane, scarf, green balloon",
    "plant": "sunflower, red flower, rose bush, blue flower, bean plant, tulip, yellow flower",
    "skill": "ride a bike, climb a tree, skate, jump rope, dance, ski, do a cartwheel, swim, walk on a rope, ride a pony",
    "treasure": "golden ring, silver bell, necklace, shiny key, gold coin, little watch, music box, silver spoon, red ribbon",
    "fruit": "apples, pears, plums, cherries, peaches, oranges, nuts",
    "float": "toy boat, paper boat, little ship, wooden duck, little raft, wooden boat",
    "hot": "apple pie, cherry pie, loaf of bread, chocolate cake, pumpkin pie, pizza, plum cake",
    "music": "drum, trumpet, flute, violin, horn, guitar",
    "built": "tower of blocks, sand castle, little house of sticks, castle of blocks, stone tower, toy village, fort",
    "sweets": "cookies, candies, chocolate cookies, honey cookies, lemon drops, little cakes",
    "newfood": "pumpkin soup, spinach, tomato soup, broccoli, rice pudding, onion soup, mushroom soup, vegetable stew"}
OPENINGS = (
    "Once upon a time, there was a {A} {B} named {N}. {N} lived {P}.", "Once upon a time, {P}, there lived a {A} {B} named {N}.",
    "Once upon a time, there was a {A} {B} named {N}.", "Once upon a time, {N} the {B} lived {P}.",
    "There was once a {A} {B} named {N} who lived {P}.", "{N} was a {A} {B} who lived {P}.", "There was a {B} named {N}.",
    "Once there was a {A} {B} called {N}. {he} liked to play {P}.", "Long ago, a {A} {B} named {N} lived {P}.",
    "Not far from here, {P}, lived a {B} named {N}.", "{N} the {B} was very {A}. {he} lived {P}.", "{N} was a {A} {B}.",
    "One day, a {A} {B} named {N} woke up early.", "One day, a {B} named {N} was playing {P}.", "A {A} {B} named {N} lived {P}.",
    "Two friends lived {P}. One of them was a {B} named {N}.", "Two children lived {P}. One of them was called {N}.",
    "One morning, {N} woke up and looked out of the window.", "One morning, {N} the {B} woke up and ran outside.",
    "It was a sunny day. {N} the {B} was playing {P}.", "Long ago, {P}, lived a {A} {B} named {N}.",
    "One day, {N} the {B} went for a walk. {he} lived {P}.", "")
STEMS = (                               # of sentences that fit in nearly anywhere
    "The sun", "The sky", "A soft wind", "The birds", "{N} felt", "{N} was so", "{N} smiled", "{He} was", "{N} looked")
QUESTIONS = (
    "Tell me a story about a {B}.", "Can you tell me a story about a {B} named {N}?", "What happened to {N} the {B}?",
    "Please tell me a short story about a {A} {B}.", "Do you know a story about a {B} and a {C}?", "Tell me a story, please.")
# A block a plot: "kind of THINGS: summary", then the parts of the story, a line each: wordings to choose from between " / ", and a ~
# at the end where the model may add a sentence. {N} is the hero, {F} a friend (a {C}), {he} {his} {him} and {fhe} ... their pronouns.
PLOTS = [block.split("\n") for block in (Path(__file__).parent / "prompts/story_plots.txt").read_text().strip().split("\n\n")]


class Plot(NamedTuple):
    """What steers the sampling of one story."""
    ask: str                            # for a model that takes instructions
    question: str                       # a short one, for the model that is to learn from the story
    opening: str                        # the story's beginning
    stems: list                         # how the sentence begins that the model adds before each cue; "" leaves it free
    cues: list                          # how the story goes on after each of them
    names: set                          # who may have a name in it
    strange: set                        # words that it must not hold: beings and pronouns that belong to nobody in it


def plot(rng, own=1.0):
    """One of prompts/story_plots.txt, filled in; a sentence by the model goes to `own` of the places that allow one (~)."""
    head, *parts = rng.choice(PLOTS)
    kind, summary = head.split(": ", 1)
    (he, name), (other, friend) = (rng.choice([("he", BOYS), ("she", GIRLS)]) for _ in range(2))
    being = lambda he: rng.choice(ANIMALS) if rng.random() < 0.7 else "boy" if he == "he" else "girl"
    words = dict(N=rng.choice(name), F=rng.choice(friend), A=rng.choice(TRAITS), B=being(he), C=being(other),
                 P=rng.choice(PLACES), T=rng.choice(THINGS.get(kind, "").split(", ")))
    while words["F"] == words["N"] or words["B"] == words["C"]:
        words |= dict(F=rng.choice(friend), C=rng.choice(ANIMALS))
    for key, who in ("", he), ("f", other):
        for form, female in ("he", "she"), ("his", "her"), ("him", "her"), ("himself", "herself"):
            word = form if who == "he" else female
            words |= {key + form: word, key + form.capitalize(): word.capitalize()}

    def fill(text):
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.format(**words))
        return re.sub(r"(^|[.!?] \"?)([a-z])", lambda found: found[1] + found[2].upper(), text)
    opening, cues, stems = rng.choice(OPENINGS), [""], []
    for i, part in enumerate(parts):
        choices = part.removesuffix(" ~").split(" / ")
        if i == 0 and not opening:                                          # then this part must say who it is about
            choices = [text for text in choices if "{N}" in text] or ["Once upon a time, there was a {A} {B} named {N}. " + choices[0]]
        text = rng.choice(choices)
        if i == 0 and opening.startswith("One "):
            text = re.sub("^One [a-z ]+, ", "", text)
        cues[-1] += " " + fill(text)
        if part.endswith("~") and rng.random() < own or len(cues) == 1 and i == len(parts) - 2:
            stems.append(" " + fill(rng.choice(STEMS)) if rng.random() < 0.6 else "")
            cues.append("")
    opening = (fill(opening) + cues[0]).strip()
    used = set(re.findall(r"[a-z]+", " ".join([opening, *cues]).lower()))
    return Plot(fill("Write a story for young children about a {A} {B} named {N}. In the story, " + summary +
                     ". Use short sentences and simple words."),
                fill(rng.choice(QUESTIONS)), opening, stems, cues[1:], {words["N"], words["F"]}, STRANGE - used)


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
