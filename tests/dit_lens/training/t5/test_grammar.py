"""Texts of the grammar have its words, agree with one world, and cover the scenes."""

from __future__ import annotations

import re

import numpy as np

from dit_lens.task import DIRECTIONS, HELD_OUT, PHRASES
from dit_lens.training.t5.grammar import (
    PARAPHRASES,
    SYNONYMS,
    TRAINED,
    VOCABULARY,
    Thing,
    Writer,
    count_tokens,
    relation_of,
)
from dit_lens.training.t5.pretrain import (
    scenes_tokenizer,
)

RELATION_OF = {
    phrase: relation
    for table in (PHRASES, PARAPHRASES)
    for relation, ps in table.items()
    for phrase in ps
}


CANONICAL = {word: color for color, words in SYNONYMS.items() for word in (color, *words)}


OBJECT = (
    rf"(?:(?:the|an?) )?(?:(?P<c{{0}}>{'|'.join(CANONICAL)}) )?(?P<s{{0}}>circle|square|triangle)"
)


PLACE = r"(?: (?:at|on) the (?:top|bottom|left|right)(?: left| right)?)?"


SAID = "|".join(sorted(RELATION_OF, key=len, reverse=True))


STATEMENT = re.compile(
    rf"\b{OBJECT.format(1)}{PLACE} (?:is )?(?P<phrase>{SAID}) {OBJECT.format(2)}\b"
)


def test_texts_have_the_vocabulary_s_words_and_fit():
    texts = [Writer(np.random.default_rng(seed)).text(30) for seed in range(600)]
    assert {word for text in texts for word in re.findall(r"\w+", text)} == set(VOCABULARY)
    assert max(map(count_tokens, texts)) <= 30
    tokenizer = scenes_tokenizer()
    for text in texts[:100]:
        ids = tokenizer(text).input_ids
        assert len(ids) == count_tokens(text) + 1
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_statements_of_a_text_agree_with_one_world_and_none_is_held_out():
    held_out = {(c.shape1, c.color1, c.relation, c.shape2) for c in HELD_OUT}
    found = 0
    for seed in range(1500):
        writer = Writer(np.random.default_rng(seed))
        things: list[Thing] = []
        world = writer.world
        writer.world = lambda world=world, things=things: things.extend(world()) or things
        text = writer.text()
        by_shape = {thing.shape: thing for thing in things}
        for match in STATEMENT.finditer(text):
            a, b = by_shape[match["s1"]], by_shape[match["s2"]]
            dx, dy = DIRECTIONS[RELATION_OF[match["phrase"]]]
            assert (np.sign(a.x - b.x), np.sign(a.y - b.y)) == (dx, dy), text
            for thing, word in ((a, match["c1"]), (b, match["c2"])):
                assert word is None or CANONICAL[word] == thing.color, text
            if {a.color, b.color} == {"red", "blue"}:
                assert (a.shape, a.color, RELATION_OF[match["phrase"]], b.shape) not in held_out, (
                    text
                )
            found += 1
    assert found > 1500


def test_worlds_that_are_scenes_cover_the_trained_combinations():
    writer = Writer(np.random.default_rng(0))
    seen = set()
    for _ in range(4000):
        things = writer.world()
        if len(things) == 2 and {t.color for t in things} == {"red", "blue"}:
            a, b = things
            seen.add((a.shape, b.shape, a.color, relation_of(a, b)))
    assert {(c.shape1, c.shape2, c.color1, c.relation) for c in TRAINED} <= seen
