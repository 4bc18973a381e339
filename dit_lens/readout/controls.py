"""Effect of an edit on a generation beside that of equally many random places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.hooks import Hooks
from hooked_models.generation.trajectory import Run
from hooked_models.hooks.module import HookFunction


def shifts(run: Run, conditions: Iterable[Hooks]) -> Float[np.ndarray, "condition prompt"]:
    """Change of the last latents under hooks, ‖x' − x‖ / ‖x‖, one condition after the other.

    Args:
        run: of the model as it is.
        conditions: for each, `fwd_hooks` with which the run is repeated.

    Example:
        >>> run = model.trajectory("red circle", num_steps=1)
        >>> shifts(run, [[("steps.0.hook_out", lambda out, hook: 0 * out)], []]).round(1).tolist()
        [[1.0], [0.0]]
    """
    before = run.latent.flatten(1).float()
    changed = [
        (run.fork(0, hooks).latent.flatten(1).float() - before).norm(dim=1) / before.norm(dim=1)
        for hooks in conditions
    ]
    return torch.stack(changed).cpu().numpy()


def without_largest(
    run: Run,
    names: Mapping[str, tuple[int, int]],
    sizes: Float[Tensor, "prompt layer #step place"],
    without: Callable[[Int[Tensor, "prompt k"]], HookFunction],
    k: int,
    draws: int,
    seed: int,
) -> tuple[Float[Tensor, "prompt layer #step k"], Int[Tensor, "prompt layer #step k"], dict]:
    """The k largest places of each layer and step, and the change of a run without them.

    Args:
        run: generation that is run again with the places removed.
        names: hook → (number of layer and step), as of `names_of`.
        sizes: size of each place, to be ranked along the last axis.
        without: makes the hook that takes places away.
        k: number of places.
        draws: runs without k random other places of size > 0.
        seed: of these.

    Returns:
        Sizes, places, and `shift` [prompt] and `control_shift` [draw prompt] of `shifts`, as
        variables of a dataset.
    """
    largest, places = sizes.topk(k, dim=-1)
    rng, n_steps = np.random.default_rng(seed), sizes.shape[2]
    chosen = [places, *(random_others(places, sizes > 0, rng) for _ in range(draws))]
    changed = shifts(
        run,
        [
            [
                (name, without(one[:, layer, step % n_steps]))
                for name, (layer, step) in names.items()
            ]
            for one in chosen
        ],
    )
    variables = {
        "shift": ("prompt", changed[0]),
        "control_shift": (("draw", "prompt"), changed[1:]),
    }
    return largest, places, variables


def random_others(
    taken: Int[Tensor, "*row k"], there: Bool[Tensor, "*row n"], rng: np.random.Generator
) -> Int[Tensor, "*row k"]:
    """For each row, k random places that are there and not taken.

    Raises:
        ValueError: a row has fewer of them than are taken.

    Example:
        >>> there = torch.tensor([[True, True, False, True]])
        >>> random_others(
        ...     torch.tensor([[1, 3]])[:, :1], there, np.random.default_rng(0)
        ... ).item() in (0, 3)
        True
    """
    free = there.scatter(-1, taken, False)
    if int(free.sum(-1).min()) < taken.shape[-1]:
        raise ValueError(
            f"There are too few other places to compare {taken.shape[-1]} with: take a smaller k."
        )
    order = torch.from_numpy(rng.random(free.shape)).masked_fill(~free.cpu(), -1)
    return order.topk(taken.shape[-1], dim=-1).indices.to(taken.device)


def names_of(
    model: HookedTextToImage, leaf: str, steps: Sequence[int]
) -> dict[str, tuple[int, int]]:
    """Full names of a hook of the blocks, conditional branch → (number of layer and step, from 0).

    Example:
        >>> list(names_of(model, "attn.hook_z", [0]))[2]
        'steps.0.cond.blocks.2.attn.hook_z'
    """
    layers = [
        name
        for layer in range(model.dit.cfg.n_layers)
        if (name := f"blocks.{layer}.{leaf}") in model.dit.hook_dict
    ]
    return {
        f"steps.{step}.cond.{name}": (layer, at)
        for at, step in enumerate(steps)
        for layer, name in enumerate(layers)
    }
