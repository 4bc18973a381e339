"""Between the relation heads and the layout: paths behind the heads, and a subspace of the
residual stream (step 0).

`frozen_paths`: the set of heads reads the opposite prompt while some part of the network behind it
keeps its clean value; the share of the layout's turn that is lost went through that part.
`distributed_alignment`: DAS (Geiger et al., arXiv 2303.02536), two orthonormal directions of the
residual stream, learnt so that exchanging them between two prompts exchanges their layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dit_lens import scenes
from dit_lens.intervene.interchange import Interchange
from dit_lens.readout.circuits import parse_head
from dit_lens.task import DIRECTIONS
from dit_lens.training.dynamics import color_moment
from hooked_models import HookedTextToImage

PARTS = {
    "self-attention": "hook_attn_out",
    "cross-attention queries": "cross_attn.hook_q",
    "MLPs": "hook_mlp_out",
}
"""Frozen part → its hook, in every layer behind the set."""
LEARNING_STEPS, LEARNING_RATE, LEARNING_BATCH = 150, 0.02, 24
RANDOM_SUBSPACES = 10


def last_layer(heads: Sequence[str]) -> int:
    """The last layer with one of the heads."""
    return max(parse_head(head)[0] for head in heads)


@torch.no_grad()
def frozen_paths(model: HookedTextToImage, heads: Sequence[str], n: int) -> pd.DataFrame:
    """A row a frozen part and scene: `lost`, the share of the turn of (x, y) along the named
    direction.
    """
    wanted = scenes.sample(n, seed=14, split="all", color_words="both")
    swap = Interchange(model, wanted, [scenes.opposite(scene) for scene in wanted])
    view, tokens = model.at(
        step=0, prompts=swap.texts, seed=list(range(5000, 5000 + n)), guidance=1.0, returns="x0"
    )
    behind = range(last_layer(heads) + 1, model.cfg.n_layers)
    names = [f"blocks.{layer}.{hook}" for layer in behind for hook in PARTS.values()]
    # MLP of the last layer of the set reads it, too
    names.append(f"blocks.{last_layer(heads)}.{PARTS['MLPs']}")
    out, cache = view.run_with_cache(tokens, names_filter=names)
    named = np.array([DIRECTIONS[scene.relation] for scene in wanted], float)

    def along(x0: Tensor) -> Float[np.ndarray, " scene"]:
        return (color_moment(model.decode(x0).double().numpy()) * named).sum(axis=1)

    swapped = swap.hooks(heads, "relation", 0, view)
    clean, turned = along(out), along(view.run_with_hooks(tokens, fwd_hooks=swapped))
    rows = []
    for kind, hook in PARTS.items():
        freeze = [(name, partial(put, value=cache[name])) for name in names if name.endswith(hook)]
        kept = along(view.run_with_hooks(tokens, fwd_hooks=[*swapped, *freeze]))
        rows.append(
            pd.DataFrame(
                {"frozen": kind, "scene": np.arange(n), "lost": (kept - turned) / (clean - turned)}
            )
        )
    return pd.concat(rows, ignore_index=True)


def put(activation: Tensor, hook: object, value: Tensor) -> Tensor:
    """A hook that returns `value` instead."""
    return value


def distributed_alignment(model: HookedTextToImage, heads: Sequence[str], n: int) -> pd.DataFrame:
    """A row a subspace and prompt: whether the layout has both signs of the source prompt
    (`right`), which has other signs.

    Two thirds of the pairs are learnt from, the rest is judged; random subspaces are judged on the
    same.
    """
    wanted = [
        s
        for s in scenes.sample(4 * n, seed=15, split="all", color_words="both")
        if 0 not in DIRECTIONS[s.relation]
    ][:n]
    sources = [scenes.opposite(scene) for scene in wanted]
    name = f"blocks.{last_layer(heads)}.hook_resid_mid_cross"
    with torch.no_grad():
        views = {}
        for which, some in (("base", wanted), ("source", sources)):
            texts = [scenes.caption(scene) for scene in some]
            view, tokens = model.at(
                step=0, prompts=texts, seed=list(range(6000, 6000 + n)), guidance=1.0, returns="x0"
            )
            out, cache = view.run_with_cache(tokens, names_filter=[name])
            views[which] = (view, tokens, moment(model, out), cache[name])
    view, tokens, _, base = views["base"]
    _, _, goal, source = views["source"]
    learnt_from = 2 * n // 3
    scale = goal.abs().mean()
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(base.shape[-1], 2, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=LEARNING_RATE)
    for _ in range(LEARNING_STEPS):
        rows = torch.randperm(learnt_from, generator=generator)[:LEARNING_BATCH]
        frame = torch.linalg.qr(raw).Q
        exchange = partial(exchanged, other=source[rows], frame=frame)
        out = view.run_with_hooks(tokens[rows], fwd_hooks=[(name, exchange)])
        loss = ((moment(model, out) - goal[rows]) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    subspaces = {"learnt": torch.linalg.qr(raw.detach()).Q}
    for i in range(RANDOM_SUBSPACES):
        subspaces[f"random {i}"] = torch.linalg.qr(torch.randn(raw.shape, generator=generator)).Q
    held = torch.arange(learnt_from, n)
    found = []
    with torch.no_grad():
        for kind, frame in subspaces.items():
            exchange = partial(exchanged, other=source[held], frame=frame)
            out = view.run_with_hooks(tokens[held], fwd_hooks=[(name, exchange)])
            right = (moment(model, out).sign() == goal[held].sign()).all(dim=1)
            found.append(
                pd.DataFrame({"subspace": kind, "scene": held.numpy(), "right": right.numpy()})
            )
    return pd.concat(found, ignore_index=True)


def exchanged(
    activation: Float[Tensor, "batch pos d_model"],
    hook: object,
    other: Tensor,
    frame: Float[Tensor, "d_model 2"],
) -> Float[Tensor, "batch pos d_model"]:
    """The activation with its part in the span of `frame` taken from another run."""
    return activation + (other - activation) @ frame @ frame.T


def moment(model: HookedTextToImage, x0: Tensor) -> Float[Tensor, "scene 2"]:
    """`color_moment`, differentiable, and not signed by the caption's colours: (x, y) from blue
    towards red.
    """
    images: Tensor = model.decode(x0).double()
    red = images[:, 0] - images[:, 2]
    y, x = (torch.arange(size).double() - (size - 1) / 2 for size in red.shape[1:])
    return torch.stack([(red * x).sum((1, 2)), (red * y[:, None]).sum((1, 2))], dim=1)
