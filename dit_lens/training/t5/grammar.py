"""Short texts about little worlds of coloured shapes.

The `t5-scenes` encoder is pre-trained on them. A text is one to four sentences that are all true of
one world of one to three objects: captions as `dit_lens.scenes` writes them, and around them
paraphrases, fillers, colour synonyms, inverted and elliptic orders, questions, and entailments such
as the inverse statement or who is the higher one. The later sentences give a word's context its
use: to predict a missing word of "the lower shape is blue", the text's statements about each object
must have been put together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ...task import COLORS, COMBINATIONS, DIRECTIONS, HELD_OUT, PHRASES, SHAPES, Combination
from ...task.scene import Relation

PARAPHRASES: dict[Relation, tuple[str, ...]] = {
    "above": ("over", "straight above", "on top of"),
    "below": ("under", "straight below", "beneath"),
    "left": ("on the left of", "directly left of", "on the left side of"),
    "right": ("on the right of", "directly right of", "on the right side of"),
    "upper_left": ("above and left of", "up and to the left of", "left of and above"),
    "upper_right": ("above and right of", "up and to the right of", "right of and above"),
    "lower_left": ("below and left of", "down and to the left of", "left of and below"),
    "lower_right": ("below and right of", "down and to the right of", "right of and below"),
}
"""Wordings beside the 22 of the training set (`scenes.PHRASES`)."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet", "ruby"),
    "blue": ("navy", "azure", "cobalt"),
    "green": ("emerald",),
    "yellow": ("golden",),
}
"""Every colour of a world, with the words that may stand for it (the paper replaces red by crimson
and blue by navy).
"""

EXTREMES: dict[tuple[int, int], tuple[str, ...]] = {
    (0, -1): ("top", "highest", "upper", "higher"),
    (0, 1): ("bottom", "lowest", "lower"),
    (-1, 0): ("leftmost", "left"),
    (1, 0): ("rightmost", "right"),
}
"""Name of the object that lies furthest in a direction (x right, y down)."""

_TEMPLATE_WORDS = (
    *(
        "the",
        "a",
        "an",
        "is",
        "are",
        "there",
        "which",
        "where",
        "what",
        "and",
        "one",
        "shape",
        "object",
        "color",
        "at",
    ),
    *("on", "in", "picture"),
)
PUNCTUATION = (".", ",", "?")
VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {*_TEMPLATE_WORDS, *SHAPES, *SYNONYMS}
        | {word for words in (*SYNONYMS.values(), *EXTREMES.values()) for word in words}
        | {
            word
            for table in (PHRASES, PARAPHRASES)
            for phrases in table.values()
            for p in phrases
            for word in p.split()
        }
    )
)
"""Every word of the grammar, sorted."""

PLAIN = 0.5
"""Share of texts that keep to scenes with both colours named, without fillers, synonyms and
ellipses: most is to be predicted there, and what the rest needs is learnt from them first.
"""

T = TypeVar("T")
_BY_DIRECTION = {direction: relation for relation, direction in DIRECTIONS.items()}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object on a 3 × 3 grid; x to the right, y down.

    `color` is one of the keys of `SYNONYMS`.
    """

    shape: str
    color: str
    x: int
    y: int


def relation_of(a: Thing, b: Thing) -> Relation:
    """Where `a` lies as seen from `b`."""
    return _BY_DIRECTION[int(np.sign(a.x - b.x)), int(np.sign(a.y - b.y))]


def may_say(a: Thing, b: Thing) -> bool:
    """True if "a is … b" is outside `scenes.HELD_OUT`, which this encoder never reads either."""
    return (a.shape, b.shape, a.color, relation_of(a, b)) not in _UNSAID or {
        a.color,
        b.color,
    } != set(COLORS)


_UNSAID = {(c.shape1, c.shape2, c.color1, c.relation) for c in HELD_OUT}


class Writer:
    """Writes texts: `Writer(rng).text()`. A text is a function of the generator's state alone."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.plain = False

    def text(self, max_tokens: int = 31) -> str:
        """One text of at most `max_tokens` words and punctuation marks."""
        self.plain = self.chance(PLAIN)
        things = self.world()
        # how often a noun has one; captions have none
        articles = 0.0 if self.plain else self.pick((0.0, 0.0, 1.0, 0.5))
        first = self.statement if len(things) > 1 else self.placement
        sentences = [first(things, articles)]
        follow_ups: tuple[Callable[[list[Thing], float], str], ...] = (
            self.statement,
            self.statement,
            self.extreme,
        )
        if not self.plain:
            follow_ups = (
                *((self.statement,) * 4 if len(things) > 1 else ()),
                *(
                    self.extreme,
                    self.extreme,
                    self.color,
                    self.question,
                    self.question,
                    self.existence,
                    self.placement,
                ),
            )
        for _ in range(self.rng.choice(4, p=(0.2, 0.5, 0.2, 0.1))):
            sentences.append(self.pick(follow_ups)(things, articles))
        while (
            len(sentences) > 1 and sum(map(count_tokens, sentences)) + len(sentences) > max_tokens
        ):
            sentences.pop()
        ended = [s if s.endswith("?") else s + "." for s in sentences]
        text = " ".join(ended)
        return text.removesuffix(".") if self.chance(0.8 if len(ended) == 1 else 0.3) else text

    # The world

    def world(self) -> list[Thing]:
        """One to three objects of different shapes.

        A two-object world is most often a scene's: one red, one blue.
        """
        number = 2 if self.plain else self.rng.choice((1, 2, 3), p=(0.08, 0.6, 0.32))
        if self.plain or (number == 2 and self.chance(0.6)):
            combination = TRAINED[self.rng.integers(len(TRAINED))]
            dx, dy = DIRECTIONS[combination.relation]
            second = Thing(
                combination.shape2, "blue" if combination.color1 == "red" else "red", 1 - dx, 1 - dy
            )
            return [Thing(combination.shape1, combination.color1, 1 + dx, 1 + dy), second]
        while True:
            cells = self.rng.permutation(9)[:number]
            shapes, colors = self.rng.permutation(SHAPES), self.rng.permutation(list(SYNONYMS))
            things = [
                Thing(str(s), str(c), int(i % 3), int(i // 3))
                for s, c, i in zip(shapes, colors, cells, strict=False)
            ]
            if all(may_say(a, b) or may_say(b, a) for a in things for b in things if a is not b):
                return things

    # Sentences; each takes the world's objects and how often a noun has an article

    def statement(self, things: list[Thing], articles: float) -> str:
        """Statement "a is PHRASE b", in any order; of three objects, perhaps in one sentence."""
        a, b = self.pair(things)
        phrase = self.phrase(a, b)
        form = 1.0 if self.plain else self.rng.random()
        if form < 0.06:
            return f"{phrase} {self.noun(b, articles)} is {self.noun(a, articles)}"
        if form < 0.12:
            return f"{self.noun(a, articles)} {phrase} {self.noun(b, articles)}"
        if form < 0.18:
            return f"there is {self.noun(a, articles)} {phrase} {self.noun(b, articles)}"
        if self.plain:
            return f"{self.placed_noun(a)} is {phrase} {self.placed_noun(b)}"
        sentence = f"{self.noun(a, articles)} is {phrase} {self.noun(b, articles)}"
        others = [c for c in things if c not in (a, b) and may_say(a, c)]
        if others and self.chance(0.4):
            return f"{sentence} and {self.phrase(a, others[0])} {self.noun(others[0], articles)}"
        return sentence

    def extreme(self, things: list[Thing], articles: float) -> str:
        """Conclusion about one object: "the lower shape is blue square", "square is lower"."""
        thing, word = self.extreme_thing(things)
        if self.chance(0.4):
            return (
                f"{self.noun(thing, articles)} is "
                f"{self.pick((f'the {word} one', f'the {word} {self.general()}', word))}"
            )
        answer = self.pick(
            (
                self.noun(thing, articles),
                self.color_word(thing),
                self.noun(thing, articles, named=0.0),
            )
        )
        return f"the {word} {self.pick(('one', self.general()))} is {answer}"

    def color(self, things: list[Thing], articles: float) -> str:
        """Statement of a color: "the circle is red", "the red one is a circle"."""
        thing = self.pick(things)
        if self.chance(0.5):
            return f"{self.noun(thing, articles, named=0.0)} is {self.color_word(thing)}"
        return (
            f"the {self.color_word(thing)} {self.pick(('one', self.general()))} is "
            f"{self.noun(thing, articles, named=0.0)}"
        )

    def question(self, things: list[Thing], articles: float) -> str:
        """A question and its answer."""
        if len(things) > 1 and self.chance(0.4):
            a, b = self.pair(things)
            return (
                f"where is {self.noun(a, articles)}? {self.phrase(a, b)} {self.noun(b, articles)}"
            )
        if self.chance(0.5):
            thing, word = self.extreme_thing(things)
            return f"which {self.general()} is {word}? {self.noun(thing, articles)}"
        thing = self.pick(things)
        return f"what color is {self.noun(thing, articles, named=0.0)}? {self.color_word(thing)}"

    def existence(self, things: list[Thing], articles: float) -> str:
        """List of objects: "there are red circle and blue square"."""
        named = [self.noun(things[i], articles) for i in self.rng.permutation(len(things))]
        return f"there {'is' if len(named) == 1 else 'are'} {' and '.join(named)}"

    def placement(self, things: list[Thing], articles: float) -> str:
        """A place in the picture: "red circle is at the top left"."""
        thing = self.pick(things)
        return f"{self.noun(thing, articles)} is {self.place(thing)}"

    # Words

    def phrase(self, a: Thing, b: Thing) -> str:
        """Phrase of the relation of `a` to `b`: "to the left of"."""
        relation = relation_of(a, b)
        return self.pick((PHRASES if self.chance(0.65) else PARAPHRASES)[relation])

    def place(self, thing: Thing) -> str:
        """Phrase of a place: "at the top left"."""
        words = [
            word
            for word in (("top", "", "bottom")[thing.y], ("left", "", "right")[thing.x])
            if word
        ]
        return f"{self.pick(('at', 'on'))} the {' '.join(words)}" if words else "in the picture"

    def placed_noun(self, thing: Thing) -> str:
        """An object, perhaps with its place: "red circle at the top left"."""
        return (
            f"{self.noun(thing, 0.0)} {self.place(thing)}"
            if self.chance(0.5)
            else self.noun(thing, 0.0)
        )

    def noun(self, thing: Thing, articles: float, named: float = 0.65) -> str:
        """Noun phrase "[the|a] [colour] shape"; `named` is the probability of the colour word."""
        article = self.pick(("the", "the", "a")) if self.chance(articles) else ""
        color = (
            self.color_word(thing)
            if self.chance(max(named, float(self.plain and named > 0)))
            else ""
        )
        if article == "a" and color[:1] in ("a", "e"):
            article = "an"
        return " ".join(word for word in (article, color, thing.shape) if word)

    def color_word(self, thing: Thing) -> str:
        """A thing's color, sometimes as a synonym."""
        return (
            self.pick(SYNONYMS[thing.color])
            if self.chance(0.0 if self.plain else 0.2)
            else thing.color
        )

    def general(self) -> str:
        """A general noun: "shape" or "object"."""
        return self.pick(("shape", "object"))

    def pair(self, things: list[Thing]) -> tuple[Thing, Thing]:
        """Two objects in an order that may be said."""
        a, b = (things[i] for i in self.rng.permutation(len(things))[:2])
        return (a, b) if may_say(a, b) else (b, a)

    def extreme_thing(self, things: list[Thing]) -> tuple[Thing, str]:
        """An object that alone lies furthest in some direction, and its name for that."""
        found = []
        for (dx, dy), words in EXTREMES.items():
            reach = [t.x * dx + t.y * dy for t in things]
            if reach.count(max(reach)) == 1:
                found.append((things[int(np.argmax(reach))], words))
        thing, words = self.pick(found)
        return thing, self.pick(words)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, uniformly."""
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)


TRAINED: tuple[Combination, ...] = tuple(c for c in COMBINATIONS if c not in HELD_OUT)


def count_tokens(text: str) -> int:
    """Words and punctuation marks of a text."""
    return len(re.findall(r"\w+|[^\w\s]", text))
