"""Scores of perfect images by our judge and by the original's, and images that either judges in a
second.

`python -m benchmarks.scene_evaluation` prints the tables of `docs/scenes.md` (a few minutes on one
core). The original's rules are `dit_lens.task.paper_rules`; its geometry (Wang, Fan, Pan, arXiv
2601.06338) is written here from its description, so that a difference between two ceilings can be
traced to the rules, to the geometry, or to the overlap of objects.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
import xarray as xr
from PIL import Image, ImageDraw

from dit_lens.task import Scene, evaluate, paper_verdicts, render, sample
from dit_lens.task.rendering import BACKGROUND, PIXELS, half_size
from dit_lens.task.scene import IMAGE_SIZE, RADIUS, Shape

Draw = Callable[[Sequence[Scene]], np.ndarray]
Judge = Callable[[np.ndarray, Sequence[Scene]], np.ndarray]

METRICS = ("color", "shape", "unique_binding", "relation_strict", "relation_loose")
TRIANGLE_HEIGHT = 2 * RADIUS * math.sqrt(3) / 2
# ground-truth ceilings of the original, as measured with its own code on 40,000 simulated training
# scenes
REPORTED = {
    "plain": (0.984, 0.880, 0.880, 0.848, 0.865),
    "264 prompts": (0.969, 0.821, 0.821, 0.779, 0.808),
    "96 prompts": (0.970, 0.817, 0.817, 0.766, 0.805),
}


# --- the original's geometry ----------------------------------------------------------------------


def render_original(scenes: Sequence[Scene]) -> np.ndarray:
    """uint8 [image height width 3].

    A triangle's nominal centre is its centroid, at two thirds of its height.
    """
    images = []
    for scene in scenes:
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        draw = ImageDraw.Draw(image)
        for shape, color, x, y in (
            (scene.shape1, scene.color1, scene.x1, scene.y1),
            (scene.shape2, scene.color2, scene.x2, scene.y2),
        ):
            box = [x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS]
            top, base = y - TRIANGLE_HEIGHT / 3, y + 2 * TRIANGLE_HEIGHT / 3
            match shape:
                case "triangle":
                    draw.polygon(
                        [(x, top), (x - RADIUS, base), (x + RADIUS, base)], fill=PIXELS[color]
                    )
                case "circle":
                    draw.ellipse(box, fill=PIXELS[color])
                case "square":
                    draw.rectangle(box, fill=PIXELS[color])
        images.append(np.asarray(image))
    return np.stack(images)


def render_ours(scenes: Sequence[Scene]) -> np.ndarray:
    """uint8 [image height width 3]."""
    return (render(scenes) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def extent_original(shape: Shape) -> tuple[int, int, int]:
    """Pixels to either side of, above, and below the nominal centre."""
    if shape == "triangle":
        return RADIUS, math.ceil(TRIANGLE_HEIGHT / 3), math.floor(2 * TRIANGLE_HEIGHT / 3)
    return RADIUS, RADIUS, RADIUS


def extent_ours(shape: Shape) -> tuple[int, int, int]:
    """As `extent_original`."""
    x, y = half_size(shape)
    return x, y, y


def apart(scene: Scene, extent: Callable[[Shape], tuple[int, int, int]]) -> bool:
    """True if the bounding boxes have no pixel in common."""
    (side1, up1, down1), (side2, up2, down2) = extent(scene.shape1), extent(scene.shape2)
    level = scene.y1 - up1 <= scene.y2 + down2 and scene.y2 - up2 <= scene.y1 + down1
    return abs(scene.x1 - scene.x2) > side1 + side2 or not level


# --- the rules ------------------------------------------------------------------------------------


def judge_original(images: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """[image, metric + y offset of object 1, of object 2]: `METRICS` as 0 or 1; the offsets are NaN
    without unique binding.
    """
    return verdicts_of(paper_verdicts, images, scenes)


def judge_ours(images: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """As `judge_original`."""
    return verdicts_of(evaluate, images, scenes)


def verdicts_of(
    rules: Callable[..., xr.Dataset], images: np.ndarray, scenes: Sequence[Scene]
) -> np.ndarray:
    """As `judge_original`, by any rules."""
    verdict = rules(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, scenes)
    errors = [verdict.y1 - [s.y1 for s in scenes], verdict.y2 - [s.y2 for s in scenes]]
    return np.stack(
        [*(verdict[name].values.astype(float) for name in METRICS), *(e.values for e in errors)],
        axis=1,
    )


GEOMETRIES = {"ours": (render_ours, extent_ours), "original": (render_original, extent_original)}
RULES = {"ours": judge_ours, "original": judge_original}


# --- what they score ------------------------------------------------------------------------------


def weights(scenes: Sequence[Scene], form: str) -> np.ndarray:
    """[image], sum 1: every image counts alike ("plain"), or every prompt of a set does, by the
    images of its cell.
    """
    if form == "plain":
        return np.full(len(scenes), 1 / len(scenes))
    cells = [(s.combination, s.phrase if form == "264 prompts" else "") for s in scenes]
    sizes = Counter(cells)
    if len(sizes) != int(form.split()[0]):
        raise ValueError(f"Only {len(sizes)} of the {form} occur; draw more scenes with --n.")
    return np.array([1 / (len(sizes) * sizes[cell]) for cell in cells])


def interval(values: np.ndarray, weight: np.ndarray) -> str:
    """Weighted mean and its 95 % Wilson interval at Kish's effective sample size, 1 / Σw²."""
    p, n, z = float(values @ weight), 1 / float(weight @ weight), 1.96
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return f"{p:.3f} [{low:.3f}, {high:.3f}]"


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def print_header(*cells: str) -> None:
    print()
    print_row(*cells)
    print_row(*["---"] * len(cells))


def score(scenes: Sequence[Scene], draw: Draw, judge: Judge) -> tuple[np.ndarray, float]:
    """Verdicts [image, column], and seconds spent judging.

    In chunks: 40,000 float images take 8 GB.
    """
    verdicts, seconds = [], 0.0
    for i in range(0, len(scenes), 128):
        chunk = scenes[i : i + 128]
        images = draw(chunk)
        start = time.perf_counter()
        verdicts.append(judge(images, chunk))
        seconds += time.perf_counter() - start
    return np.concatenate(verdicts), seconds


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description="Ceilings and speed of the scene evaluators.")
    parser.add_argument("--n", type=int, default=40_000, help="scenes of each distribution")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    drawn = {
        "natural": sample(args.n, args.seed, split="all", distribution="natural"),
        "balanced": sample(args.n, args.seed, split="all"),
    }
    settings = list(itertools.product(GEOMETRIES, RULES))
    verdicts, seconds = {}, dict.fromkeys(RULES, 0.0)
    for distribution, (geometry, rules) in itertools.product(drawn, settings):
        draw, _ = GEOMETRIES[geometry]
        verdicts[distribution, geometry, rules], spent = score(
            drawn[distribution], draw, RULES[rules]
        )
        seconds[rules] += spent

    print_header("layout", "weighting", "geometry", "rules", *METRICS)
    for layout, form in (
        ("natural", "plain"),
        ("natural", "264 prompts"),
        ("natural", "96 prompts"),
        ("natural, apart", "264 prompts"),
        ("balanced", "plain"),
        ("balanced", "264 prompts"),
    ):
        scenes = drawn[layout.split(",")[0]]
        for geometry, rules in settings:
            _, extent = GEOMETRIES[geometry]
            keep = np.array(
                [layout != "natural, apart" or apart(scene, extent) for scene in scenes]
            )
            scored = verdicts[layout.split(",")[0], geometry, rules][keep]
            weight = weights(
                [scene for scene, kept in zip(scenes, keep, strict=True) if kept], form
            )
            print_row(
                layout,
                form,
                geometry,
                rules,
                *(interval(scored[:, m], weight) for m in range(len(METRICS))),
            )
        if layout == "natural":
            print_row(
                layout,
                form,
                "original",
                "original, reported",
                *(f"{value:.3f}" for value in REPORTED[form]),
            )

    print_header("geometry", "rules", "measured − nominal y of triangles, px")
    triangle = np.array(
        [[s.shape1 == "triangle", s.shape2 == "triangle"] for s in drawn["balanced"]]
    )
    for geometry, rules in settings:
        errors = verdicts["balanced", geometry, rules][:, len(METRICS) :][triangle]
        print_row(geometry, rules, f"{np.nanmean(errors):+.2f}")
    print_header("rules", "images/s, one thread")
    for rules, spent in seconds.items():
        print_row(rules, round(len(drawn) * len(GEOMETRIES) * args.n / spent))


if __name__ == "__main__":
    main()
