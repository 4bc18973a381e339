"""Choices of tokens are hashable; words that are none are refused."""

from __future__ import annotations

import numpy as np
import pytest

from dit_lens import prompts
from dit_lens.text.prompts import as_choice


@pytest.mark.parametrize(("text", "nth"), [("", None), ("!", None), ("cat", 0), ("cat", -1)])
def test_words_that_are_none(text: object, nth: object) -> None:
    with pytest.raises(ValueError, match="give a"):
        prompts.word(text, nth)


def test_choices_are_hashable_and_equal_for_equal_tokens() -> None:
    assert hash(as_choice(prompts.word("a b", nth=np.int64(2)))) == hash(
        as_choice([prompts.word("a b", 2)])
    )
    assert as_choice(range(2)) == as_choice(np.array([0, 1])) == (0, 1)
    assert str(prompts.word("a", 2)) == "word('a', nth=2)"
