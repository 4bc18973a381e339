"""Verdicts of the images of prompts under each of several conditions: a sweep with a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_models import HookedTextToImage

from .. import sweep
from ..runs.drawing import Experiment
from ..task.scene import IMAGE_SIZE

Judge = Callable[
    [Float[Tensor, "image 3 height width"], Int[np.ndarray, " image"]], Mapping[str, np.ndarray]
]
"""Function of images and the index of each image's prompt → verdicts [image], by name."""


def verdicts(
    model: HookedTextToImage,
    prompts: Sequence[str],
    seeds: sweep.NoiseSeeds,
    conditions: sweep.Interventions,
    judge: Judge,
    **how: Unpack[Experiment],
) -> dict[str, Shaped[np.ndarray, "condition prompt seed"]]:
    """A judge's verdicts of the images of each condition, prompt and seed, by `sweep.run`.

    Args:
        model: the model that draws; no hooks may be attached.
        prompts: one row each for every seed and condition.
        seeds: as in `sweep.run`.
        conditions: the interventions of `sweep.run`.
        judge: its verdicts keep their types.
        **how: see `runs.drawing.Experiment`.

    Raises:
        ValueError: as `sweep.run`, or the judge fails.

    Example:
        >>> def red(images, prompt):
        ...     return {"red": images[:, 0].mean(dim=(1, 2)).numpy()}
        >>> texts = ["red circle is above blue square"]
        >>> found = verdicts(model, texts, [0, 1], {"none": []}, red, num_steps=1)
        >>> found["red"].shape
        (1, 1, 2)
    """

    def measure(images: Tensor, prompt: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value.astype(float) for name, value in judge(images, prompt).items()}

    metric = sweep.Metric(measure, given=("prompt",))
    found = sweep.run(model, prompts, seeds, conditions, {"judge": metric}, **how)
    kinds = judge(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), np.zeros(1, dtype=np.int64))
    values = {name: found[f"judge_{name}"].values for name in kinds}
    if any(np.isnan(values[n]).any() and kind.dtype.kind != "f" for n, kind in kinds.items()):
        raise ValueError(f"The judge fails on an image. {max(found['error'].values.ravel())}")
    return {name: values[name].astype(kind.dtype) for name, kind in kinds.items()}
