"""Judge of generated images: presence of the right objects, and their relation.

The metrics are those of Wang, Fan, Pan (arXiv 2601.06338, `cv2_eval_utils.py`); the detector is our
own. One labelling of the whole batch finds the objects, sums over their pixels measure them, and an
object *is* the ideal shape that it overlaps most. `docs/scenes.md` has the ceilings: the scores of
perfect images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from scipy import ndimage
from torch import Tensor

from .rendering import PIXELS, shape_mask
from .scene import BAND, COLORS, DIRECTIONS, IMAGE_SIZE, SHAPES, Scene, Trio, relation_between

COLOR_MARGIN = 0.5
"""A pixel is red if R − (G + B)/2 exceeds this, blue likewise: half-way between grey background (0)
and pure color (1), so that a blurred edge stays where it was. No pixel can be both.
"""
COLOR_TOLERANCE = 0.25
"""A region's mean color is at most this far from the pure color, in every channel: no pink, orange
or maroon.
"""
MIN_AREA = 100
"""Pixels: anything smaller is a speck."""
MIN_IOU = 0.85
"""A region overlaps the ideal shape of its own area at least this much (intersection over union): a
whole object, not half of one. The ideal circle and square reach 0.84 with each other, so this
leaves little between the shapes.
"""
MAX_SCALE = 1.2
"""A region's side (square root of its area) is at most this factor off the ideal shape's: radii of
14 … 19 px for 16.
"""
CHUNK = 32
"""Images labelled at once: enough to amortise the calls, few enough for the cache."""

DESCRIPTIONS = {
    "color": "a region of each of the scene's two colours is there, whatever its shape",
    "shape": "a region of each of the scene's two shapes is there, whatever its colour",
    "unique_binding": (
        "of each of the scene's two (shape, colour) pairs exactly one object is there, and no "
        "stray region"
    ),
    "relation_strict": (
        f"unique_binding, and the measured centres (level within {BAND} px) have the scene's "
        "relation"
    ),
    "relation_loose": (
        f"unique_binding, and centre 1 is more than {BAND} px away in every direction that the "
        "relation names"
    ),
    "relation_given_both": "relation_loose where unique_binding holds, NaN elsewhere",
    "x1": "measured centre of the scene's first object, from the left; NaN without unique_binding",
    "y1": "measured centre of the scene's first object, from the top; NaN without unique_binding",
    "x2": "measured centre of the scene's second object, from the left; NaN without unique_binding",
    "y2": "measured centre of the scene's second object, from the top; NaN without unique_binding",
    "n_stray": "regions of one of the colours that have none of the shapes",
    "n_objects": "objects: regions that have one of the shapes and one of the colours",
    "relation1_loose": "of a trio: relation_loose of its first and second object",
    "relation2_loose": "of a trio: relation_loose of its first and third object",
    "x3": "measured centre of a trio's third object, from the left; NaN without unique_binding",
    "y3": "measured centre of a trio's third object, from the top; NaN without unique_binding",
}
ATTRIBUTES = {
    name: {"description": text} | ({"units": "px"} if name[0] in "xy" else {})
    for name, text in DESCRIPTIONS.items()
}
"""The attributes of each variable of `evaluate`'s Dataset."""


def evaluate(
    images: Float[Tensor, "image 3 height width"], scenes: Sequence[Scene | Trio]
) -> xr.Dataset:
    """Judge 128 × 128 images in [0, 1] against their scenes: one verdict an image.

    Only the content of the prompt counts (shapes, colors, relation), not the scene's positions.
    Pixels outside of [0, 1] are clipped, NaN counts as background. `relation_strict` implies
    `relation_loose` unless both offsets are within 5 px, which needs overlap; for diagonal
    relations the two are the same.

    Returns:
        Variables over dim `image`: `color shape unique_binding relation_strict relation_loose`
        (bool), `relation_given_both x1 y1 x2 y2` (float, NaN without unique binding; centres in
        whole pixels), `n_stray n_objects` (int); each has its `DESCRIPTIONS` entry. The scene's
        parts are coordinates, so that `evaluate(…).groupby("relation").mean()` is the table by
        relation.

        For trios, a verdict holds if it does for both pairs of objects; `relation1_loose` and
        `relation2_loose` are the verdicts of each pair, `x3` and `y3` the third object's centre,
        and `relation2`, `phrase2`, `shape3`, `color3` are coordinates.

    Raises:
        ValueError: the images are not `len(scenes)` RGB images of 128 × 128 pixels.

    Example:
        >>> drawn = scenes.sample(4, seed=0)
        >>> verdict = evaluate(scenes.render(drawn), drawn)
        >>> verdict["unique_binding"].values.tolist(), verdict["n_objects"].values.tolist()
        ([True, True, True, True], [2, 2, 2, 2])
    """
    expected = (len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
    if tuple(images.shape) != expected:
        raise ValueError(
            f"images must have shape {expected}, one image for each scene, not "
            f"{tuple(images.shape)}."
        )
    if trios := [scene for scene in scenes if isinstance(scene, Trio)]:
        return _evaluate_trios(images, trios)
    pairs = [scene for scene in scenes if isinstance(scene, Scene)]
    # an empty batch splits into one empty chunk, so there is always something to concatenate
    parts = [_census(chunk) for chunk in images.detach().split(CHUNK)]
    counts, centres = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    row = np.arange(len(pairs))
    shape1, color1 = (
        _indices(SHAPES, [s.shape1 for s in pairs]),
        _indices(COLORS, [s.color1 for s in pairs]),
    )
    shape2, color2 = (
        _indices(SHAPES, [s.shape2 for s in pairs]),
        _indices(COLORS, [s.color2 for s in pairs]),
    )
    by_shape, by_color = counts.sum(axis=2), counts.sum(axis=1)
    objects = counts[:, : len(SHAPES), : len(COLORS)]
    stray = counts[:, len(SHAPES), : len(COLORS)].sum(axis=1)
    unique = (
        (objects[row, shape1, color1] == 1) & (objects[row, shape2, color2] == 1) & (stray == 0)
    )
    first = np.where(unique[:, None], centres[row, shape1, color1], np.nan)
    second = np.where(unique[:, None], centres[row, shape2, color2], np.nan)

    strict, loose = _relation_verdicts(pairs, unique, first, second)
    return _labelled(
        pairs,
        {
            "color": (by_color[row, color1] > 0) & (by_color[row, color2] > 0),
            "shape": (by_shape[row, shape1] > 0) & (by_shape[row, shape2] > 0),
            "unique_binding": unique,
            "relation_strict": strict,
            "relation_loose": loose,
            "relation_given_both": np.where(unique, loose.astype(float), np.nan),
            "x1": first[:, 0],
            "y1": first[:, 1],
            "x2": second[:, 0],
            "y2": second[:, 1],
            "n_stray": stray,
            "n_objects": objects.sum(axis=(1, 2)),
        },
    )


def _relation_verdicts(
    scenes: Sequence[Scene],
    unique: Bool[np.ndarray, " image"],
    first: Float[np.ndarray, "image 2"],
    second: Float[np.ndarray, "image 2"],
) -> tuple[Bool[np.ndarray, " image"], Bool[np.ndarray, " image"]]:
    """(strict, loose): the relation of both centres, and that of their offset alone."""
    strict = np.zeros(len(scenes), dtype=bool)
    for i in np.flatnonzero(unique).tolist():
        x1, y1, x2, y2 = (int(v) for v in (*first[i], *second[i]))
        strict[i] = relation_between(x1, y1, x2, y2) == scenes[i].relation
    directions = np.array([DIRECTIONS[s.relation] for s in scenes]).reshape(-1, 2)
    beyond = (directions == 0) | ((first - second) * directions > BAND)
    return strict, unique & beyond.all(axis=1)


def _labelled(scenes: Sequence[Scene | Trio], values: Mapping[str, np.ndarray]) -> xr.Dataset:
    """Verdicts with their attributes, and the scenes' parts as coordinates."""
    return xr.Dataset(
        {name: ("image", value, ATTRIBUTES[name]) for name, value in values.items()},
        coords={"image": np.arange(len(scenes))}
        | {name: ("image", parts) for name, parts in parts_of_scenes(scenes).items()},
    )


def parts_of_scenes(scenes: Sequence[Scene | Trio]) -> dict[str, Shaped[np.ndarray, " scene"]]:
    """The words of scenes, by their name: the coordinates of `evaluate`'s Dataset.

    Example:
        >>> from dit_lens.task import sample
        >>> words = parts_of_scenes(sample(1, seed=0))
        >>> str(words["color1"][0]), str(words["shape1"][0]), str(words["relation"][0])
        ('red', 'circle', 'lower_left')
    """
    trios = [scene for scene in scenes if isinstance(scene, Trio)]  # scenes or trios, not both
    pairs = [scene.first if isinstance(scene, Trio) else scene for scene in scenes]
    names = ("relation", "phrase", "shape1", "color1", "shape2", "color2")
    found = {name: [getattr(scene, name) for scene in pairs] for name in names}
    if trios:
        added = {"relation2": "relation", "phrase2": "phrase", "shape3": "shape2"}
        for new, old in (added | {"color3": "color2"}).items():
            found[new] = [getattr(trio.second, old) for trio in trios]
    return {name: np.array(words, dtype=str) for name, words in found.items()}


def _evaluate_trios(
    images: Float[Tensor, "image 3 height width"], trios: Sequence[Trio]
) -> xr.Dataset:
    first, second = (
        evaluate(images, [getattr(trio, part) for trio in trios]) for part in ("first", "second")
    )
    values = {str(name): first[name].values for name in first}
    values["relation1_loose"] = first["relation_loose"].values
    values["relation2_loose"] = second["relation_loose"].values
    values |= {"x3": second["x2"].values, "y3": second["y2"].values}
    for name in ("color", "shape", "unique_binding", "relation_strict", "relation_loose"):
        values[name] = values[name] & second[name].values
    loose = values["relation_loose"].astype(float)
    values["relation_given_both"] = np.where(values["unique_binding"], loose, np.nan)
    return _labelled(trios, values)


def _indices(vocabulary: tuple[str, ...], words: Sequence[str]) -> Int[np.ndarray, " image"]:
    return np.array([vocabulary.index(word) for word in words], dtype=int)


def color_classes(
    images: Float[Tensor, "image 3 height width"],
) -> UInt8[np.ndarray, "image height width"]:
    """Classify pixels by color: 1 + the index into `COLORS`, or 0 for background."""
    pixels = images.detach().float().cpu().clamp(0, 1).numpy()
    red, blue, gray = pixels[:, 0], pixels[:, 2], pixels.mean(axis=1)
    classes = np.zeros(gray.shape, dtype=np.uint8)
    classes[1.5 * (red - gray) > COLOR_MARGIN] = 1  # NaN exceeds nothing, so it stays background
    classes[1.5 * (blue - gray) > COLOR_MARGIN] = 2
    return classes


def _census(
    images: Float[Tensor, "image 3 height width"],
) -> tuple[Int[np.ndarray, "image shape color"], Float[np.ndarray, "image shape color xy"]]:
    """Number of regions of each kind in each image, and their centres (x, y) in pixels.

    Centres are summed if there are several. The last index of `shape` and of `color` means none of
    them; a region that has both is an object.
    """
    pixels = images.float().cpu().clamp(0, 1).flatten(2).numpy()
    n, _, size = pixels.shape
    # The spare row keeps each image's regions apart from the next one's.
    classes = np.zeros((n, size + IMAGE_SIZE), dtype=np.uint8)
    classes[:, :size] = color_classes(images).reshape(n, size)
    (red, n_red), (blue, _) = (
        ndimage.label(classes.reshape(-1, IMAGE_SIZE) == color) for color in (1, 2)
    )
    labels = np.where(blue > 0, blue + n_red, red)  # side by side, two colors are two regions

    colored = np.flatnonzero(classes)
    label = labels.ravel()[colored]
    large = np.bincount(label) >= MIN_AREA
    colored, label = colored[large[label]], label[large[label]]
    region, k = (np.cumsum(large) - 1)[label], int(large.sum())
    image, place = np.divmod(colored, size + IMAGE_SIZE)
    total = partial(np.bincount, region, minlength=k)

    area = total()
    mean = np.stack(
        [total(weights=pixels[image, channel, place]) / area for channel in range(3)], axis=1
    )
    pure = np.array([PIXELS[color] for color in COLORS]) / 255
    is_color = np.abs(mean[:, None] - pure).max(axis=2) <= COLOR_TOLERANCE
    shape, centre = _classify(place, region, k)

    color = np.where(is_color.any(axis=1), is_color.argmax(axis=1), len(COLORS))
    kind = (total(weights=image) / area).astype(int), shape, color
    counts = np.zeros((n, len(SHAPES) + 1, len(COLORS) + 1), dtype=int)
    np.add.at(counts, kind, 1)
    centres = np.zeros((*counts.shape, 2))
    np.add.at(centres, kind, centre)
    return counts, centres


def _classify(
    place: Int[np.ndarray, " pixel"], region: Int[np.ndarray, " pixel"], k: int
) -> tuple[Int[np.ndarray, " region"], Int[np.ndarray, "region xy"]]:
    """The shape of each of `k` regions, as an index into `SHAPES`, and its centre (x, y).

    An index beyond the end: none. Each ideal shape is laid over the region with the region's own
    area and centre of mass; the one that fits best is the region's if it fits and the area is
    right. Unlike a bounding box, area and centre of mass hardly move when an apex is blurred away.
    Centres are whole pixels because a scene's are: half a pixel of noise then costs nothing at the
    edge of the level band. `place` is row · 128 + column.
    """
    total = partial(np.bincount, region, minlength=k)
    xy = np.stack([place % IMAGE_SIZE, place // IMAGE_SIZE])
    area = total()
    middle = np.stack([total(weights=axis) / area for axis in xy])
    relative = xy - middle[:, region]
    iou, scale, centre = (np.empty((len(SHAPES), *inner)) for inner in ((k,), (k,), (k, 2)))
    for s, shape in enumerate(SHAPES):
        mask = np.pad(shape_mask(shape), 1)
        side = np.array(mask.shape[::-1])[:, None]
        ideal = np.argwhere(mask).mean(axis=0)[::-1, None]
        scale[s] = np.sqrt(mask.sum() / area)
        x, y = np.clip(np.rint(relative * scale[s, region] + ideal), 0, side - 1).astype(int)
        common = total(weights=mask[y, x])
        iou[s] = common / (2 * area - common)
        centre[s] = (middle - (ideal - side // 2) / scale[s]).T
    best = iou.argmax(axis=0), np.arange(k)
    valid = (iou[best] >= MIN_IOU) & (np.maximum(scale[best], 1 / scale[best]) <= MAX_SCALE)
    return np.where(valid, best[0], len(SHAPES)), np.rint(centre[best]).astype(int)
