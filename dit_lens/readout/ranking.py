"""Heads ranked by a synopsis of their attention, with chance levels."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from hooked_models.generation.names import Branch

from ..stats import clustered_mean


def rank_heads(
    synopsis: Float[xr.DataArray, "..."],
    image_group: str,
    text_group: str,
    step: int | Literal["mean", "max"] = "mean",
    branch: Branch = "cond",
    shuffles: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank heads by attention from `image_group` to `text_group`, the group of keys.

    Groups of different sizes are comparable under reduce="mean"; under "sum" and "mass", long
    groups win by their length.

    Args:
        synopsis: of `attention_synopsis`, either sublayer.
        image_group: group of queries.
        text_group: group of keys.
        step: one denoising step, or the mean or maximum over all.
        branch: guidance branch.
        shuffles: number of shuffles of the control.
        seed: seed of the shuffles.

    Returns:
        Columns ``layer head mean low high control p``, largest mean first: mean over prompts (over
        seeds of equal prompts first) with its 95 % interval over prompts; ``control`` is the mean
        over shuffles, in each of which every prompt's groups exchange their labels at random, pads
        and empty groups left out; ``p`` is the share of shuffles, counting the observed one, that
        reach the mean. Prompts that lack either group do not count.

    Raises:
        ValueError: there is no such group, step or branch, or no prompt has both groups.

    Example:
        >>> from dit_lens.readout.synopsis import attention_synopsis
        >>> texts = ["red circle is above blue square", "blue circle is below red square"]
        >>> found = attention_synopsis(model, texts, num_steps=1)
        >>> rank_heads(found, "image", "relation", shuffles=99).shape
        (9, 7)
    """
    keys = str(synopsis.dims[-1])
    chosen = {"image_group": image_group, keys: text_group, "branch": branch} | (
        {} if isinstance(step, str) else {"step": step}
    )
    for dim, value in chosen.items():
        if value not in synopsis[dim].values:
            raise ValueError(
                f"There is no {dim} {value!r} here: choose "
                f"{', '.join(map(str, synopsis[dim].values))}."
            )
    seen = synopsis.sel(image_group=image_group, branch=branch)
    seen = getattr(seen, step)("step") if isinstance(step, str) else seen.sel(step=step)
    seen = (
        seen.groupby("prompt")
        .mean()
        .drop_sel({keys: [name for name in ("pad",) if name in seen[keys]]})
    )
    seen = seen.stack(at=("layer", "head")).transpose("prompt", "at", keys)
    target = list(seen[keys].values).index(text_group)
    values = seen.values[np.isfinite(seen.values[:, 0, target])]
    if not len(values):
        raise ValueError(
            f"No prompt has both {image_group!r} and {text_group!r}: choose other groups, or other "
            "prompts."
        )

    rng, present = np.random.default_rng(seed), np.isfinite(values[:, 0])
    shuffled = np.empty((shuffles, values.shape[1]))
    # of a random order of the labels, only the group that gets this label matters
    for i in range(shuffles):
        labels = np.where(present, rng.random(present.shape), -1).argmax(axis=1)
        shuffled[i] = values[np.arange(len(values)), :, labels].mean(axis=0)
    intervals = [clustered_mean(column[:, None]) for column in values[:, :, target].T]
    observed = np.array([interval.mean for interval in intervals])
    table = pd.DataFrame(intervals, columns=["mean", "low", "high"])
    table.insert(0, "head", seen["head"].values)
    table.insert(0, "layer", seen["layer"].values)
    table["control"] = shuffled.mean(axis=0)
    table["p"] = (1 + (shuffled >= observed - 1e-12).sum(axis=0)) / (1 + shuffles)
    return table.sort_values("mean", ascending=False, ignore_index=True)
