"""Massive activations: the largest channels of residual streams, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.noise import Seeds
from hooked_models.hooks.module import HookFunction

from .controls import names_of, without_largest


@torch.no_grad()
def massive_activations(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    seed: Seeds = 0,
    num_steps: int = DEFAULT_STEPS,
    *,
    k: int = 4,
    site: str = "hook_resid_post",
    draws: int = 4,
    control_seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """The k largest channels of each layer's residual stream, and if the generation needs them.

    A channel's size is the mean of |x| over positions and steps. In a second generation these
    channels are set to 0 in every layer and step of the conditional branch; in `draws` more, as
    many random other channels of the same layers. Source: arXiv 2605.13974, whose controls are the
    smallest channels.

    Args:
        model: hooked model; hooks that are attached to it act.
        prompts: one prompt or several.
        seed: an int gives every prompt the same noise; a sequence has one seed a prompt.
        num_steps: denoising steps of the generation.
        k: number of channels.
        site: a hook of the blocks [batch pos d_model].
        draws: of random channels.
        control_seed: seed of the random channels.
        options: further arguments of the model's call.

    Returns:
        Dims (prompt, layer, …): `size` (step, channel), mean of |x| over positions; `channel_index`
        (rank), the largest first; `ratio` (rank), their size over the layer's median. By prompt:
        `shift`, the relative change of the last latents without them, and `control_shift` (draw).

    Raises:
        ValueError: no block has the hook, or it has fewer than 2 k channels.

    Example:
        >>> found = massive_activations(
        ...     model, "red circle is above blue square", num_steps=2, draws=1
        ... )
        >>> dict(found["ratio"].sizes), bool((found["ratio"] > 1).all())
        ({'prompt': 1, 'layer': 3, 'rank': 4}, True)
    """
    k, draws = integer("k", k, 1), integer("draws", draws, 0)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    begun = model.trajectory(texts, seed, num_steps, until=0, **options)
    names = names_of(model, site, range(len(begun)))
    if not names:
        raise ValueError(f"No block has a hook {site!r}: take one such as 'hook_resid_post'.")
    kept: dict[str, Tensor] = {}

    def keep(x: Float[Tensor, "prompt pos channel"], hook: HookPoint) -> None:
        kept[str(hook.name)] = x.float().abs().mean(1)

    with model.hooks([(name, keep) for name in names]):
        run = model.run(begun.inputs)
    n_layers = 1 + max(layer for layer, _ in names.values())
    by_layer = [
        torch.stack([kept[name] for name, (layer, _) in names.items() if layer == one], 1)
        for one in range(n_layers)
    ]
    size = torch.stack(by_layer, dim=1)  # [prompt layer step channel]
    mean = size.mean(2, keepdim=True)
    largest, channels, changes = without_largest(run, names, mean, without, k, draws, control_seed)
    ratio = largest / mean.median(-1, keepdim=True).values
    return xr.Dataset(
        {
            "size": (("prompt", "layer", "step", "channel"), size.cpu().numpy()),
            "channel_index": (("prompt", "layer", "rank"), channels[:, :, 0].cpu().numpy()),
            "ratio": (("prompt", "layer", "rank"), ratio[:, :, 0].cpu().numpy()),
            **changes,
        },
        coords={"prompt": texts, "layer": sorted({int(name.split(".")[4]) for name in names})},
    )


def without(channels: Int[Tensor, "prompt k"]) -> HookFunction:
    """Hook that sets channels to 0, each prompt its own.

    Example:
        >>> without(torch.tensor([[1]]))(torch.ones(1, 2, 3)).tolist()
        [[[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]]
    """

    def zero(x: Float[Tensor, "prompt pos channel"], hook: HookPoint | None = None) -> Tensor:
        chosen = torch.zeros(len(x), x.shape[-1], dtype=torch.bool, device=x.device)
        return x.masked_fill(chosen.scatter(1, channels.to(x.device), True)[:, None], 0.0)

    return zero
