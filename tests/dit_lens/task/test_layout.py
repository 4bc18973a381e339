"""Layout by colours alone, stray regions, and the paper's rules: against scenes whose objects are
known.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dit_lens import scenes
from dit_lens.task.judge import MIN_AREA
from dit_lens.task.paper_rules import detect_objects

WANTED = scenes.sample(200, seed=3, split="all", color_words="both")
IMAGES = scenes.render(WANTED)


def test_the_layout_of_a_scene_is_its_own():
    seen = scenes.layout(IMAGES, WANTED)
    assert seen["layout"].all()
    x, y = np.array([scenes.DIRECTIONS[s.relation] for s in WANTED]).T
    np.testing.assert_array_equal(seen["x_sign"], x)
    np.testing.assert_array_equal(seen["y_sign"], y)
    np.testing.assert_allclose(seen["dx"], [s.x1 - s.x2 for s in WANTED], atol=0.6)
    axes = {"vertical": {"above", "below"}, "horizontal": {"left", "right"}}
    for axis, relations in axes.items():
        assert set(seen["relation"].values[seen["axis"].values == axis]) == relations
    assert not scenes.layout(IMAGES, [scenes.opposite(s) for s in WANTED])["layout"].any()


def test_the_layout_is_blind_to_shapes_and_the_judge_is_not():
    others = [replace(s, shape1=s.shape2, shape2=s.shape1) for s in WANTED]
    assert scenes.layout(IMAGES, others)["layout"].all()
    assert not scenes.evaluate(IMAGES, others)["relation_loose"].any()


def test_a_lost_color_has_no_layout():
    red_alone = IMAGES.clone()
    red_alone[:, :, :] = torch.where(
        (IMAGES[:, 2:] > IMAGES[:, :1] + 0.3).expand_as(IMAGES), torch.tensor(0.5), IMAGES
    )
    seen = scenes.layout(red_alone, WANTED)
    assert np.isnan(seen["dx"]).all()
    assert np.isnan(seen["y_sign"]).all()
    assert not seen["layout"].any()
    assert len(scenes.layout(IMAGES[:0], [])["layout"]) == 0


def blob(image: torch.Tensor, size: int) -> torch.Tensor:
    """The image with a red bar of `size` pixels in a free corner."""
    found = image.clone()
    for top, left in ((0, 0), (0, 100), (120, 0), (120, 100)):
        window = found[:, top : top + 8, left : left + 28]
        if (window - 0.5).abs().max() < 0.02:
            window[:, :5, : size // 5] = torch.tensor([1.0, 0, 0])[:, None, None]
            return found
    raise AssertionError("no free corner")


def test_a_stray_region_is_counted_and_a_speck_is_not():
    for size, stray in ((90, 0), (140, 1)):
        images = torch.stack([blob(image, size) for image in IMAGES[:40]])
        seen = scenes.evaluate(images, WANTED[:40])
        assert (seen["n_stray"] == stray).all()
        assert (seen["unique_binding"] == (stray == 0)).all()
        assert (seen["n_objects"] == 2).all()


def test_the_papers_rules_pass_the_papers_own_images():
    seen = scenes.paper_verdicts(IMAGES, WANTED)
    for name in ("color", "shape", "unique_binding"):
        assert seen[name].all(), name
    cardinal = np.array([s.relation in ("left", "right") for s in WANTED])
    assert seen["relation_loose"].mean() > 0.97
    assert seen["relation_strict"][~cardinal].mean() > 0.97
    assert not scenes.paper_verdicts(IMAGES, [scenes.opposite(s) for s in WANTED])[
        "relation_loose"
    ].any()


def test_the_papers_triangle_is_about_a_pixel_high():
    differences = []
    for image, scene in zip(IMAGES.numpy() * 255, WANTED, strict=True):
        for found in detect_objects(image):
            for shape, color, x, y in scene.objects:
                if (shape, color) == (found.shape, found.color):
                    differences.append((shape, found.x - x, found.y - y))
    for shape in scenes.SHAPES:
        x, y = np.array([d[1:] for d in differences if d[0] == shape]).T
        assert abs(x).max() <= 1
        assert set(y) == ({-1} if shape == "triangle" else {0})


def test_an_object_is_the_largest_region_of_its_color_from_the_smallest_area_on():
    image = torch.full((3, 128, 128), 0.5)
    blue = torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    image[:, 10:22, 10:22] = red  # read first, and smaller than the next
    image[:, 60:90, 20:50] = red
    image[:, 70:80, 90 : 90 + MIN_AREA // 10] = blue
    scene = scenes.Scene("square", "red", 35, 75, "circle", "blue", 98, 75, "left", "left of")
    assert MIN_AREA % 10 == 0
    seen = scenes.layout(image[None], [scene])
    assert seen["dx"].item() == 34.5 - (90 + (MIN_AREA // 10 - 1) / 2)
    assert seen["dy"].item() == 0
    image[:, 79, 90] = 0.5  # one pixel fewer than an object has
    assert np.isnan(scenes.layout(image[None], [scene])["dx"].item())
