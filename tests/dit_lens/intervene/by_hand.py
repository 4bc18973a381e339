"""Helpers of the tests here."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_lens.text.prompts import role_mask
from hooked_models import HookedTextToImage, Trajectory

PROMPTS = [
    "red circle is above blue square",
    "blue square is above circle red",
    "circle is left of red square",
]


RUN = {"seed": [3, 4, 5], "num_steps": 2}


def read(run: Trajectory, hooks, names: list[str]) -> dict[str, Tensor]:
    """The tensors called `names` as they go on, and the images, of the run's last step with
    hooks.
    """
    kept = {}

    def keep(tensor: Tensor, hook) -> None:
        kept[hook.name] = tensor.clone()

    with torch.no_grad():
        images = run.fork(1, [*hooks, *((name, keep) for name in names)]).images
    return {**kept, "images": images}


def words(model: HookedTextToImage, role: str) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in role_mask(model, PROMPTS, role)]
