"""
The seeds of make_weights.py: plots of stories, and beginnings of what users ask. Words and templates, combined at random;
SmolLM2 writes all the rest. Nothing here is taken from a data set.
"""
import re

# ---- Stories

NAMES = """
Lily Tom Mia Ben Anna Max Sara Leo Lucy Sam Emma Jack Zoe Tim Rosie Finn Ella Noah Ruby Oscar Molly Toby
Nora Hugo Ivy Felix Clara Theo Poppy Milo Grace Jasper Daisy Owen Hazel Bella Charlie Amy Pip Luna Eli
Rose Henry Kate Will Jane Fred Alice Peter Sally Billy Susie Jill Mark Nina Paul Tina Roy Olive Dan Beth Joe Meg
""".split()
BEINGS = """
boy girl fox rabbit bear mouse cat dog duck frog owl pig lamb pony squirrel hedgehog turtle bird
elephant lion monkey robot dragon bee penguin kitten puppy goat hen deer fish snail crab ant fairy prince princess sheep
horse whale tiger parrot butterfly
""".split()
TRAITS = """
little small kind brave shy happy clever curious lazy quiet funny gentle hungry sleepy silly young polite careful strong
playful grumpy fast proud
""".split()
FEELINGS = """
sad worried scared angry lonely tired surprised upset confused nervous sorry
""".split()
THINGS = (
    "ball", "red balloon", "shiny key", "blue hat", "toy car", "kite", "book", "small boat", "golden coin", "lamp",
    "flower", "drum", "basket of apples", "warm blanket", "bell", "cake", "toy train", "pretty stone", "wooden box",
    "green scarf", "seed", "doll", "old map", "big shell", "bike", "umbrella", "jar of honey", "feather", "necklace",
    "carrot", "magic stick", "pair of boots", "swing", "letter", "bag of nuts", "mirror", "clock", "ladder", "pumpkin",
    "bucket", "pillow", "cookie", "teapot", "tent", "flute", "crown", "paintbrush", "sled", "butterfly net", "snowman",
    "puzzle", "candle", "ring", "bowl of soup", "rope", "pie", "sand castle", "truck", "whistle", "ribbon", "nest",
    "big rock", "picture", "glass of milk", "stick", "leaf", "rocket")
PLACES = (
    "in the forest", "by the river", "in a small village", "on a farm", "near the sea", "in a big garden",
    "on a green hill", "in the park", "in a little house", "by the lake", "in a quiet town", "at the edge of the woods",
    "in the mountains", "by a tall tree", "in a cozy cottage", "near a waterfall", "in a tall castle",
    "on a small island", "in a busy city", "next to a school", "in a warm barn", "by the pond", "in a deep valley",
    "at the end of a long road", "under an old bridge")
HELPERS = (
    "wise old owl", "friendly squirrel", "kind old woman", "big brown bear", "little bird", "funny frog", "tall man",
    "old turtle", "small mouse", "gentle horse", "clever cat", "happy dog", "farmer", "baker", "grandmother", "teacher",
    "brave knight", "little girl", "neighbor", "shy rabbit", "doctor", "old fisherman", "fairy", "big dog", "tiny ant",
    "mail carrier", "gray goose", "cook", "police officer", "little brother", "big sister")
LESSONS = (
    "to share", "to be kind", "to ask for help", "to tell the truth", "to never give up", "to be brave",
    "to listen to friends", "to be patient", "to say sorry", "to take care of things", "that friends are important",
    "to try new things")
OPENINGS = (
    "Once upon a time, there was a {trait} {being} named {name}. {name} lived {place}.",
    "Once upon a time, {place}, there lived a {trait} {being} named {name}.",
    "There was once a {trait} {being} named {name} who lived {place}.",
    "One day, a {trait} {being} named {name} went for a walk {place}.",
    "{name} was a {trait} {being} who lived {place}.",
    "Once there was a {trait} {being} called {name}. {name} liked to play {place}.",
    "Long ago, a {trait} {being} named {name} lived {place}.", "Every morning, {name} the {being} woke up early.",
    "It was a cold day. A {being} named {name} was {place}.",
    "{name} and a {helper} were best friends. They lived {place}.",
    "It was {name}'s birthday. {name} was a {trait} {being}.",
    "Not far from here, {place}, lived a {being} named {name}.",
    "{name} was a {being}. All the others said that {name} was too {trait}.",
    "Once, on a sunny afternoon, {name} the {being} was playing {place}.")
WISHES = (
    "One day, {name} found a {thing}.", "{name} wanted a {thing} more than anything.", "{name} had a {thing}.",
    "One morning, {name} saw a {thing} on the ground.", "{name} loved to play with a {thing}.",
    "One day, {name}'s mom gave {name} a {thing}.", "One sunny day, {name} made a {thing}.",
    "One day, {name} went to look for a {thing}.", "{name} had never seen a {thing} before.",
    "One night, {name} dreamed of a {thing}.", "{name} and a {helper} were looking for a {thing}.",
    "There was a {thing} on the table.", "{name} had lost a {thing}.",
    "One afternoon, {name} wanted to make a {thing}.", "A {helper} asked {name} to bring a {thing}.",
    "Today {name} wanted to learn how to make a {thing}.", "{name} always took a {thing} to bed.",
    "{name} hid a {thing} under the bed.")
TROUBLES = (
    "But then the {thing} was gone, and {name} felt {feeling}.", "Then {name} met a {helper}.",
    "But {name} could not do it alone. A {helper} came to help.",
    'Just then, a {helper} came by and said, "Hello, {name}!"',
    "Suddenly, there was a loud noise, and {name} felt {feeling}.", "But the {thing} broke, and {name} felt {feeling}.",
    '"Can I see your {thing}?" asked a {helper}.', "But a {helper} wanted the {thing} too.",
    "Then it started to rain, and {name} felt {feeling}.", '"Please help me," said {name} to a {helper}.',
    "But there was a big problem.", "Then {name} heard someone crying. It was a {helper}.",
    "But the {thing} was too heavy.", "Then the wind blew the {thing} into a tree.", "On the way, {name} got lost.",
    '"Stop!" said a {helper}. "That is mine!"', "But {name} forgot all about the time.",
    "A {helper} laughed at {name}.", "Then {name} fell and got hurt.", "But nobody wanted to listen to {name}.",
    "Then the lights went out.")
ANSWERS = (
    "So {name} and the {helper} looked for the {thing} together.", "The {helper} smiled and gave {name} a hug.",
    '"Don\'t worry," said the {helper}. "I can help you."', "{name} had a good idea.",
    "So {name} asked the {helper} for help.", '"Let us play together," said {name}.', "{name} worked very hard.",
    "Then {name} saw something.", "But {name} did not give up.", '"You can have my {thing}," said {name}.',
    "{name} ran to the {helper} and told the whole story.", "So they became friends.", '"I am sorry," said {name}.',
    '"What should I do now?" thought {name}.', "{name} took a deep breath and tried again.", "So they made a plan.",
    "{name} looked everywhere.", "{name} shared some food with the {helper}.", "They climbed up the hill together.",
    "{name} began to sing a song.", '"I know what to do," said the {helper}.', "After a while, {name} felt better.",
    "{name} told the truth.", "{name} sat down and thought about it.", "The next day, {name} came back.")
ENDINGS = (
    "In the end, {name} was happy.", "At last,", "{name} learned {lesson}.", "From that day on, {name}",
    "The sun went down.", "Everyone was happy.", '"Thank you," said {name}.', "That night, {name} went home.",
    "In the end,", "{name} smiled.", "Finally,", "{name} never forgot that day.", "They all laughed and went home.",
    '"I am proud of you," said', "After that, {name} always", "And so {name} and the {helper}",
    "When {name} went to bed that night,", "Now {name} knows", "It was the best day ever.", "They had a big party.",
    "{name}'s mom was very happy.")
ASKS = (
    "Write a short story for young children about a {being} named {name} and a {thing}.",
    "Tell me a bedtime story about a {trait} {being}. Use simple words.",
    "Write a simple story in which a {being} learns {lesson}.",
    "Tell me a story about a {being} and a {helper}. It should have a happy ending.",
    "Write a little story about a {thing}. Use short sentences and some dialogue.")
QUESTIONS = (
    "Tell me a story about a {being}.", "Can you tell me a story about a {being} named {name}?",
    "Can you write a story about a {thing}?", "What happened to {name} the {being}?",
    "Please tell me a short story about a {trait} {being}.", "Do you know a story about a {being} and a {helper}?")


def plot(rng):
    """The templates of one story, filled in: ask, question, opening, cues (trouble, answer, ending)."""
    words = {key: rng.choice(values) for key, values in dict(
        name=NAMES, being=BEINGS, trait=TRAITS, thing=THINGS, place=PLACES, helper=HELPERS, feeling=FEELINGS,
        lesson=LESSONS).items()}
    fill = lambda templates: re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", rng.choice(templates).format(**words))
    trouble = rng.choice(TROUBLES)
    met = lambda choices: [text for text in choices if "{helper}" in trouble or "{helper}" not in text]
    cues = [" " + fill(choices) for choices in ([trouble], met(ANSWERS), met(ENDINGS))]
    if rng.random() < 0.3:                                                  # leave this part to the model
        cues[1] = ""
    return fill(ASKS), fill(QUESTIONS), fill(OPENINGS) + " " + fill(WISHES), cues


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
