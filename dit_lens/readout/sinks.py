"""Attention sinks: keys with far more attention than others, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer
from hooked_models.generation.capture import score_rows
from hooked_models.generation.loops import Call
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.noise import Seeds
from hooked_models.hooks.module import HookFunction

from ..intervene.portable_ops import MASKED
from .controls import names_of, without_largest
from .group_attention import cond_rows, run_reading


@torch.no_grad()
def attention_sinks(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    seed: Seeds = 0,
    num_steps: int = DEFAULT_STEPS,
    *,
    k: int = 1,
    sublayer: str = "attn",
    draws: int = 4,
    control_seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """The k keys of each layer and step with most attention, and whether the generation needs them.

    In a second generation these keys are masked (before the softmax, so that others share their
    attention); in `draws` more, as many random other keys of the same layers and steps. No pattern
    is kept in the first; masking makes the patterns of one layer at a time. Conditional branch.
    Source: arXiv 2605.09313, whose changes are perceptual, and whose sinks are found anew in the
    masked run.

    Args:
        model: hooked model; hooks that are attached to it act.
        prompts: one prompt or several.
        seed: an int gives every prompt the same noise; a sequence has one seed a prompt.
        num_steps: denoising steps of the generation.
        k: number of keys.
        sublayer: "attn", "cross_attn" or "image_attn".
        draws: of random keys; 0 measures no change and draws once.
        control_seed: seed of the random keys.
        options: further arguments of the model's call.

    Returns:
        Dims (prompt, layer, step, …): `received` (key_pos), mean attention of a query to a key,
        over heads and queries (they sum to 1); `sink` (rank), positions, most attention first;
        `share`, the sinks' part of the attention. By prompt: `shift`, the relative change of the
        last latents without the sinks, and `control_shift` (draw). Positions are those of the keys:
        the image's, then the text's.

    Raises:
        UnknownHookError: no layer has such an attention; the message may say why.
        ValueError: there are fewer than 2 k keys.

    Example:
        >>> found = attention_sinks(
        ...     model, "red circle is above blue square", num_steps=2, k=2, draws=1
        ... )
        >>> dict(found["sink"].sizes), dict(found["control_shift"].sizes)
        ({'prompt': 1, 'layer': 3, 'step': 2, 'rank': 2}, {'draw': 1, 'prompt': 1})
    """
    k, draws = integer("k", k, 1), integer("draws", draws, 0)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    begun = model.trajectory(texts, seed, num_steps, until=0, **options)
    names = names_of(model, f"{sublayer}.hook_attn_scores", range(len(begun)))
    if not names:
        model.dit.canonical_name(f"blocks.0.{sublayer}.hook_attn_scores")  # raises, with the reason
    layers = sorted({int(name.split(".")[4]) for name in names})
    found: dict[tuple[int, int], Tensor] = {}

    def readers(call: Call) -> dict[Any, _Received]:
        attentions: list[Any] = [
            model.dit.get_submodule(f"blocks.{layer}.{sublayer}") for layer in layers
        ]
        return {one: _Received(one, call, found, number) for number, one in enumerate(attentions)}

    run = run_reading(model, begun.inputs, readers)
    by_step = [
        torch.stack([found[layer, step] for layer in range(len(layers))], dim=1)
        for step in range(len(run))
    ]
    received = torch.stack(by_step, dim=2)  # [prompt layer step key_pos]
    share, sinks, changes = without_largest(run, names, received, masking, k, draws, control_seed)
    dims = ("prompt", "layer", "step")
    return xr.Dataset(
        {
            "received": ((*dims, "key_pos"), received.cpu().numpy()),
            "sink": ((*dims, "rank"), sinks.cpu().numpy()),
            "share": (dims, share.sum(-1).cpu().numpy()),
            **changes,
        },
        coords={"prompt": texts, "layer": layers},
    )


def masking(keys: Int[Tensor, "prompt k"]) -> HookFunction:
    """Hook on attention scores that masks keys, each prompt its own.

    Example:
        >>> masking(torch.tensor([[1]]))(torch.zeros(1, 1, 2, 2))[0, 0].tolist()
        [[0.0, -10000.0], [0.0, -10000.0]]
    """

    def mask(
        scores: Float[Tensor, "prompt head query_pos key_pos"], hook: HookPoint | None = None
    ) -> Tensor:
        chosen = torch.zeros(len(scores), scores.shape[-1], dtype=torch.bool, device=scores.device)
        return scores.masked_fill(
            chosen.scatter(1, keys.to(scores.device), True)[:, None, None], MASKED
        )

    return mask


@dataclass(repr=False, eq=False)  # TransformerLens calls repr of every hook
class _Received:
    """Keeps the mean attention that each key of one attention receives in one call."""

    attention: Any
    call: Call
    found: dict[tuple[int, int], Tensor]
    number: int

    def read(
        self,
        q: Float[Tensor, "row query_pos head d_head"],
        k: Float[Tensor, "#row key_pos head d_head"],
        bias: Float[Tensor, "#row #head _ key_pos"] | None,
    ) -> None:
        rows = cond_rows(self.call, len(q))
        bias = bias[rows] if bias is not None and len(bias) > 1 else bias
        q, k = q[rows].transpose(1, 2), k.expand(len(q), -1, -1, -1)[rows].transpose(1, 2)
        if bias is None or bias.shape[2] == 1:
            parts = (scores.softmax(-1) for scores in score_rows(q, k, self.attention.scale, bias))
        else:
            parts = (part for part in [(q @ k.mT * self.attention.scale + bias).softmax(-1)])
        self._keep(
            sum((part.float().sum((1, 2)) for part in parts), torch.zeros(())),
            q.shape[1] * q.shape[2],
        )

    def read_pattern(
        self, pattern: Float[Tensor, "row head query_pos key_pos"], hook: HookPoint
    ) -> None:
        part = pattern[cond_rows(self.call, len(pattern))]
        self._keep(part.float().sum((1, 2)), part.shape[1] * part.shape[2])

    def _keep(self, received: Float[Tensor, "prompt key_pos"], n: int) -> None:
        self.found[self.number, self.call.step] = received / n
