"""Scenes: what is drawn is what the record says, and samples have the statistics that they
claim.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dit_lens.task import (
    HELD_OUT,
    PHRASES,
    RELATIONS,
    Scene,
    caption,
    evaluate,
    from_caption,
    opposite,
    render,
    sample,
)
from dit_lens.task.rendering import shape_mask
from dit_lens.task.scene import (
    CENTRE_RANGE,
    COLORS,
    COMBINATIONS,
    DIRECTIONS,
    SHAPES,
    WORDS,
    relation_between,
)

DISTRIBUTIONS = ("balanced", "natural")
RED_CIRCLE_LEFT = Scene("circle", "red", 30, 64, "square", "blue", 90, 64, "left", "left of")


def pixels_of(image: torch.Tensor, color: str) -> np.ndarray:
    """[height width], true where a pixel has exactly the colour."""
    pure = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}[color]
    return (image == torch.tensor(pure)[:, None, None]).all(0).numpy()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=25)
@given(
    n=st.integers(0, 150),
    more=st.integers(0, 100),
    start=st.integers(0, 150),
    seed=st.integers(0, 2**32),
)
def test_a_sample_is_a_window_of_one_endless_sequence(distribution, n, more, start, seed):
    window = sample(n, seed, start=start, distribution=distribution)
    assert len(window) == n
    assert window == sample(start + n + more, seed, distribution=distribution)[start : start + n]


def test_seeds_differ():
    assert not set(sample(100, 0)) & set(sample(100, 1))


def test_held_out_is_ten_of_ninety_six():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 6 * 2 * 8
    assert len(HELD_OUT) == 10
    assert set(COMBINATIONS) >= HELD_OUT
    assert {c.relation for c in HELD_OUT} == set(RELATIONS)
    assert Counter(c.color1 for c in HELD_OUT) == {"red": 5, "blue": 5}
    assert max(Counter((c.shape1, c.shape2) for c in HELD_OUT).values()) <= 2


def test_every_part_of_a_held_out_combination_is_in_training():
    trained = set(COMBINATIONS) - HELD_OUT
    for c in HELD_OUT:
        for alike in (
            lambda t, c=c: (t.shape1, t.shape2, t.relation) == (c.shape1, c.shape2, c.relation),
            lambda t, c=c: (t.shape1, t.shape2, t.color1) == (c.shape1, c.shape2, c.color1),
            lambda t, c=c: (t.shape1, t.color1, t.relation) == (c.shape1, c.color1, c.relation),
            lambda t, c=c: (t.shape2, t.color1, t.relation) == (c.shape2, c.color1, c.relation),
        ):
            assert any(map(alike, trained)), c


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_training_never_sees_what_is_held_out(distribution):
    drawn = {s.combination for s in sample(4000, 0, distribution=distribution)}
    assert drawn == set(COMBINATIONS) - HELD_OUT
    assert {
        s.combination for s in sample(500, 0, distribution=distribution, split="held_out")
    } == HELD_OUT
    assert {s.combination for s in sample(4000, 0, distribution=distribution, split="all")} == set(
        COMBINATIONS
    )


def test_balanced_is_uniform_over_relations_combinations_and_phrases():
    scenes = sample(6000, 0, split="all")
    assert chisquare(list(Counter(s.relation for s in scenes).values())).pvalue > 0.01
    assert chisquare(list(Counter(s.combination for s in scenes).values())).pvalue > 0.01
    for relation, phrases in PHRASES.items():
        counts = Counter(s.phrase for s in scenes if s.relation == relation)
        assert set(counts) == set(phrases)
        assert chisquare(list(counts.values())).pvalue > 0.001
    # relations stay uniform although the held-out combinations are spread unevenly over them
    assert chisquare(list(Counter(s.relation for s in sample(6000, 0)).values())).pvalue > 0.01


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_record_is_consistent(distribution):
    low, high = CENTRE_RANGE
    for s in sample(2000, 0, distribution=distribution, split="all"):
        assert relation_between(s.x1, s.y1, s.x2, s.y2) == s.relation
        assert s.phrase in PHRASES[s.relation]
        assert s.shape1 != s.shape2
        assert {s.color1, s.color2} == set(COLORS)
        assert all(low <= v <= high for v in (s.x1, s.y1, s.x2, s.y2))


def test_balanced_positions_reach_the_whole_range():
    scenes = sample(4000, 0)
    for name in ("x1", "y1", "x2", "y2"):
        values = {getattr(s, name) for s in scenes}
        assert values == set(range(CENTRE_RANGE[0], CENTRE_RANGE[1] + 1))


def test_natural_is_the_original_training_set():
    """Frequencies of the original's generator: paper.md §1.1 of the project's facts (10,000
    simulated scenes).
    """
    scenes = sample(10_000, 0, split="all", distribution="natural")
    frequency = {r: n / len(scenes) for r, n in Counter(s.relation for s in scenes).items()}
    for relation in RELATIONS:
        diagonal = all(DIRECTIONS[relation])
        expected = 0.195 if diagonal else 0.059 if relation in ("above", "below") else 0.050
        assert frequency[relation] == pytest.approx(expected, abs=0.012), relation
    share = np.array([overlap_share(s) for s in scenes])
    cardinal = np.array([0 in DIRECTIONS[s.relation] for s in scenes])
    assert (share > 0).mean() == pytest.approx(0.287, abs=0.015)
    assert (share > 0.05).mean() == pytest.approx(0.252, abs=0.012)
    assert (share[~cardinal] > 0.05).mean() == pytest.approx(0.19, abs=0.012)
    assert 0.46 <= (share[cardinal] > 0.05).mean() <= 0.53


def overlap_share(scene: Scene) -> float:
    """The bounding boxes' intersection over the smaller one, in the original's geometry (a triangle
    hangs on its centroid).
    """
    height = 16 * math.sqrt(3)
    up1, up2 = (height / 3 if shape == "triangle" else 16 for shape in (scene.shape1, scene.shape2))
    down1, down2 = (
        2 * height / 3 if shape == "triangle" else 16 for shape in (scene.shape1, scene.shape2)
    )
    width = 32 - abs(scene.x1 - scene.x2)
    rows = min(scene.y1 + down1, scene.y2 + down2) - max(scene.y1 - up1, scene.y2 - up2)
    return max(width, 0) * max(rows, 0) / (32 * min(up1 + down1, up2 + down2))


def test_spread_is_a_curriculum_from_eight_layouts():
    for s in sample(500, 0, spread=0.0):
        for (value1, value2), direction in zip(
            ((s.x1, s.x2), (s.y1, s.y2)), DIRECTIONS[s.relation], strict=True
        ):
            assert abs(value1 - (64 + 28 * direction)) <= 2
            assert abs(value2 - (64 - 28 * direction)) <= 2
    assert sample(100, 0, spread=1.0) == sample(100, 0)
    reach = [np.std([s.x1 for s in sample(500, 0, spread=spread)]) for spread in (0.0, 0.2, 1.0)]
    assert reach == sorted(reach)


@pytest.mark.parametrize("curriculum", [{"spread": -0.1}, {"spread": 1.1}, {"red_first": 2.0}])
def test_a_curriculum_outside_its_range_is_an_error(curriculum):
    with pytest.raises(ValueError, match="give a finite number from 0 to 1"):
        sample(1, 0, **curriculum)


def test_red_first_says_how_often_the_red_object_is_named_first():
    for share in (0.0, 0.3, 1.0):
        scenes = sample(1500, 0, red_first=share)
        assert np.mean([s.color1 == "red" for s in scenes]) == pytest.approx(share, abs=0.04)
        assert not {s.combination for s in scenes} & HELD_OUT


def test_relation_between_is_a_band_on_x_then_on_y_then_the_quadrant():
    assert relation_between(64 + 5, 20, 64, 90) == "above"
    assert relation_between(64 - 5, 90, 64, 20) == "below"
    assert relation_between(64 - 6, 59, 64, 64) == "left"
    assert relation_between(64 + 6, 69, 64, 64) == "right"
    for relation, (dx, dy) in DIRECTIONS.items():
        assert relation_between(64 + 6 * dx, 64 + 6 * dy, 64, 64) == relation


@given(*[st.integers(0, 127)] * 4)
def test_swapping_the_objects_reverses_the_relation(x1, y1, x2, y2):
    step, back = (DIRECTIONS[relation_between(*p)] for p in ((x1, y1, x2, y2), (x2, y2, x1, y1)))
    if y1 != y2 or abs(x1 - x2) > 5:  # level on both axes with equal y is "below" either way
        assert back == (-step[0], -step[1])


def test_every_pixel_is_red_blue_or_grey_and_objects_are_whole():
    scenes = sample(300, 0, split="all")
    images = render(scenes)
    assert images.shape == (300, 3, 128, 128)
    assert images.dtype == torch.float32
    grey = (images == 128 / 255).all(1)
    for scene, image, background in zip(scenes, images, grey.numpy(), strict=True):
        first, second = pixels_of(image, scene.color1), pixels_of(image, scene.color2)
        assert (first ^ second ^ background).all()
        # an object that was covered, or cut by the border, would have lost pixels: balanced scenes
        # never overlap
        assert first.sum() == shape_mask(scene.shape1).sum()
        assert second.sum() == shape_mask(scene.shape2).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bounding_box_is_centred_on_the_nominal_centre(shape):
    for x, y in ((17, 17), (111, 111), (40, 77)):
        away = (x + 64) % 128 // 47 * 47 + 17  # any place that is clear of the shape
        other = "circle" if shape != "circle" else "square"
        image = render([Scene(shape, "red", x, y, other, "blue", away, away, "above", "above")])[0]
        rows, columns = np.nonzero(pixels_of(image, "red"))
        assert (columns.min() + columns.max(), rows.min() + rows.max()) == (2 * x, 2 * y)


def test_shapes_have_the_area_and_the_outline_that_their_names_promise():
    # a disc and a polygon drawn on pixel centres cover half a pixel more on every side than their
    # nominal radius
    assert shape_mask("square").shape == shape_mask("circle").shape == (33, 33)
    assert shape_mask("square").all()
    assert shape_mask("circle").sum() == pytest.approx(math.pi * 16.5**2, rel=0.02)
    triangle = shape_mask("triangle")
    assert triangle.shape == (29, 33)
    widths = triangle.sum(axis=1)
    assert (np.diff(widths) >= 0).all()  # apex up
    assert widths[0] == 1
    assert widths[-1] == 33
    for shape in SHAPES:
        assert (shape_mask(shape) == shape_mask(shape)[:, ::-1]).all()


def test_where_objects_overlap_the_second_covers_the_first():
    scene = replace(RED_CIRCLE_LEFT, x1=64, x2=70)
    image = render([scene])[0]
    assert pixels_of(image, "blue").sum() == shape_mask("square").sum()
    assert 0 < pixels_of(image, "red").sum() < shape_mask("circle").sum()


def test_no_scene_is_no_image():
    assert render([]).shape == (0, 3, 128, 128)


def test_there_are_twenty_two_phrases():
    everything = [phrase for phrases in PHRASES.values() for phrase in phrases]
    assert len(everything) == len(set(everything)) == 22
    assert set(PHRASES) == set(RELATIONS)


def test_caption_names_the_colours_that_it_is_told_to():
    scene = RED_CIRCLE_LEFT
    assert caption(scene) == "red circle is left of blue square"
    assert caption(replace(scene, names_color1=False)) == "circle is left of blue square"
    assert caption(replace(scene, names_color2=False)) == "red circle is left of square"
    assert (
        caption(replace(scene, names_color1=False, names_color2=False))
        == "circle is left of square"
    )


def test_a_caption_has_its_scene_back():
    """With other places, whose relation is the caption's, and whose picture the judge accepts."""
    wanted = sample(200, seed=0, split="all")
    found = [from_caption(caption(scene)) for scene in wanted]
    for scene, back in zip(wanted, found, strict=True):
        assert caption(back) == caption(scene)
        assert (
            relation_between(back.x1, back.y1, back.x2, back.y2) == back.relation == scene.relation
        )
        if scene.names_color1 or scene.names_color2:
            assert (back.color1, back.color2) == (scene.color1, scene.color2)
    assert evaluate(render(found), found)["relation_strict"].all()


@pytest.mark.parametrize(
    "text",
    [
        "a horse",
        "red circle is above red square",
        "red circle is above blue circle",
        "red circle above blue square",
    ],
)
def test_a_sentence_that_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="no caption of the task"):
        from_caption(text)


def test_caption_takes_another_phrase():
    assert caption(RED_CIRCLE_LEFT, phrase="higher than") == "red circle is higher than blue square"


def test_color_words_are_fair_coins_unless_both_are_asked_for():
    scenes = sample(4000, 0)
    counts = Counter((s.names_color1, s.names_color2) for s in scenes)
    assert len(counts) == 4
    assert chisquare(list(counts.values())).pvalue > 0.01
    named = sample(100, 0, color_words="both")
    assert all(s.names_color1 and s.names_color2 for s in named)


def test_the_opposite_of_a_scene_is_said_in_as_many_words_of_the_same_objects():
    wanted = sample(300, seed=0, color_words="optional")
    assert {scene.relation for scene in wanted} == set(RELATIONS)
    for scene in wanted:
        other = opposite(scene)
        assert DIRECTIONS[other.relation] == tuple(-step for step in DIRECTIONS[scene.relation])
        assert caption(other) != caption(scene)
        assert len(caption(other).split()) == len(caption(scene).split())
        assert opposite(other) == scene
    found = {scene.phrase: opposite(scene).phrase for scene in wanted}
    assert found["lower than"] == "higher than"
    assert found["below and to the right of"] == "above and to the left of"


def test_words_are_exactly_those_of_captions():
    assert {
        word for s in sample(2000, 0, color_words="both") for word in caption(s).split()
    } == set(WORDS)


def test_options_that_do_not_exist_are_refused():
    for options in ({"split": "heldout"}, {"distribution": "uniform"}, {"color_words": "all"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(options))}='{next(iter(options.values()))}': choose"
        ):
            # past the type checker, as a user calls it
            getattr(sample, "__wrapped__", sample)(2, seed=0, **options)


def test_centres_reach_both_ends_of_their_range_and_a_shared_centre_is_below():
    drawn = sample(4000, 0, split="all", distribution="natural")
    coordinates = [value for scene in drawn for value in (scene.x1, scene.y1, scene.x2, scene.y2)]
    assert (min(coordinates), max(coordinates)) == (17, 111)
    assert relation_between(50, 50, 50, 50) == "below"  # the original's rule: not above, so below
    assert relation_between(50, 49, 55, 50) == "above"
    assert relation_between(50, 50, 56, 55) == "left"
    assert relation_between(50, 50, 56, 56) == "upper_left"
