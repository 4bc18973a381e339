"""Draws the picture of the front page.

One noise, one prompt, and four heads that read another word:

    python docs/picture.py

Above, the generation as it is; below, the same with the four heads given the keys and values of
the opposite prompt. Each frame is a denoising step: the decoded latent, and beside it the
attention of each head to the relation word.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dit_lens import scenes, viz
from dit_lens.intervene.interchange import Interchange
from hooked_models import HookedTextToImage

OUT = Path(__file__).parent / "_static" / "relation_heads.webp"
HEADS = ("L2H1", "L1H0", "L2H2", "L1H1")
STEPS = 14


@torch.no_grad()
def generation(
    model: HookedTextToImage, swap: Interchange, heads: tuple[str, ...], seed: int
) -> tuple[Float[Tensor, "frame 3 height width"], Float[np.ndarray, "step head y x"]]:
    """The decoded latent before each step and the final image, and attention of `HEADS`.

    Attention is that of each image position to the relation word.
    """
    word = model.to_str_tokens(swap.texts[0]).index("▁above")
    with model.hooks(fwd_hooks=swap.hooks(heads)):
        images, cache = model.run_with_cache(
            swap.texts,
            seed=seed,
            names_filter=lambda name: name.endswith(("cross_attn.hook_pattern", "hook_latent")),
        )
    latents = torch.cat([cache[f"steps.{step}.hook_latent"] for step in range(STEPS)])
    frames = torch.cat([model.decode(latents).clamp(0, 1), images])
    places = [(int(head[1]), int(head[3])) for head in HEADS]
    maps = [
        [cache["pattern", layer, "cross_attn", step][0, head, :, word] for layer, head in places]
        for step in range(STEPS)
    ]
    side = model.cfg.sample_size // model.cfg.patch_size
    return frames, np.array(maps).reshape(STEPS, len(HEADS), side, side)


def draw(
    frames: list[Float[Tensor, "3 height width"]],
    maps: list[Float[np.ndarray, "head y x"]],
    step: int,
) -> Image.Image:
    """One frame of the picture."""
    figure, grid = plt.subplots(2, 1 + len(HEADS), figsize=(7.6, 3.5), layout="constrained")
    for row, (title, word) in enumerate((("as it is", "above"), ("heads exchanged", "below"))):
        picture, *rest = (viz.bare(ax) for ax in grid[row])
        picture.imshow(frames[row].permute(1, 2, 0).float().numpy())
        picture.set_title(title, fontsize=10)
        for ax, head, values in zip(rest, HEADS, maps[row], strict=True):
            ax.imshow(values, cmap=viz.style.SEQUENTIAL, vmin=0, vmax=1)
            ax.set_title(f"{head} → “{word}”", fontsize=10, color=viz.style.head_color(head))
    figure.suptitle(
        f"“red circle is above blue square”, denoising step {step + 1} of {STEPS}", fontsize=11
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def main(seed: int = 1) -> None:
    """Draw all frames and write the animation."""
    model = HookedTextToImage.from_pretrained("rte-micro")
    scene = scenes.from_caption("red circle is above blue square")
    swap = Interchange(model, [scene], [scenes.opposite(scene)])
    runs = [generation(model, swap, heads, seed) for heads in ((), HEADS)]
    with viz.style.applied():
        # the last frame shows the images, beside the maps of the last step
        pictures = [
            draw(
                [frames[at] for frames, _ in runs],
                [maps[min(at, STEPS - 1)] for _, maps in runs],
                min(at, STEPS - 1),
            )
            for at in range(STEPS + 1)
        ]
    OUT.parent.mkdir(exist_ok=True)
    pictures[0].save(
        OUT,
        save_all=True,
        append_images=pictures[1:],
        duration=[260] * STEPS + [2600],
        loop=0,
        quality=70,
        method=6,
    )


if __name__ == "__main__":
    main()
