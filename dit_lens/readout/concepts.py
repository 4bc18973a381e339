"""Concept attention: likeness of image and concept vectors in the output space of joint attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import chosen_steps, one_of
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.hooks.table import JOINT_POSITIONS

from ..intervene.interventions import Steps
from ..text.prompts import Word, token_mask, word
from .heat_maps import grid_of


@torch.no_grad()
def concept_attention(
    model: HookedTextToImage,
    prompt: str,
    concepts: Sequence[str | Word],
    seed: int = 0,
    num_steps: int = DEFAULT_STEPS,
    *,
    by: Sequence[Literal["layer", "step"]] = (),
    steps: Steps = None,
    **options: Any,
) -> xr.DataArray:
    """Share of each concept at each image position: softmax over concepts of output vectors' dot products.

    A concept that is a string need not be in the prompt. It runs as the text of a row of its own, whose
    tokens attend to the prompt's image and to themselves, while that image never sees them. The
    vectors are those that attention returns, all heads, before the output projection; a concept's is the
    mean over its tokens. Source: Helbling et al. 2025, arXiv 2502.04320, section 3. Differences: a
    concept is modulated by its own pooled text, and concepts do not see each other.

    Args:
        concepts: at least two: text to encode, or `prompts.word("cat")` for the prompt's own tokens.
        by: dims to keep; the shares are means over the others.
        steps: denoising steps that count, by default all.
        options: further arguments of the pipeline's call.

    Returns:
        Dims (concept, layer, step, y, x), those of `layer step` that are in `by`. Conditional branch.

    Raises:
        ValueError: the model's text has no output vectors (it is read by cross-attention), the prompt lacks a
            word, or there are fewer than two concepts.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> concept_attention(model, "red circle", ["circle", "square"])
        Traceback (most recent call last):
            ...
        ValueError: HookedDiT's text is read by cross-attention and gets no output vectors: use readout.heatmap.
    """
    by = [one_of("by", dim, ("layer", "step")) for dim in ([by] if isinstance(by, str) else by)]
    layers = joint_layers(model.dit)
    if isinstance(concepts, (str, Word)) or len(concepts) < 2:
        raise ValueError("Shares are over concepts: name at least two, such as ['cat', 'background'].")
    rows = [prompt, *(one for one in concepts if isinstance(one, str))]
    run = model.trajectory(rows, seed, num_steps, until=0, **options)
    of_call = {name: value for name, value in options.items() if name not in ("guidance", "latents")}
    tokens = [
        (rows.index(one, 1), token_mask(model, rows, word(one), missing="ignore", **of_call))
        if isinstance(one, str)
        else (0, token_mask(model, rows, one, missing="ignore", **of_call))
        for one in concepts
    ]
    token_mask(model, prompt, [one for one in concepts if isinstance(one, Word)] or [0], **of_call)  # raises if there is none
    masks = [(row, mask[row]) for row, mask in tokens]
    chosen = list(chosen_steps(steps, len(run)))
    found: dict[tuple[int, int], Tensor] = {}

    def keep(z: Tensor, hook: HookPoint) -> None:
        found[hook.layer(), int(str(hook.name).split(".")[1])] = shares(z, model.dit.layout.n_image, masks)

    def share_image(x: Tensor, hook: HookPoint) -> Tensor:
        n, shared = model.dit.layout.n_image, x.clone()
        shared[1:, :n] = x[:1, :n]
        return shared

    sites = [f"steps.{step}.cond.blocks.{layer}.{name}" for step in chosen for layer, name in layers.items()]
    hooks: list[Any] = [(f"{site}.hook_{leaf}", share_image) for site in sites for leaf in "kv"]
    with model.hooks(hooks + [(f"{site}.hook_z", keep) for site in sites]):
        latent = model.run(run.inputs).latent
    values = torch.stack([torch.stack([found[layer, step] for step in chosen]) for layer in layers])
    gone = [dim for dim in ("layer", "step") if dim not in by]
    rows_, columns, frames = grid_of(model.dit, latent)
    place = {"frame": frames, "y": rows_, "x": columns} if frames > 1 else {"y": rows_, "x": columns}
    shaped = values.reshape(*values.shape[:3], *place.values()).movedim(2, 0).cpu().numpy()
    coords = {"concept": [str(one) for one in concepts], "layer": list(layers), "step": chosen}
    return xr.DataArray(shaped, dims=("concept", "layer", "step", *place), coords=coords, name="share").mean(gone)


def joint_layers(dit: Any) -> dict[int, str]:
    """Layer → its attention whose queries are of the image and the text.

    Raises:
        ValueError: there is none.

    Example:
        >>> from hooked_models import families
        >>> joint_layers(families.hook(families.SUPPORTED["SD3Transformer2DModel"].small().eval()))[0]
        'attn'
    """
    names = [name for name in dit.hook_dict if name.endswith(".hook_z") and dit.axes(name)[1] in JOINT_POSITIONS]
    if not names:
        raise ValueError(
            f"{type(dit).__name__}'s text is read by cross-attention and gets no output vectors: use readout.heatmap."
        )
    return {int(name.split(".")[1]): name.split(".")[2] for name in names}


def shares(
    z: Float[Tensor, "row pos head d_head"], n_image: int, concepts: Sequence[tuple[int, Bool[Tensor, " text_pos"]]]
) -> Float[Tensor, "concept image_pos"]:
    """Softmax over concepts of the dot products of image vectors (row 0) with the mean vector of each concept's tokens.

    Example:
        >>> z = torch.eye(3)[None, :, None]
        >>> mask = torch.tensor([True])
        >>> shares(z, 2, [(0, mask), (0, mask)]).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    vectors = z.float().flatten(2)
    means = [vectors[row, n_image : n_image + len(mask)][mask.to(z.device)].mean(0) for row, mask in concepts]
    return (torch.stack(means) @ vectors[0, :n_image].T).softmax(0)
