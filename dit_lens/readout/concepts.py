"""Concept attention: likeness of image and concept vectors among the outputs of joint attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import chosen_steps
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.hooks.table import JOINT_POSITIONS

from ..intervene.interventions import Steps
from ..text.prompts import Word, token_mask, word
from .heat_maps import grid_of, kept_dims


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
    """Share of each concept at each image position: a softmax of dot products of output vectors.

    A concept that is a string need not be in the prompt. It runs as the text of a row of its own,
    whose tokens attend to the prompt's image and to themselves, while that image never sees them.
    The vectors are those that attention returns, all heads, before the output projection; a
    concept's is the mean over its tokens. Source: Helbling et al. 2025, arXiv 2502.04320, section
    3. Differences: a concept is modulated by its own pooled text, and concepts do not see each
    other.

    Args:
        model: a pipeline whose image and text share one attention.
        prompt: text of the one image.
        concepts: at least two: text to encode, or `prompts.word("cat")` for the prompt's own
            tokens.
        seed: seed of the noise.
        num_steps: denoising steps of the generation.
        by: dims to keep; the shares are means over the others.
        steps: denoising steps that count, by default all.
        options: further arguments of the pipeline's call.

    Returns:
        Dims (concept, layer, step, y, x), those of `layer step` that are in `by`. Conditional
        branch.

    Raises:
        ValueError: the model's text has no output vectors (it is read by cross-attention), the
            prompt lacks a word, or there are fewer than two concepts.

    Example:
        >>> concept_attention(model, "red circle", ["circle", "square"])
        Traceback (most recent call last):
            ...
        ValueError: HookedDiT's text is read by cross-attention and gets no output vectors: use ...
    """
    by = kept_dims(by, ("layer", "step"))
    layers = joint_layers(model.dit)
    if isinstance(concepts, (str, Word)) or len(concepts) < 2:
        raise ValueError(
            "Shares are over concepts: name at least two, such as ['cat', 'background']."
        )
    rows = [prompt, *(one for one in concepts if isinstance(one, str))]
    run = model.trajectory(rows, seed, num_steps, until=0, **options)
    masks = _concept_tokens(model, rows, concepts, options)
    chosen = list(chosen_steps(steps, len(run)))
    found: dict[tuple[int, int], Tensor] = {}

    def keep(z: Tensor, hook: HookPoint) -> None:
        found[hook.layer(), int(str(hook.name).split(".")[1])] = shares(
            z, model.dit.layout.n_image, masks
        )

    sites = [
        f"steps.{step}.cond.blocks.{layer}.{name}"
        for step in chosen
        for layer, name in layers.items()
    ]
    with model.hooks(
        [*_image_of_the_prompt(model.dit, sites), *((f"{site}.hook_z", keep) for site in sites)]
    ):
        latent = model.run(run.inputs).latent
    values = torch.stack([found[layer, step] for layer in layers for step in chosen])
    values = values.unflatten(0, (len(layers), len(chosen)))
    gone = [dim for dim in ("layer", "step") if dim not in by]
    place = _image_dims(model.dit, latent)
    shaped = values.reshape(*values.shape[:3], *place.values()).movedim(2, 0).cpu().numpy()
    coords = {"concept": [str(one) for one in concepts], "layer": list(layers), "step": chosen}
    return xr.DataArray(
        shaped, dims=("concept", "layer", "step", *place), coords=coords, name="share"
    ).mean(gone)


def _image_dims(dit: Any, latent: Tensor) -> dict[str, int]:
    """Name → size of the dims of image positions; a video has frames."""
    rows, columns, frames = grid_of(dit, latent)
    return {"frame": frames, "y": rows, "x": columns} if frames > 1 else {"y": rows, "x": columns}


def _concept_tokens(
    model: HookedTextToImage,
    rows: Sequence[str],
    concepts: Sequence[str | Word],
    options: Mapping[str, Any],
) -> list[tuple[int, Bool[Tensor, " text_pos"]]]:
    """(row, its tokens) of each concept: its own row for a text, the prompt's for a word of it."""
    of_call = {
        name: value for name, value in options.items() if name not in ("guidance", "latents")
    }
    own = [one for one in concepts if isinstance(one, Word)]
    token_mask(model, rows[0], own or [0], **of_call)  # raises if the prompt lacks one
    found = []
    for one in concepts:
        row, tokens = (rows.index(one, 1), word(one)) if isinstance(one, str) else (0, one)
        found.append((row, token_mask(model, rows, tokens, missing="ignore", **of_call)[row]))
    return found


def _image_of_the_prompt(dit: Any, attentions: Sequence[str]) -> list[Any]:
    """Hooks by which every row attends to the image of row 0."""

    def share_image(x: Tensor, hook: HookPoint) -> Tensor:
        n, shared = dit.layout.n_image, x.clone()
        shared[1:, :n] = x[:1, :n]
        return shared

    return [(f"{name}.hook_{leaf}", share_image) for name in attentions for leaf in "kv"]


def joint_layers(dit: Any) -> dict[int, str]:
    """Layer → its attention whose queries are of the image and the text.

    Raises:
        ValueError: there is none.

    Example:
        >>> from hooked_models import families
        >>> joint_layers(families.hook(families.SUPPORTED["SD3Transformer2DModel"].small().eval()))[
        ...     0
        ... ]
        'attn'
    """
    names = [
        name
        for name in dit.hook_dict
        if name.endswith(".hook_z") and dit.axes(name)[1] in JOINT_POSITIONS
    ]
    if not names:
        raise ValueError(
            f"{type(dit).__name__}'s text is read by cross-attention and gets no output vectors: "
            "use readout.heatmap."
        )
    return {int(name.split(".")[1]): name.split(".")[2] for name in names}


def shares(
    z: Float[Tensor, "row pos head d_head"],
    n_image: int,
    concepts: Sequence[tuple[int, Bool[Tensor, " text_pos"]]],
) -> Float[Tensor, "concept image_pos"]:
    """Softmax over concepts of the products of row 0's image with each concept's mean token.

    Example:
        >>> z = torch.eye(3)[None, :, None]
        >>> mask = torch.tensor([True])
        >>> shares(z, 2, [(0, mask), (0, mask)]).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    vectors = z.float().flatten(2)
    means = [
        vectors[row, n_image : n_image + len(mask)][mask.to(z.device)].mean(0)
        for row, mask in concepts
    ]
    return (torch.stack(means) @ vectors[0, :n_image].T).softmax(0)
