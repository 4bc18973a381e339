"""Three objects and two relations: what is said, drawn and judged is what the record holds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens import scenes
from dit_lens.task import HELD_OUT, RELATIONS, TRIO_PHRASES, Scene, Trio, sample_trios
from dit_lens.task.rendering import shape_mask
from dit_lens.task.scene import relation_between
from dit_lens.task.sentences import all_trio_captions

TRIOS = sample_trios(512, seed=3)


@settings(max_examples=10)
@given(
    n=st.integers(0, 100),
    more=st.integers(0, 70),
    start=st.integers(0, 100),
    seed=st.integers(0, 2**32),
)
def test_a_sample_is_a_window_of_one_endless_sequence(n, more, start, seed):
    window = sample_trios(n, seed, start=start)
    assert len(window) == n
    assert window == sample_trios(start + n + more, seed)[start : start + n]


def test_a_seed_names_its_sequence_for_good():
    """Bundled models were trained on these: a generator for each chunk of 64, seeded by (seed,
    chunk, 3).
    """
    assert [scenes.caption(trio) for trio in sample_trios(2, seed=3, start=63)] == [
        "blue circle is to the lower right of red triangle and above red square",
        "blue circle is to the lower right of red triangle and below blue square",
    ]
    assert TRIOS[0].objects == (
        ("triangle", "blue", 28, 80),
        ("square", "red", 28, 36),
        ("circle", "red", 78, 89),
    )


def test_a_caption_names_both_relations_and_three_objects():
    first = Scene("circle", "red", 64, 30, "square", "blue", 64, 90, "above", "higher than")
    second = Scene(
        "circle", "red", 64, 30, "triangle", "red", 100, 90, "upper_left", "to the upper left of"
    )
    said = scenes.caption(Trio(first, second))
    assert said == "red circle is higher than blue square and to the upper left of red triangle"
    assert scenes.caption(Trio(first, second), "below") == said.replace("higher than", "below")


def test_every_trio_obeys_both_relations_and_shares_object_1():
    for trio in TRIOS:
        first, second = trio.first, trio.second
        assert first.objects[0] == second.objects[0] == trio.objects[0]
        assert {shape for shape, *_ in trio.objects} == set(scenes.SHAPES)
        assert first.color2 != first.color1
        assert first.relation != second.relation
        for scene in (first, second):
            assert relation_between(scene.x1, scene.y1, scene.x2, scene.y2) == scene.relation
            assert scene.phrase in TRIO_PHRASES[scene.relation]


def test_one_pixel_of_background_lies_between_two_boxes_at_least_and_at_times_no_more():
    sizes = {shape: shape_mask(shape).shape for shape in scenes.SHAPES}
    gaps = [
        max(
            abs(x1 - x2) - sizes[one][1] // 2 - sizes[other][1] // 2,
            abs(y1 - y2) - sizes[one][0] // 2 - sizes[other][0] // 2,
        )
        for trio in TRIOS
        for (one, _, x1, y1), (other, _, x2, y2) in itertools.combinations(trio.objects, 2)
    ]
    assert min(gaps) - 1 == 1


def test_all_relations_colours_and_captions_occur():
    assert (
        {trio.first.relation for trio in TRIOS}
        == {trio.second.relation for trio in TRIOS}
        == set(RELATIONS)
    )
    assert {(trio.first.color1, trio.second.color2) for trio in TRIOS} == {
        (a, b) for a in scenes.COLORS for b in scenes.COLORS
    }
    captions = all_trio_captions()
    # ordered phrases of two relations
    assert len(captions) == len(set(captions)) == 6 * 4 * (14**2 - 2 * 3**2 - 2 * 2**2 - 4)
    assert {scenes.caption(trio) for trio in TRIOS} <= set(captions)


def test_held_out_combinations_stay_out_of_training():
    for trio in TRIOS:
        assert trio.first.combination not in HELD_OUT
        assert trio.second.combination not in HELD_OUT
    assert all(
        trio.first.combination in HELD_OUT for trio in sample_trios(64, seed=3, split="held_out")
    )


def test_perfect_images_score_one_and_every_object_is_whole():
    images = scenes.render(TRIOS)
    verdict = scenes.evaluate(images, TRIOS)
    for name in (
        "color",
        "shape",
        "unique_binding",
        "relation_strict",
        "relation_loose",
        "relation1_loose",
        "relation2_loose",
    ):
        assert verdict[name].values.all(), name
    assert (verdict["n_objects"] == 3).all()
    for i in (1, 2, 3):
        assert verdict[f"x{i}"].values.tolist() == [trio.objects[i - 1][2] for trio in TRIOS]
        assert verdict[f"y{i}"].values.tolist() == [trio.objects[i - 1][3] for trio in TRIOS]
    painted = (images != images[0, :, 0, 0][:, None, None]).any(dim=1).sum(dim=(1, 2)).numpy()
    assert (painted == sum(shape_mask(shape).sum() for shape in scenes.SHAPES)).all()


@pytest.mark.parametrize(("missing", "hurt"), [(1, "relation1_loose"), (2, "relation2_loose")])
def test_each_relation_is_judged_by_its_own_objects(missing, hurt):
    """Pictures that lack one object: the relation that speaks of it fails, the other does not, and
    nothing holds as a whole.
    """
    lacking = [trio.second if missing == 1 else trio.first for trio in TRIOS]
    verdict = scenes.evaluate(scenes.render(lacking), TRIOS)
    other = {"relation1_loose": "relation2_loose", "relation2_loose": "relation1_loose"}[hurt]
    assert not verdict[hurt].values.any()
    assert verdict[other].values.all()
    assert not verdict["relation_loose"].values.any()
    assert np.isnan(verdict["relation_given_both"].values).all()


def test_a_mirrored_picture_has_the_objects_but_neither_relation():
    def mirrored(scene: Scene) -> Scene:
        return replace(
            scene, x1=128 - scene.x1, y1=128 - scene.y1, x2=128 - scene.x2, y2=128 - scene.y2
        )

    verdict = scenes.evaluate(
        scenes.render([Trio(mirrored(trio.first), mirrored(trio.second)) for trio in TRIOS]), TRIOS
    )
    assert verdict["unique_binding"].values.all()
    for name in ("relation1_loose", "relation2_loose", "relation_strict"):
        assert not verdict[name].values.any(), name
    assert (verdict["relation_given_both"] == 0).all()
