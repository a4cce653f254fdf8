"""What the side-by-side bench asks: short chat prompts and prompts of about 1,000 tokens, none of them twice.

Owns the making of prompts; it must not know contenders or figures. Every prompt begins with its round, level and
number, and long ones are written anew each time, so that no prefix cache has seen them. The same round and level give
the same prompts, so all contenders are asked the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paceline.clients.traffic import ClosedLoop
from paceline.clients.workload import Prompt, UsageError

ScenarioName = Literal["short", "long"]
SCENARIO_NAMES: tuple[ScenarioName, ...] = ("short", "long")
#: Measured with the SmolLM2 and Qwen2.5 tokenizers: 1,000 tokens, chat template included, within 4%.
LONG_PROMPT_WORDS = 808


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of prompt, and how many streams ask at once, one level after the other."""

    name: ScenarioName
    levels: tuple[ClosedLoop, ...]

    def prompts(
        self, source: Sequence[Prompt], round_number: int, level: ClosedLoop, count: int
    ) -> list[Prompt]:
        """``count`` prompts of one round; ``source`` is what short ones are taken from, in turn.

        Raises:
            UsageError: a short prompt whose first message is not plain text.
        """
        marks = [f"({round_number}.{level.name}.{index})" for index in range(count)]
        if self.name == "long":
            return [Prompt(text=f"{mark} {long_text(mark)}") for mark in marks]
        start = (round_number - 1) * count
        return [_marked(source[(start + i) % len(source)], mark) for i, mark in enumerate(marks)]


def _marked(prompt: Prompt, mark: str) -> Prompt:
    """The prompt with ``mark`` in front; its own ``max_tokens`` goes, as all answers are equally long."""
    messages = [dict(message) for message in prompt.body("chat")["messages"]]
    if not isinstance(messages[0].get("content"), str):
        raise UsageError("bench_peers needs prompts whose first message is plain text")
    messages[0]["content"] = f"{mark} {messages[0]['content']}"
    return Prompt(messages=messages)


def long_text(seed: str) -> str:
    """Notes of about ``LONG_PROMPT_WORDS`` words and a question about them; another seed, other notes."""
    chance = random.Random(seed)
    notes, words = [], 0
    while words < LONG_PROMPT_WORDS:
        slots = {name: chance.choice(values) for name, values in _WORDS.items()}
        note = chance.choice(_NOTES).format(number=chance.randint(2, 90), **slots)
        notes.append(note)
        words += len(note.split())
    asked = chance.choice(_QUESTIONS)
    return f"These are the notes of a small town's council office.\n\n{' '.join(notes)}\n\n{asked}"


_NOTES = (
    "On {day} {person} reported that the {place} had been closed because of {trouble}.",
    "The {group} asked for {number} more {things}, and {person} promised an answer by {day}.",
    "Nobody could say why the {place} had received the letter about {trouble} twice.",
    "{person} thinks that the {group} would rather pay for {things} than wait until {season}.",
    "In {season} the {place} was opened to visitors, who mostly came to see the {things}.",
    "There were {number} complaints about {trouble}, most of them from the {group}.",
    "The {place} keeps its {things} in the cellar, which worries {person} whenever it rains.",
    "A teacher brought {number} children to the {place}, and they drew pictures of the {things}.",
    "It was agreed on {day} that {trouble} is a matter for the {group} and not for the council.",
    "{person} found old maps which show that the {place} once stood on the other side of the river.",
    "Because of {trouble} the delivery of the {things} has been moved from {day} to next {season}.",
    "The {group} will meet {person} at the {place} to count the {things} once more.",
    "Last {season} the {group} planted trees behind the {place} and forgot to water them.",
    "Somebody left {number} boxes of {things} in front of the {place} without a name.",
    "{person} wrote that {trouble} costs the town more each year than all the {things} together.",
    "The roof of the {place} needs repair before {season}, says {person}, and the {group} agree.",
)
_WORDS = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "season": ("spring", "summer", "autumn", "winter"),
    "person": (
        "Mrs Keller",
        "Mr Okafor",
        "Anna Lind",
        "the mayor",
        "Doctor Ruiz",
        "old Tom",
        "the new clerk",
    ),
    "place": (
        "library",
        "town hall",
        "fire station",
        "school kitchen",
        "museum",
        "ferry dock",
        "swimming pool",
    ),
    "group": ("gardeners", "choir", "market sellers", "fishing club", "parents", "shop owners", "cyclists"),
    "things": ("chairs", "lanterns", "bicycles", "paintings", "flower pots", "ladders", "books", "clocks"),
    "trouble": (
        "broken pipes",
        "loud music",
        "missing keys",
        "heavy fog",
        "stray goats",
        "wet paint",
        "late buses",
    ),
}
_QUESTIONS = (
    "Which three matters need a decision first, and why? Answer in a short paragraph.",
    "Write a letter to the town's newspaper that tells the most important news from these notes.",
    "Who has asked for what? Make a list, one line for each group.",
    "Describe what kind of town this is, for somebody who has never been there.",
)

#: Small programming tasks of the kind that code benchmarks ask; our own wording.
CODE_PROMPTS: tuple[Prompt, ...] = tuple(
    Prompt(text=f"Complete this Python function. Answer with the code only.\n\n```python\n{stub}\n```")
    for stub in (
        'def moving_average(values: list[float], width: int) -> list[float]:\n    """Mean of each window of '
        '`width` neighbours.\n    >>> moving_average([1, 2, 3, 4], 2)\n    [1.5, 2.5, 3.5]\n    """',
        'def is_balanced(text: str) -> bool:\n    """Whether (), [] and {} in text are closed in the right '
        "order.\n    >>> is_balanced('a[b(c)]')\n    True\n    >>> is_balanced('(]')\n    False\n    \"\"\"",
        'def run_lengths(text: str) -> list[tuple[str, int]]:\n    """Runs of equal characters with their '
        "lengths.\n    >>> run_lengths('aabccc')\n    [('a', 2), ('b', 1), ('c', 3)]\n    \"\"\"",
        'def primes_below(limit: int) -> list[int]:\n    """All primes below limit, by the sieve of '
        'Eratosthenes.\n    >>> primes_below(12)\n    [2, 3, 5, 7, 11]\n    """',
        'def merge_intervals(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:\n    """Join spans that '
        'overlap or touch.\n    >>> merge_intervals([(5, 8), (1, 3), (2, 4)])\n    [(1, 4), (5, 8)]\n    """',
        'def roman(number: int) -> str:\n    """Number from 1 to 3999 in Roman numerals.\n    >>> roman(1994)\n'
        '    \'MCMXCIV\'\n    """',
        'def transpose(rows: list[list[int]]) -> list[list[int]]:\n    """Rows become columns.\n    >>> '
        'transpose([[1, 2], [3, 4], [5, 6]])\n    [[1, 3, 5], [2, 4, 6]]\n    """',
        'def word_counts(text: str) -> dict[str, int]:\n    """How often each word occurs, in lower case, '
        "without punctuation.\n    >>> word_counts('To be, or not to be!')\n    {'to': 2, 'be': 2, 'or': 1, "
        '\'not\': 1}\n    """',
    )
)
