"""The judge of images: perfect on perfect images, and wrong about a picture as soon as the picture
is wrong.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter

from dit_lens.task import RELATIONS, SHAPES, Scene, evaluate, render, sample
from dit_lens.task.rendering import PIXELS, shape_mask
from dit_lens.task.scene import relation_between

BOOLEANS = ("color", "shape", "unique_binding", "relation_strict", "relation_loose")
CENTRES = ("x1", "y1", "x2", "y2")
LOOSELY = {
    r: {r, *r.replace("upper", "above").replace("lower", "below").split("_")} for r in RELATIONS
}
"""Relations that `relation_loose` accepts when the centres are further than 5 px apart and strictly have a
relation.
"""
SCENE = Scene("triangle", "red", 30, 40, "square", "blue", 90, 42, "left", "left of")
GREY = torch.full((3, 128, 128), 128 / 255)
BLUE, MAROON = (0, 0, 255), (150, 0, 0)
SQUARE = shape_mask("square")
LEVELS = st.sampled_from([0.0, 0.5, 1.0, np.nan])


def verdict(image: torch.Tensor, scene: Scene = SCENE) -> dict[str, float]:
    return {name: value.item() for name, value in evaluate(image[None], [scene]).items()}


def expect(image: torch.Tensor, scene: Scene = SCENE, **expected: float) -> None:
    result = verdict(image, scene)
    assert {name: result[name] for name in expected} == expected


def paint(
    image: torch.Tensor,
    mask: np.ndarray,
    x: int,
    y: int,
    color: tuple[int, int, int] = PIXELS["red"],
) -> torch.Tensor:
    """A copy with `mask` painted on it, its box's centre at (x, y)."""
    image = image.clone()
    top, left = y - mask.shape[0] // 2, x - mask.shape[1] // 2
    image[:, top : top + mask.shape[0], left : left + mask.shape[1]][:, torch.tensor(mask)] = (
        torch.tensor(color)[:, None] / 255
    )
    return image


def disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= (radius + 0.3) ** 2


def block_low_pass(images: np.ndarray) -> np.ndarray:
    """Remainder of a linear patch codec: the lowest 3 × 3 cosine components of every 8 × 8 block and
    channel.
    """
    blocks = images.reshape(*images.shape[:2], 16, 8, 16, 8)
    spectrum = dctn(blocks, axes=(3, 5), norm="ortho")
    spectrum[:, :, :, 3:] = 0
    spectrum[..., 3:] = 0
    return idctn(spectrum, axes=(3, 5), norm="ortho").reshape(images.shape)


def test_ground_truth_is_perfect_to_the_pixel():
    scenes = sample(400, 0, split="all")
    result = evaluate(render(scenes), scenes)
    for name in (*BOOLEANS, "relation_given_both"):
        assert result[name].all(), name
    assert (result.n_objects == 2).all()
    for name in CENTRES:
        assert (result[name] == [getattr(s, name) for s in scenes]).all(), name


SPOILERS = {
    "noise": lambda images, noise: images + 0.05 * noise,
    "blur": lambda images, noise: gaussian_filter(images, (0, 0, 1, 1)),
    "blur and noise": lambda images, noise: gaussian_filter(images, (0, 0, 1, 1)) + 0.05 * noise,
    "codec and noise": lambda images, noise: block_low_pass(images) + 0.05 * noise,
    "pale": lambda images, noise: 0.5 + 0.85 * (images - 0.5),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_slightly_spoilt_images_still_pass(spoil):
    scenes = sample(100, 2, split="all")
    images = render(scenes).numpy()
    noise = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    result = evaluate(torch.from_numpy(spoil(images, noise).astype(np.float32)), scenes)
    for name in BOOLEANS:
        assert result[name].mean() >= 0.99, name
    for name in CENTRES:
        assert abs(result[name] - [getattr(s, name) for s in scenes]).max() <= 1, name


@pytest.mark.parametrize("distribution", ["balanced", "natural"])
def test_measured_centres_obey_the_scalar_rules(distribution):
    """With each scene's relation replaced by any other; overlapping scenes are among the natural
    ones.
    """
    rng = np.random.default_rng(0)
    scenes = [
        replace(s, relation=RELATIONS[rng.integers(8)])
        for s in sample(300, 1, split="all", distribution=distribution)
    ]
    result = evaluate(render(scenes), scenes)
    columns = [
        result[name].values
        for name in ("unique_binding", "relation_strict", "relation_loose", *CENTRES)
    ]
    assert columns[0].all() == (distribution == "balanced")
    for scene, unique, strict, loose, *centre in zip(scenes, *columns, strict=True):
        if unique:
            x1, y1, x2, y2 = (int(v) for v in centre)
            true_relation = relation_between(x1, y1, x2, y2)
            assert strict == (true_relation == scene.relation)
            if max(abs(x1 - x2), abs(y1 - y2)) > 5:
                assert loose == (scene.relation in LOOSELY[true_relation])
                assert loose or not strict
        else:
            assert not strict
            assert not loose
            assert np.isnan(centre).all()


@pytest.mark.parametrize(
    ("x1", "y1", "true_relation"),
    [
        (20, 62, "left"),
        (108, 66, "right"),
        (64, 20, "above"),
        (69, 109, "below"),
        (25, 25, "upper_left"),
        (99, 99, "lower_right"),
    ],
)
def test_moving_an_object_flips_the_relation_and_nothing_else(x1, y1, true_relation):
    scene = replace(SCENE, x1=x1, y1=y1, x2=64, y2=64)
    image = render([scene])[0]
    for claim in RELATIONS:
        expect(
            image,
            # where the scene says that objects are does not matter
            replace(scene, relation=claim, x1=0, y1=0),
            **dict.fromkeys(("color", "shape", "unique_binding"), True),
            relation_strict=claim == true_relation,
            relation_loose=claim in LOOSELY[true_relation],
            relation_given_both=claim in LOOSELY[true_relation],
            **dict(zip(CENTRES, (x1, y1, 64, 64), strict=True)),
        )


def test_strict_asks_for_level_objects_and_loose_does_not():
    for y1, strict in (
        (SCENE.y2 + 5, True),
        (SCENE.y2 + 6, False),
        (SCENE.y2 - 6, False),
        (SCENE.y2 + 60, False),
    ):
        expect(render([replace(SCENE, y1=y1)])[0], relation_strict=strict, relation_loose=True)


@pytest.mark.parametrize(
    "swap", [{"shape1": "square", "shape2": "triangle"}, {"color1": "blue", "color2": "red"}]
)
def test_swapped_attributes_break_binding_only(swap):
    image = render([replace(SCENE, **swap)])[0]
    expect(
        image,
        color=True,
        shape=True,
        n_objects=2,
        unique_binding=False,
        relation_strict=False,
        relation_loose=False,
    )
    result = verdict(image)
    assert np.isnan([result[name] for name in (*CENTRES, "relation_given_both")]).all()


def test_both_swapped_is_the_relation_reversed():
    swap = {"shape1": "square", "shape2": "triangle", "color1": "blue", "color2": "red"}
    expect(
        render([replace(SCENE, **swap)])[0],
        unique_binding=True,
        relation_loose=False,
        x1=SCENE.x2,
        x2=SCENE.x1,
    )


def test_a_duplicate_breaks_binding_but_a_bystander_does_not():
    image = render([SCENE])[0]
    expect(
        paint(image, shape_mask("triangle"), 64, 100),
        n_objects=3,
        color=True,
        shape=True,
        unique_binding=False,
    )
    expect(paint(image, shape_mask("circle"), 64, 100), n_objects=3, relation_strict=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_half_an_object_is_none(shape):
    rows, columns = (side // 2 for side in shape_mask(shape).shape)
    for cut in (np.s_[rows:], np.s_[:rows], np.s_[:, columns:], np.s_[:, :columns]):
        mask = shape_mask(shape).copy()
        mask[cut] = False
        expect(paint(GREY, mask, 64, 64), n_objects=0, shape=False)


@pytest.mark.parametrize("radius", [6, 10, 13, 20, 30])
def test_an_object_of_quite_another_size_is_none(radius):
    expect(paint(GREY, disc(radius), 64, 64), n_objects=0)
    expect(paint(GREY, np.ones((2 * radius + 1,) * 2, dtype=bool), 64, 64), n_objects=0)


@pytest.mark.parametrize("radius", [14, 15, 17, 19])
def test_a_slightly_other_size_changes_neither_shape_nor_place(radius):
    """A large disc covers more of the ideal square than of the ideal circle, so shapes are compared
    at equal area.
    """
    image = paint(
        paint(GREY, np.ones((2 * radius + 1,) * 2, dtype=bool), 40, 40), disc(radius), 90, 90, BLUE
    )
    scene = Scene(
        "square", "red", 0, 0, "circle", "blue", 0, 0, "upper_left", "above and to the left of"
    )
    expect(image, scene, relation_strict=True, x1=40, y1=40, x2=90, y2=90)


@pytest.mark.parametrize(
    "color", [(255, 128, 0), (255, 0, 255), (255, 120, 120), MAROON, (0, 255, 0), (255, 255, 255)]
)
def test_an_object_of_another_colour_is_none(color):
    expect(paint(GREY, SQUARE, 64, 64, color), n_objects=0, color=False)


def test_colour_and_shape_are_judged_apart():
    """A model learns colours before shapes: discs of wrong sizes have `color`; the right outlines
    in maroon have `shape`.
    """
    expect(
        paint(paint(GREY, disc(8), 30, 30), disc(25), 90, 90, BLUE),
        color=True,
        shape=False,
        n_objects=0,
    )
    maroon = paint(paint(GREY, shape_mask("triangle"), 30, 30, MAROON), SQUARE, 90, 90, MAROON)
    expect(maroon, color=False, shape=True, n_objects=0)


def test_other_shapes_are_none():
    for mask in (np.ones((22, 33), dtype=bool), disc(16) & ~np.pad(disc(9), 7), np.tril(SQUARE)):
        expect(paint(GREY, mask, 64, 64), n_objects=0, color=False, shape=False)


def test_merged_and_covered_objects_are_none():
    expect(paint(paint(GREY, shape_mask("triangle"), 50, 64), SQUARE, 75, 64), n_objects=0)
    expect(render([replace(SCENE, x1=SCENE.x2 - 12)])[0], color=True, unique_binding=False)


def test_a_halo_fainter_than_half_does_not_matter():
    pale = tuple(round(128 + 0.4 * (value - 128)) for value in PIXELS["red"])
    image = paint(GREY, np.ones((50, 45), dtype=bool), 58, 66, pale)
    image = paint(paint(image, SQUARE, 54, 60), disc(16), 100, 100, BLUE)
    scene = Scene(
        "square", "red", 0, 0, "circle", "blue", 0, 0, "upper_left", "above and to the left of"
    )
    expect(image, scene, relation_strict=True, x1=54, y1=60)


def test_specks_do_not_matter():
    image = render([SCENE])[0]
    for x, color in ((10, BLUE), (40, PIXELS["red"]), (70, BLUE)):
        image = paint(image, np.ones((9, 11), dtype=bool), x, 100, color)  # 99 px
    image[0, ::16, ::16] = 1
    expect(image, relation_strict=True, n_objects=2)


def test_chance_level_of_the_relation():
    """Each image against all eight claims: strict accepts one; loose accepts three for a diagonal,
    one for level objects.

    Relations being balanced, a model that ignores the relation therefore scores 1/8 and 1/4.
    """
    scenes = sample(120, 4, split="all")
    images = render(scenes)
    results = [
        evaluate(images, [replace(s, relation=claim) for s in scenes]) for claim in RELATIONS
    ]
    assert (np.sum([r.relation_strict.values for r in results], axis=0) == 1).all()
    assert np.sum([r.relation_loose.values for r in results], axis=0).tolist() == [
        len(LOOSELY[s.relation]) for s in scenes
    ]


def test_shuffled_scenes_score_at_chance():
    scenes = sample(800, 5, split="all")
    order = np.random.default_rng(0).permutation(len(scenes))
    result = evaluate(render(scenes), [scenes[i] for i in order])
    mean = {name: value.item() for name, value in result.mean().items()}
    assert mean["color"] == 1
    assert mean["shape"] == pytest.approx(1 / 3, abs=0.05)  # the same two of three shapes …
    # … and the same colours on them
    assert mean["unique_binding"] == pytest.approx(1 / 6, abs=0.04)
    assert mean["relation_given_both"] == pytest.approx(
        mean["relation_loose"] / mean["unique_binding"]
    )
    assert mean["relation_given_both"] == pytest.approx(1 / 4, abs=0.1)


NO_PICTURES = {
    "black": torch.zeros(3, 128, 128),
    "saturated": torch.ones(3, 128, 128),
    "all red": torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 128, 128),
    "nan": torch.full((3, 128, 128), torch.nan),
    "inf": torch.full((3, 128, 128), torch.inf),
    "uniform noise": torch.rand(3, 128, 128, generator=torch.manual_seed(0)),
}


@pytest.mark.parametrize("image", NO_PICTURES.values(), ids=NO_PICTURES)
def test_no_picture_is_an_error(image):
    expect(
        image,
        n_objects=0,
        color=False,
        shape=False,
        unique_binding=False,
        relation_strict=False,
        relation_loose=False,
    )


@settings(max_examples=30)
@given(
    hnp.arrays(np.float32, (2, 3, 16, 16), elements=LEVELS | st.floats(width=32), fill=LEVELS),
    st.integers(0, 50),
)
def test_any_array_gets_a_consistent_verdict(coarse, seed):
    # blocks, so that regions are large
    images = torch.from_numpy(coarse).repeat_interleave(8, 2).repeat_interleave(8, 3)
    result = evaluate(images, sample(2, seed))
    assert (result.unique_binding | ~(result.relation_loose | result.relation_strict)).all()
    assert ((result.color & result.shape) | ~result.unique_binding).all()
    for name in (*CENTRES, "relation_given_both"):
        assert (result[name].isnull() == ~result.unique_binding).all()


def test_a_batch_is_its_images():
    scenes = sample(70, 3, split="all", distribution="natural")  # more than one chunk
    images = render(scenes) + 0.1 * torch.randn(70, 3, 128, 128, generator=torch.manual_seed(0))
    whole = evaluate(images, scenes)
    order = np.random.default_rng(0).permutation(70)
    shuffled = evaluate(images[order], [scenes[i] for i in order])
    for name in whole:
        np.testing.assert_array_equal(whole[name].values[order], shuffled[name].values)
    # an object on the lower border and one on the upper border of the next image do not touch
    stacked = torch.stack([paint(GREY, SQUARE, 64, 111), paint(GREY, SQUARE, 64, 16)])
    assert (evaluate(stacked, [SCENE, SCENE]).n_objects == 1).all()


def test_pixels_beyond_the_range_are_clipped_and_nan_is_background():
    image = render([SCENE])[0]
    expect(
        torch.where(image == 1, 7.0, torch.where(image == 0, -torch.inf, torch.nan)),
        relation_strict=True,
    )


def test_an_overshoot_of_the_background_is_no_color():
    """(1.9, .95, .95) is (1, .95, .95), nearly white."""
    image = render([SCENE])[0]
    bright = torch.tensor([1.9, 0.95, 0.95])[:, None, None].expand_as(image)
    background = (image == image[:, :1, :1]).all(dim=0)
    expect(torch.where(background, bright, image), relation_strict=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_precision_and_gradients_are_taken(dtype):
    expect(render([SCENE])[0].to(dtype).requires_grad_(), relation_strict=True)


def test_wrong_sizes_are_explained():
    image = render([SCENE])
    with pytest.raises(
        ValueError, match=r"images must have shape \(2, 3, 128, 128\).* not \(1, 3, 128, 128\)"
    ):
        evaluate(image, [SCENE, SCENE])
    with pytest.raises(ValueError, match=r"not \(1, 3, 64, 64\)"):
        evaluate(image[:, :, :64, :64], [SCENE])
    assert evaluate(image[:0], []).sizes == {"image": 0}


def test_results_are_labelled_and_group_by_the_scene():
    scenes = sample(80, 6)
    result = evaluate(render(scenes), scenes)
    for part in ("relation", "phrase", "shape1", "color1", "shape2", "color2"):
        assert result[part].values.tolist() == [getattr(s, part) for s in scenes]
    assert all(result[name].attrs["description"] for name in result)
    assert all(result[name].dtype == bool for name in BOOLEANS)
    table = result.groupby("relation").mean()
    assert set(table.relation.values) == set(RELATIONS)
    assert (table.relation_strict == 1).all()
