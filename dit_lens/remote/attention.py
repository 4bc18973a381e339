"""Attention between groups of positions, of one run behind nnsight."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models.generation.model import Prompts
from hooked_models.generation.noise import Seeds

from ..readout.group_attention import attentions_of, placed
from . import plan
from .model import RemoteTextToImage


def attention_there(
    model: RemoteTextToImage,
    prompts: Prompts,
    seed: Seeds,
    sublayer: Literal["attn", "cross_attn", "image_attn"],
    groups: plan.Groups,
    *,
    num_steps: int,
    guidance: float,
) -> Float[Tensor, "batch layer head step branch group key_group"]:
    """As `group_attention.attention_between`.

    Added up where the model is, so that only these sums travel.

    Example:
        >>> model = RemoteTextToImage("rte-nano")
        >>> groups = plan.Groups(torch.ones(1, 64, 1), {"cond": torch.ones(1, 7, 1)}, "sum")
        >>> text = "red circle is above blue square"
        >>> attention_there(model, text, 0, "cross_attn", groups, num_steps=2, guidance=1.0).shape
        torch.Size([1, 3, 3, 2, 1, 1, 1])
    """
    dtype = torch.promote_types(model.dit.dtype, torch.float32)
    draft = model.draft(prompts, seed, num_steps, guidance)
    steps, attentions = range(len(draft.solver)), attentions_of(model.dit, sublayer)
    sums = []
    for branch, weights in groups.keys.items():
        queries, keys = placed(
            model, draft, sublayer, branch, groups.queries.to(dtype), weights.to(dtype)
        )
        sums += [
            plan.GroupSum(
                str(one.hook_q.name).removesuffix(".hook_q"),
                *(step, branch, queries, keys, groups.reduce),
                key=(layer, step, branch),
            )
            for layer, one in attentions.items()
            for step in steps
            if branch == "cond" or step in draft.extent.uncond
        ]
    found = model.ask(prompts, draft, sums=sums)["added"]
    nothing = torch.full_like(next(iter(found.values())), torch.nan)
    by_branch = []
    for branch in groups.keys:
        by_layer = [
            torch.stack([found.get((layer, step, branch), nothing) for step in steps], dim=2)
            for layer in range(model.cfg.n_layers)
        ]
        by_branch.append(torch.stack(by_layer, dim=1))
    return torch.stack(by_branch, dim=4)
