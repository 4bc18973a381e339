"""The judge of images: perfect on perfect images, and wrong about a picture as soon as the picture is wrong."""

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

from dit_lens.scenes import RELATIONS, SHAPES, Scene, evaluate, render, sample
from dit_lens.scenes.rendering import PIXELS, shape_mask
from dit_lens.scenes.scene import relation_between

BOOLEANS = ("color", "shape", "unique_binding", "relation_strict", "relation_loose")
CENTRES = ("x1", "y1", "x2", "y2")
LOOSELY = {
    "above": {"above"},
    "below": {"below"},
    "left": {"left"},
    "right": {"right"},
    "upper_left": {"upper_left", "above", "left"},
    "upper_right": {"upper_right", "above", "right"},
    "lower_left": {"lower_left", "below", "left"},
    "lower_right": {"lower_right", "below", "right"},
}
"""What `relation_loose` accepts for centres of a given (strict) relation."""
SCENE = Scene("triangle", "red", 30, 40, "square", "blue", 90, 42, "left", "left of")


def verdict(image: torch.Tensor, scene: Scene = SCENE) -> dict[str, float]:
    """The values of one image."""
    return {name: value.item() for name, value in evaluate(image[None], [scene]).items()}


def paint(image: torch.Tensor, mask: np.ndarray, x: int, y: int, color=PIXELS["red"]) -> torch.Tensor:
    """A copy with `mask` painted on it, its box's centre at (x, y)."""
    image = image.clone()
    top, left = y - mask.shape[0] // 2, x - mask.shape[1] // 2
    patch = image[:, top : top + mask.shape[0], left : left + mask.shape[1]]
    patch[:, torch.from_numpy(mask.copy())] = torch.tensor(color)[:, None] / 255
    return image


def disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= (radius + 0.3) ** 2


# --- perfect images, and nearly perfect ones -------------------------------------------------------


def test_ground_truth_is_perfect_to_the_pixel():
    scenes = sample(1000, 0, split="all")
    result = evaluate(render(scenes), scenes)
    for name in (*BOOLEANS, "relation_given_both"):
        assert result[name].all(), name
    assert (result.n_objects == 2).all()
    for name in CENTRES:
        assert (result[name] == [getattr(s, name) for s in scenes]).all(), name


@pytest.mark.parametrize("distribution", ["balanced", "natural"])
def test_measured_centres_obey_the_documented_rules(distribution):
    """Against the scalar rules, with the scene's relation replaced by any other."""
    rng = np.random.default_rng(0)
    scenes = [replace(s, relation=RELATIONS[rng.integers(8)]) for s in sample(500, 1, split="all", distribution=distribution)]
    result = evaluate(render(scenes), scenes)
    loose_rule = {
        "above": lambda dx, dy: dy < -5,
        "below": lambda dx, dy: dy > 5,
        "left": lambda dx, dy: dx < -5,
        "right": lambda dx, dy: dx > 5,
        "upper_left": lambda dx, dy: dx < -5 and dy < -5,
        "upper_right": lambda dx, dy: dx > 5 and dy < -5,
        "lower_left": lambda dx, dy: dx < -5 and dy > 5,
        "lower_right": lambda dx, dy: dx > 5 and dy > 5,
    }
    for scene, unique, strict, loose, *centre in zip(
        scenes, *(result[n].values for n in ("unique_binding", "relation_strict", "relation_loose", *CENTRES)), strict=True
    ):
        if not unique:
            assert not strict
            assert not loose
            assert np.isnan(centre).all()
            continue
        x1, y1, x2, y2 = (int(v) for v in centre)
        assert strict == (relation_between(x1, y1, x2, y2) == scene.relation)
        assert loose == loose_rule[scene.relation](x1 - x2, y1 - y2)
        if max(abs(x1 - x2), abs(y1 - y2)) > 5:
            assert loose or not strict


def block_low_pass(images: np.ndarray) -> np.ndarray:
    """What a linear patch codec leaves: the lowest 3 × 3 cosine components of every 8 × 8 block and channel."""
    blocks = images.reshape(*images.shape[:2], 16, 8, 16, 8)
    spectrum = dctn(blocks, axes=(3, 5), norm="ortho")
    spectrum[:, :, :, 3:] = 0
    spectrum[..., 3:] = 0
    return idctn(spectrum, axes=(3, 5), norm="ortho").reshape(images.shape)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda images, noise: images + 0.05 * noise, id="noise"),
        pytest.param(lambda images, noise: gaussian_filter(images, (0, 0, 1, 1)), id="blur"),
        pytest.param(lambda images, noise: gaussian_filter(images, (0, 0, 1, 1)) + 0.05 * noise, id="blur and noise"),
        pytest.param(lambda images, noise: block_low_pass(images) + 0.05 * noise, id="codec and noise"),
        pytest.param(lambda images, noise: 0.5 + 0.85 * (images - 0.5), id="pale"),
    ],
)
def test_slightly_spoilt_images_still_pass(spoil):
    scenes = sample(250, 2, split="all")
    images = render(scenes).numpy()
    noise = np.random.default_rng(0).standard_normal(images.shape)
    result = evaluate(torch.from_numpy(spoil(images, noise).astype(np.float32)), scenes)
    for name in BOOLEANS:
        assert result[name].mean() >= 0.99, name
    for name in CENTRES:
        assert abs(result[name] - [getattr(s, name) for s in scenes]).max() <= 1, name


# --- wrong pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x1", "y1", "true_relation"),
    [
        (20, 62, "left"),
        (108, 66, "right"),
        (64, 20, "above"),
        (69, 109, "below"),
        (25, 25, "upper_left"),
        (100, 25, "upper_right"),
    ],
)
def test_moving_an_object_flips_the_relation_and_nothing_else(x1, y1, true_relation):
    scene = replace(SCENE, x1=x1, y1=y1, x2=64, y2=64)
    image = render([scene])[0]
    for claim in RELATIONS:
        result = verdict(image, replace(scene, relation=claim))
        assert result["color"]
        assert result["shape"]
        assert result["unique_binding"]
        assert result["relation_strict"] == (claim == true_relation)
        assert result["relation_loose"] == (claim in LOOSELY[true_relation])
        assert result["relation_given_both"] == result["relation_loose"]
        assert [result[name] for name in CENTRES] == [x1, y1, 64, 64]


def test_strict_asks_for_level_objects_and_loose_does_not():
    tilted = verdict(render([replace(SCENE, y1=80)])[0])  # lower left, judged as "left"
    assert not tilted["relation_strict"]
    assert tilted["relation_loose"]
    assert verdict(render([replace(SCENE, y1=SCENE.y2 + 5)])[0])["relation_strict"]
    assert not verdict(render([replace(SCENE, y1=SCENE.y2 + 6)])[0])["relation_strict"]


@pytest.mark.parametrize(
    "swapped",
    [
        pytest.param(replace(SCENE, shape1=SCENE.shape2, shape2=SCENE.shape1), id="shapes"),
        pytest.param(replace(SCENE, color1=SCENE.color2, color2=SCENE.color1), id="colours"),
    ],
)
def test_swapped_attributes_break_binding_only(swapped):
    result = verdict(render([swapped])[0])
    assert result["color"]
    assert result["shape"]
    assert result["n_objects"] == 2
    assert not result["unique_binding"]
    assert not result["relation_strict"]
    assert not result["relation_loose"]
    assert np.isnan([result[name] for name in (*CENTRES, "relation_given_both")]).all()


def test_both_swapped_is_the_same_scene_told_from_the_other_side():
    swapped = replace(SCENE, shape1=SCENE.shape2, color1=SCENE.color2, shape2=SCENE.shape1, color2=SCENE.color1, relation="left")
    result = verdict(render([swapped])[0])
    assert result["unique_binding"]
    assert not result["relation_loose"]


def test_a_duplicate_breaks_binding_but_a_bystander_does_not():
    image = render([SCENE])[0]
    twice = verdict(paint(image, shape_mask("triangle"), 64, 100))
    assert twice["n_objects"] == 3
    assert twice["color"]
    assert twice["shape"]
    assert not twice["unique_binding"]
    bystander = verdict(paint(image, shape_mask("circle"), 64, 100))
    assert bystander["n_objects"] == 3
    assert bystander["relation_strict"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", ["upper", "lower", "left", "right"])
def test_half_an_object_is_none(shape, half):
    mask = shape_mask(shape).copy()
    rows, columns = mask.shape[0] // 2, mask.shape[1] // 2
    mask[{"upper": np.s_[rows:], "lower": np.s_[:rows], "left": np.s_[:, columns:], "right": np.s_[:, :columns]}[half]] = 0
    grey = torch.full((3, 128, 128), 128 / 255)
    assert verdict(paint(grey, mask, 64, 64))["n_objects"] == 0


@pytest.mark.parametrize("radius", [6, 10, 13, 20, 30])
def test_an_object_of_another_size_is_none(radius):
    grey = torch.full((3, 128, 128), 128 / 255)
    assert verdict(paint(grey, disc(radius), 64, 64))["n_objects"] == 0


@pytest.mark.parametrize("radius", [14, 15, 17, 19])
def test_a_slightly_other_size_neither_hides_an_object_nor_changes_its_shape_or_place(radius):
    """A large disc covers more of the ideal square than of the ideal circle, so shapes are compared at equal area."""
    result = verdict(paint(render([SCENE])[0], disc(radius), 60, 100), replace(SCENE, shape1="circle"))
    assert result["unique_binding"]
    assert (result["x1"], result["y1"]) == (60, 100)
    square = paint(torch.full((3, 128, 128), 128 / 255), np.ones((2 * radius + 1, 2 * radius + 1), dtype=bool), 60, 60)
    blue_circle = paint(square, shape_mask("circle"), 100, 100, PIXELS["blue"])
    scene = Scene("square", "red", 60, 60, "circle", "blue", 100, 100, "upper_left", "above and to the left of")
    assert verdict(blue_circle, scene)["relation_strict"]


@pytest.mark.parametrize("color", [(255, 128, 0), (255, 0, 255), (255, 120, 120), (150, 0, 0), (0, 255, 0), (255, 255, 255)])
def test_an_object_of_another_colour_is_none(color):
    grey = torch.full((3, 128, 128), 128 / 255)
    assert verdict(paint(grey, shape_mask("square"), 64, 64, color))["n_objects"] == 0


def test_colour_and_shape_are_judged_apart():
    """A model learns colours before shapes: blobs of the right colours have `color`; the right outlines in maroon `shape`."""
    grey = torch.full((3, 128, 128), 128 / 255)
    blobs = paint(paint(grey, disc(8), 30, 30), disc(25), 90, 90, PIXELS["blue"])
    result = verdict(blobs)
    assert (result["color"], result["shape"], result["n_objects"]) == (True, False, 0)
    maroon = paint(paint(grey, shape_mask("triangle"), 30, 30, (150, 0, 0)), shape_mask("square"), 90, 90, (150, 0, 0))
    result = verdict(maroon)
    assert (result["color"], result["shape"], result["n_objects"]) == (False, True, 0)


def test_merged_objects_and_overlap_are_none():
    grey = torch.full((3, 128, 128), 128 / 255)
    merged = paint(paint(grey, shape_mask("triangle"), 50, 64), shape_mask("square"), 75, 64)
    assert verdict(merged)["n_objects"] == 0
    covered = verdict(render([replace(SCENE, x1=SCENE.x2 - 12)])[0])
    assert covered["color"]
    assert not covered["unique_binding"]


def test_specks_do_not_matter():
    image = render([SCENE])[0]
    for i, (x, y) in enumerate([(10, 100), (40, 110), (70, 100), (100, 110)]):
        image = paint(image, np.ones((9, 11), dtype=bool), x, y, list(PIXELS.values())[i % 2])  # 99 px
    image[0, ::16, ::16] = 1
    result = verdict(image)
    assert result["relation_strict"]
    assert result["n_objects"] == 2


def test_images_are_judged_one_by_one():
    """A square cut by the lower border and one cut by the upper border of the next image are not one square."""
    upper, lower = torch.full((2, 3, 128, 128), 128 / 255)
    upper[:, -17:, 50:83] = torch.tensor([1.0, 0, 0])[:, None, None]
    lower[:, :16, 50:83] = torch.tensor([1.0, 0, 0])[:, None, None]
    assert (evaluate(torch.stack([upper, lower]), [SCENE, SCENE]).n_objects == 0).all()


def test_a_batch_is_its_images():
    scenes = sample(140, 3, split="all", distribution="natural")  # more than one chunk
    images = render(scenes) + 0.1 * torch.randn(140, 3, 128, 128, generator=torch.manual_seed(0))
    whole = evaluate(images, scenes)
    order = np.random.default_rng(0).permutation(140)
    shuffled = evaluate(images[order], [scenes[i] for i in order])
    for name in whole:
        np.testing.assert_array_equal(whole[name].values[order], shuffled[name].values)


# --- controls: what a blind model scores -----------------------------------------------------------


def test_chance_level_of_the_relation():
    """Every image against all eight relations: strict is one in eight exactly; loose accepts a diagonal's two sides too.

    A diagonal scene satisfies three relations loosely, a level one only its own, so a quarter of all (scene, claim) pairs.
    """
    scenes = sample(400, 4, split="all")
    images = render(scenes)
    results = [evaluate(images, [replace(s, relation=claim) for s in scenes]) for claim in RELATIONS]
    strict = np.sum([r.relation_strict.values for r in results], axis=0)
    loose = np.sum([r.relation_loose.values for r in results], axis=0)
    assert (strict == 1).all()
    assert loose.tolist() == [len(LOOSELY[s.relation]) for s in scenes]


def test_shuffled_scenes_score_at_chance():
    scenes = sample(1200, 5, split="all")
    order = np.random.default_rng(0).permutation(len(scenes))
    result = evaluate(render(scenes), [scenes[i] for i in order])
    unique = result.unique_binding.mean().item()
    assert result.color.mean() == 1
    assert result.shape.mean().item() == pytest.approx(1 / 3, abs=0.04)  # the same two of three shapes
    assert unique == pytest.approx(1 / 6, abs=0.04)  # and the same colours on them
    given = result.relation_given_both.mean().item()
    assert given == pytest.approx(result.relation_loose.mean().item() / unique)
    assert given == pytest.approx(1 / 4, abs=0.09)


# --- any input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(torch.zeros(3, 128, 128), id="black"),
        pytest.param(torch.ones(3, 128, 128), id="saturated"),
        pytest.param(torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 128, 128), id="all red"),
        pytest.param(torch.full((3, 128, 128), torch.nan), id="nan"),
        pytest.param(torch.full((3, 128, 128), torch.inf), id="inf"),
        pytest.param(torch.rand(3, 128, 128, generator=torch.manual_seed(0)), id="uniform noise"),
        pytest.param(torch.eye(128).expand(3, 128, 128), id="diagonal"),
    ],
)
def test_no_picture_is_an_error(image):
    result = verdict(image)
    assert result["n_objects"] == 0
    assert not result["shape"]
    assert not result["relation_loose"]


@settings(max_examples=40)
@given(
    hnp.arrays(
        np.float32,
        (2, 3, 16, 16),
        elements=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(width=32),
        fill=st.sampled_from([0.0, 0.5, 1.0, np.nan]),
    ),
    st.integers(0, 50),
)
def test_any_array_gets_a_consistent_verdict(coarse, seed):
    images = torch.from_numpy(coarse).repeat_interleave(8, 2).repeat_interleave(8, 3)  # blocks, so that regions are large
    result = evaluate(images, sample(2, seed))
    for weaker, stronger in (
        ("shape", "unique_binding"),
        ("color", "unique_binding"),
        ("unique_binding", "relation_loose"),
        ("unique_binding", "relation_strict"),
    ):
        assert (result[weaker] | ~result[stronger]).all()
    for name in (*CENTRES, "relation_given_both"):
        assert (result[name].isnull() == ~result.unique_binding).all()


def test_pixels_beyond_the_range_are_clipped_and_nan_is_background():
    image = render([SCENE])[0]
    stretched = torch.where(image == 1, 7.0, torch.where(image == 0, -torch.inf, torch.nan))
    assert verdict(stretched)["relation_strict"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_precision_and_gradients_are_taken(dtype):
    assert verdict(render([SCENE])[0].to(dtype).requires_grad_())["relation_strict"]


def test_wrong_sizes_are_explained():
    image = render([SCENE])
    with pytest.raises(ValueError, match=r"images must have shape \(2, 3, 128, 128\).* not \(1, 3, 128, 128\)"):
        evaluate(image, [SCENE, SCENE])
    with pytest.raises(ValueError, match="not \\(1, 3, 64, 64\\)"):
        evaluate(image[:, :, :64, :64], [SCENE])


def test_no_images_are_no_verdicts():
    result = evaluate(torch.empty(0, 3, 128, 128), [])
    assert result.sizes == {"image": 0}


# --- labels ----------------------------------------------------------------------------------------


def test_results_are_labelled_and_group_by_the_scene():
    scenes = sample(80, 6)
    result = evaluate(render(scenes), scenes)
    assert result.relation.values.tolist() == [s.relation for s in scenes]
    assert result.phrase.values.tolist() == [s.phrase for s in scenes]
    assert all(result[name].attrs["description"] for name in result)
    assert all(result[name].dtype == bool for name in BOOLEANS)
    table = result.groupby("relation").mean()
    assert set(table.relation.values) == set(RELATIONS)
    assert (table.relation_strict == 1).all()
