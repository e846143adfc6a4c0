"""The prompts of the decoding studies, in four kinds, as token ids.

code     stretches of library source, to be continued
prose    openings of plain English, to be continued
chat     questions in the model's chat template
copy     a stretch of library source and its first lines once more: text that repeats itself,
         as editing, quoting and boilerplate do
"""

from early_exit.evaluation.run_decoder import cut_prompts
from early_exit.runs.assemble import Tuned

KINDS = ("code", "prose", "chat", "copy")

_PROSE = """\
The old lighthouse had not been lit for thirty years when the storm came
In the spring the river rises over its banks and the farmers
Bread is made of very few things, and yet every baker will tell you
She opened the letter slowly, because she knew the handwriting, and
The first trains ran through the valley in the summer of 1862, and soon
A good walk begins with good shoes. The second thing to think about is
When the council met on Tuesday evening, the question of the new bridge
Most people believe that the desert is empty, but after a night of rain
My grandfather kept bees behind the house, and every August he would
The history of the small island can be read in its stone walls, which
It was the last day of the harvest, and the whole village had gathered
Glass is an odd material: it is made from sand, it flows when it is hot, and
The museum opens at nine, but the guards arrive much earlier to
There are two ways to cross the mountains in winter. The first is
Nobody remembered who had planted the tree in the middle of the square
The cook explained that a soup is never finished, only"""

CHAT = """\
What is photosynthesis, in simple words?
Give me three tips for sleeping better.
How do I boil an egg?
Write a short poem about the sea.
What is the difference between a list and a tuple in Python?
Why is the sky blue?
Explain what a mortgage is.
Who wrote Romeo and Juliet, and what is it about?
How many days are there in a leap year, and why?
Write an email that asks for a day off.
What should I pack for a weekend in the mountains?
Explain recursion to a ten-year-old.
What are the main causes of inflation?
Describe the life of a honey bee.
How does a refrigerator work?
Write a Python function that reverses a string.""".splitlines()


def load(tuned: Tuned, count: int) -> dict[str, list[list[int]]]:
    """At most 16 prompts of each kind, for the run's tokenizer and text."""
    stretches = cut_prompts(tuned, count, 128)
    return {
        "code": stretches,
        "prose": [tuned.tokenizer.encode(line) for line in _PROSE.splitlines()[:count]],
        "chat": [tuned.chat(line) for line in CHAT[:count]],
        "copy": [stretch[:96] * 2 + stretch[:32] for stretch in stretches],
    }
