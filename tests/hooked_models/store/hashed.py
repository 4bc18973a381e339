"""Values to hash under any Python, which needs no package: `python hashed.py hashing.py` prints a
hash for each.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.util
import sys
from pathlib import Path

SCALE = 3.0
WORDS = {"red", "blue", "green"}


def helper(words: list[str]) -> list[str]:
    """Whatever this says does not count."""
    return [SCALE * word for word in words if word in WORDS]  # nor this


@functools.lru_cache
def kept(word: str) -> list[str]:
    return helper([word])


@dataclasses.dataclass(frozen=True)
class Share:
    whole: float
    names: frozenset = frozenset({"a", "b", "c"})

    def __call__(self, x: object) -> set[str]:
        return {"red", "blue", f"{x!r:>{SCALE}}"}

    @functools.cached_property
    def double(self) -> float:
        return 2 * self.whole


class Kind(enum.Enum):
    FIRST = 1


def outer(k: object) -> object:
    def inner(x: object, *, d: object = {1, 2, "q"}) -> object:
        match x:
            case [1, 2]:
                return k, inner
        return kept(str(x)), (lambda y: {y, k})

    return inner


first, second = (lambda x: x in {"red", "blue"}), (lambda x: x in {"blue", "green"})
VALUES = {
    "numbers": [1, 1.0, True, -0.0, 2 + 3j, float("inf")],
    "text": ["a", b"a", Path("a/b")],
    "sets": {"x": {1, 2, "z"}, "y": frozenset({("a", 1), None})},
    "function": helper,
    "cached": kept,
    "object": Share(2.0),
    "class": Share,
    "closure": outer(2),
    "other closure": outer(3),
    "partial": functools.partial(helper, words=["red"]),
    "method": Share(1.0).__call__,
    "lambda": first,
    "other lambda": second,
    "builtins": [len, str.upper, sorted, slice(1, None), range(3)],
    "enum": Kind.FIRST,
}

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("fingerprint", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in VALUES.items():
        print(module.fingerprint(value), name)  # noqa: T201
