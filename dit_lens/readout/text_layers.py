"""Diffusion Lens: images drawn from the intermediate layers of a text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import integers, is_several
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.noise import Seeds


@torch.no_grad()
def diffusion_lens(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    layers: int | Sequence[int] | None = None,
    seed: Seeds = 0,
    num_steps: int = DEFAULT_STEPS,
    *,
    encoder: str | None = None,
    **options: Any,
) -> xr.DataArray:
    """Images from a text encoder's states after each of its layers, through its final norm.

    Later layers hand on their input, for the prompt and the negative prompt; everything after
    them, the final norm first, is the model's own. Source: Toker et al. 2024, arXiv 2403.05846.

    Args:
        model: a model whose text encoder has layers (not the random-token one).
        prompts: one prompt or several.
        layers: from 0, or (negative) from the end; by default all. The last one gives the model's
            own images.
        seed: an int gives every prompt the same noise; a sequence has one seed a prompt.
        num_steps: denoising steps of the generation.
        encoder: of a pipeline with several, its component ("text_encoder_2"); by default the last.
        options: further arguments of the model's call.

    Returns:
        Dims (layer, prompt, color, y, x), in [0, 1].

    Raises:
        NotImplementedError: the model is a pipeline behind nnsight.
        ValueError: there is no such encoder or layer, or the encoder has no layers.

    Example:
        >>> model = HookedTextToImage.from_pretrained("t5-micro")
        >>> found = diffusion_lens(model, "red circle is above blue square", [0, -1], num_steps=1)
        >>> dict(found.sizes)
        {'layer': 2, 'prompt': 1, 'color': 3, 'y': 128, 'x': 128}
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    native = model.text_encoder is not None
    blocks = [] if native else blocks_of(text_encoder(model, encoder))
    n = _count_layers(model) if native else len(blocks)
    if n == 0:
        raise ValueError(
            f"{type(model.text_encoder).__name__} has no layers: its tokens are read as they are."
        )
    given = (
        range(n)
        if layers is None
        else integers("layers", layers if is_several(layers) else [layers])
    )
    chosen = [layer + n if layer < 0 else layer for layer in given]
    if wrong := [layer for layer in chosen if not 0 <= layer < n]:
        raise ValueError(f"There is no layer {wrong[0]}: the text encoder has layers 0 to {n - 1}.")
    images = []
    for layer in chosen:
        with model.hooks(_exit_hooks(layer, n)) if native else skipped(blocks[layer + 1 :]):
            images.append(model(texts, seed, num_steps, **options).cpu())
    coords = {"layer": chosen, "prompt": texts}
    return xr.DataArray(
        torch.stack(images).float().numpy(),
        dims=("layer", "prompt", "color", "y", "x"),
        coords=coords,
    )


def _count_layers(model: HookedTextToImage) -> int:
    """Layers of a text encoder with hooks."""
    names = [name for name in model.hook_dict if name.startswith("text_encoder.")]
    return sum(name.endswith("hook_resid_post") for name in names)


def _exit_hooks(layer: int, n: int) -> list[Any]:
    """Hooks that put the stream after a layer in the place of that after the last."""
    held: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        held[str(hook.name).split(".")[0]] = x.clone()

    def give_back(x: Tensor, hook: HookPoint) -> Tensor:
        return held.pop(str(hook.name).split(".")[0])

    parts = [
        lambda name, i=i: name.endswith(f"text_encoder.blocks.{i}.hook_resid_post")
        for i in (layer, n - 1)
    ]
    return [] if layer == n - 1 else [(parts[0], keep), (parts[1], give_back)]


def text_encoder(model: Any, name: str | None = None) -> nn.Module:
    """A text encoder of a pipeline, by default the last.

    Raises:
        NotImplementedError: the pipeline is behind nnsight.
        ValueError: it has no such encoder.
    """
    if model.behind_nnsight:
        raise NotImplementedError(
            "The text encoders of this pipeline have no names, by which nnsight would reach their "
            "layers: use HookedTextToImage.from_pretrained where the weights are at hand."
        )
    parts = model.pipe.components
    known = [
        key
        for key, part in parts.items()
        if key.startswith("text_encoder") and isinstance(part, nn.Module)
    ]
    if not known or name not in (None, *known):
        raise ValueError(
            f"encoder={name!r}: {type(model.pipe).__name__} has "
            f"{', '.join(known) or 'no text encoder'}."
        )
    return parts[name or sorted(known)[-1]]


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The layers of a text encoder of transformers: its longest list of modules, not of images.

    Example:
        >>> from transformers import T5Config, T5EncoderModel
        >>> len(
        ...     blocks_of(
        ...         T5EncoderModel(T5Config(num_layers=3, d_model=8, d_kv=4, d_ff=8, num_heads=2))
        ...     )
        ... )
        3
    """
    lists = [
        list(part)
        for name, part in encoder.named_modules()
        if isinstance(part, nn.ModuleList)
        and "vis" not in name
        and len({type(one) for one in part}) == 1
    ]
    return max(lists, key=len, default=[])


@contextmanager
def skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers return the hidden states that they receive, for the time of the block."""

    def hand_on(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        received = args[0] if args else kwargs["hidden_states"]
        return (received, *output[1:]) if isinstance(output, tuple) else received

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(
                block.register_forward_hook(hand_on, with_kwargs=True, prepend=True).remove
            )
        yield
