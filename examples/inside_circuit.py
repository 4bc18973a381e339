"""The heads that decide which color lies inside which, in a model trained on `examples.inside`.

    python -m examples.inside_circuit --model runs/inside --out circuit.csv

Some heads read the prompt with both objects exchanged, "blue box is inside red disc" for "red disc
is inside blue box"; the others read the prompt. An image is turned if the colors lie the other way
round, by the task's judge. The set is chosen on some prompts and measured on others. Predictions
stand in recipes/PREDICTIONS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Bool, Float
from rich.progress import track
from torch import Tensor

from dit_lens.intervene.interchange import Interchange, Steps, matched_sets
from dit_lens.stats import proportion
from hooked_models import HookedTextToImage

from .inside import Inside, Pair

TASK = Inside()
ENOUGH = 0.9
"""Share of what all heads turn that a chosen set turns."""


def scenes(n: int, seed: int, but: Sequence[Pair] = ()) -> list[Pair]:
    """Scenes of "inside" with n different prompts, none of which occurs in `but`."""
    found: dict[str, Pair] = {}
    known = {TASK.prompt(scene) for scene in but}
    for scene in TASK.sample(40 * n, seed=seed, split="all"):
        if scene.relation == "inside" and TASK.prompt(scene) not in known and len(found) < n:
            found.setdefault(TASK.prompt(scene), scene)
    return list(found.values())


class Exchange:
    """Images of scenes in which some heads read both objects exchanged; image i has noise i."""

    def __init__(self, model: HookedTextToImage, wanted: Sequence[Pair], num_steps: int) -> None:
        self.model, self.wanted, self.num_steps = model, wanted, num_steps
        self.turned = [replace(one, first=one.second, second=one.first) for one in wanted]

    def draw(
        self, heads: Sequence[str] | None, rows: slice = slice(None), steps: Steps = None
    ) -> Float[Tensor, "image 3 height width"]:
        """The images of some scenes; None exchanges all heads."""
        texts, others = (
            [TASK.prompt(scene) for scene in each[rows]] for each in (self.wanted, self.turned)
        )
        hooks = [
            hook
            for one in Interchange(self.model, texts, others).of(heads, steps=steps)
            for hook in one.hooks(self.model, texts, num_steps=self.num_steps)
        ]
        seeds = list(range(len(self.wanted)))[rows]
        with torch.no_grad():
            return self.model.run_with_hooks(
                texts, seed=seeds, num_steps=self.num_steps, fwd_hooks=hooks
            )

    def __call__(
        self, heads: Sequence[str] | None, steps: Steps = None
    ) -> Bool[np.ndarray, " image"]:
        """For each image: the colors lie the other way round."""
        return _relation(self.draw(heads, steps=steps), self.turned)

    def as_prompted(self) -> Bool[np.ndarray, " image"]:
        """For each image without an exchange: the relation is the prompt's."""
        return _relation(self.draw([]), self.wanted)

    def of_each(self, sets: Sequence[Sequence[str]]) -> Bool[np.ndarray, " image"]:
        """As a call, each image with its own heads."""
        images = [self.draw(heads, slice(i, i + 1)) for i, heads in enumerate(sets)]
        return _relation(torch.cat(images), self.turned)


def _relation(
    images: Float[Tensor, "image 3 height width"], wanted: Sequence[Pair]
) -> Bool[np.ndarray, " image"]:
    return TASK.judge(images, wanted)["relation"].values.astype(bool)


def choose(exchange: Exchange) -> list[str]:
    """Drop heads from all of them, the least needed first, while `ENOUGH` is turned."""
    cfg = exchange.model.cfg
    heads = [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    enough = ENOUGH * exchange(heads).mean()
    while len(heads) > 1:
        without = [[other for other in heads if other != head] for head in heads]
        shares = [exchange(rest).mean() for rest in track(without, f"{len(heads)} heads")]
        if max(shares) < enough:
            break
        heads = without[int(np.argmax(shares))]
    return heads


def measure(exchange: Exchange, heads: Sequence[str]) -> pd.DataFrame:
    """Share of images turned, of those that are as prompted without an exchange: condition, n,
    share, low, high.
    """
    cfg, given = exchange.model.cfg, exchange.as_prompted()
    every = [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    rest = [head for head in every if head not in heads]
    first = min(4, exchange.num_steps)
    found = {
        "no heads": exchange([]),
        "all heads": exchange(None),
        f"the set: {' '.join(heads)}": exchange(heads),
        "all other heads": exchange(rest),
        f"the set, steps 0 to {first - 1}": exchange(heads, slice(first)),
    }
    if first < exchange.num_steps:
        found[f"the set, from step {first} on"] = exchange(heads, slice(first, None))
    if len(rest) >= len(heads):
        rng = np.random.default_rng(0)
        sets = list(matched_sets(exchange.model, heads, len(given), rng))
        found["random sets of other heads"] = exchange.of_each(sets)
    for head in heads if len(heads) > 1 else []:
        found[f"the set without {head}"] = exchange([one for one in heads if one != head])
    rows = [
        {"condition": name, "n": int(given.sum())}
        | proportion(turned[given].astype(float))._asdict()
        for name, turned in found.items()
    ]
    return pd.DataFrame(rows)


def main(
    model: str, out: Path | None = None, looks: int = 24, images: int = 48, num_steps: int = 14
) -> None:
    """Choose a set of heads, measure what it does, and print the table.

    Args:
        model: folder of a run, or of its pipeline.
        out: table as CSV.
        looks: prompts on which the set is chosen.
        images: other prompts on which it is measured.
        num_steps: denoising steps.
    """
    opened = HookedTextToImage.from_pretrained(model)
    seen = scenes(looks, seed=11)
    heads = choose(Exchange(opened, seen, num_steps))
    table = measure(Exchange(opened, scenes(images, seed=12, but=seen), num_steps), heads)
    if out is not None:
        table.to_csv(out, index=False)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
