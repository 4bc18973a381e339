"""Image groups against pixel counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens.task import sample
from dit_lens.task.image_groups import image_groups_from_images, image_groups_from_scenes
from dit_lens.task.judge import MIN_AREA
from dit_lens.task.rendering import half_size, render

RED, BLUE = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])


def painted(red: int, blue: int) -> torch.Tensor:
    """A white image with so many red and blue pixels, row by row from the upper and the lower
    end.
    """
    pixels = torch.ones(128 * 128, 3)
    pixels[:red], pixels[len(pixels) - blue :] = RED, BLUE
    return pixels.T.reshape(1, 3, 128, 128)


@pytest.mark.parametrize("red", [0, 1, MIN_AREA - 1, MIN_AREA, MIN_AREA + 1, 5000])
def test_an_object_below_the_judges_smallest_area_is_absent(red: int) -> None:
    groups = image_groups_from_images(painted(red, 3000), grid=(8, 8))
    seen = red if red >= MIN_AREA else 0
    assert groups["red"].sum() == pytest.approx(64 * seen / 128**2)
    assert groups["blue"].sum() == pytest.approx(64 * 3000 / 128**2)
    assert torch.allclose(sum(groups.values()), torch.ones(1, 64))
    if seen:
        # whole rows of tokens, from the upper left corner
        assert groups["red"][0, : seen // (128 * 16)].eq(1).all()


def test_a_threshold_is_reached_by_the_share_that_equals_it() -> None:
    image = torch.ones(1, 3, 128, 128)
    image[:, :, :8, :16] = RED[:, None, None]  # half of token 0
    image[:, :, 64:, :] = BLUE[:, None, None]
    for threshold, red in ((0.5, 1), (0.51, 0), (0.1, 1)):
        groups = image_groups_from_images(image, grid=(8, 8), threshold=threshold)
        assert groups["red"].sum() == red
        assert groups["blue"].sum() == 32
        assert groups["background"].sum() == 32 - red
        assert not (groups["red"] & groups["background"]).any()


def test_objects_are_those_of_the_scene_wherever_they_lie() -> None:
    drawn = sample(24, seed=0, color_words="both")
    groups = image_groups_from_scenes(drawn)
    assert {tuple(group.shape) for group in groups.values()} == {(24, 64)}
    images = render(drawn)
    for row, scene in enumerate(drawn):
        for number, (shape, color, x, y) in enumerate(scene.objects, start=1):
            center = groups[f"object{number}"][row].reshape(8, 8)
            rows, columns = np.indices((8, 8))
            mass = center.numpy()
            place = (
                (mass * columns).sum() / mass.sum() * 16 + 8,
                (mass * rows).sum() / mass.sum() * 16 + 8,
            )
            assert np.abs(np.array(place) - (x, y)).max() < 4 + max(half_size(shape)) / 4, (
                scene,
                place,
            )
            channel = 0 if color == "red" else 2
            inside = images[row, :, y, x]
            assert inside[channel] > 0.9
            assert inside[2 - channel] < 0.1


def test_a_grid_may_have_more_columns_than_rows() -> None:
    image = torch.ones(1, 3, 64, 128)
    image[:, :, :16, 112:] = RED[:, None, None]
    groups = image_groups_from_images(image, grid=(4, 8))
    assert groups["red"].reshape(4, 8).nonzero().tolist() == [[0, 7]]
    assert groups["red"].sum() == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"do not divide into 7 × 8 tokens"):
        image_groups_from_images(painted(0, 0), grid=(7, 8))
    with pytest.raises(ValueError, match=r"do not divide into 8 × 7 tokens"):
        image_groups_from_images(painted(0, 0), grid=(8, 7))
    with pytest.raises(ValueError, match="2 scenes for 1 images"):
        image_groups_from_images(painted(0, 0), sample(2, seed=0))
