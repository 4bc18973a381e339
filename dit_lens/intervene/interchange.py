"""Interchange: heads read some words of another prompt, and nothing else changes.

The main causal test of a relation head.

    swap = Interchange(model, drawn, [scenes.opposite(scene) for scene in drawn])
    images = model.run_with_hooks(swap.texts, seed=seeds, fwd_hooks=swap.hooks(["L2H1", "L1H0"]))

Masking a word also takes away its effect beside the relation, and leaves a model free to fall back
on a default; an interchange gives it a valid word instead, so that the image has to change in a way
that can be predicted. Source: interchange interventions, Geiger et al. (arXiv 2106.02997); keys and
values as in Wang, Fan, Pan (arXiv 2601.06338), § 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.views import StepView
from hooked_models.hooks.module import HookFunction

from ..readout.circuits import parse_head
from ..task import Scene, Trio, caption
from ..text.prompts import Role, role_mask
from .edits import Replace
from .interventions import Intervention

Steps = int | Sequence[int] | slice | None
Tokens = Role | Bool[Tensor, "prompt text_pos"] | None


class Interchange:
    """Prompts, and the cross-attention keys and values of as many source prompts.

    Example:
        >>> drawn = scenes.sample(2, seed=0, color_words="both")
        >>> swap = Interchange(model, drawn, [scenes.opposite(scene) for scene in drawn])
        >>> len(swap.of(["L0H1"])), len(swap.of(None))
        (2, 6)
    """

    def __init__(
        self,
        model: HookedTextToImage,
        scenes: Sequence[Scene | Trio | str],
        sources: Sequence[Scene | Trio | str],
    ) -> None:
        """Encode both.

        Args:
            model: the model that draws; its tokens are compared.
            scenes: scenes, or prompts of any task, that are drawn.
            sources: as many, whose words are read instead.

        Raises:
            ValueError: a source has another number of tokens than its prompt, so its words stand
                elsewhere.
        """
        self.model = model
        self.texts, others = (
            [scene if isinstance(scene, str) else caption(scene) for scene in each]
            for each in (scenes, sources)
        )
        lengths = [
            [model.to_tokens(text).shape[1] for text in texts] for texts in (self.texts, others)
        ]
        for text, other, n, m in zip(self.texts, others, *lengths, strict=True):
            if n != m:
                raise ValueError(
                    f"{other!r} has {m} tokens and {text!r} has {n}: interchange prompts of equal "
                    "length."
                )
        parts = [
            f"blocks.{layer}.cross_attn.hook_{part}"
            for layer in range(model.cfg.n_layers)
            for part in "kv"
        ]
        names = [f"steps.0.cond.{part}" for part in parts]
        with torch.no_grad():
            _, cache = model.run_with_cache(others, seed=0, names_filter=names, num_steps=1)
        # the same at every step: the text enters cross-attention without the timestep
        self.values: dict[str, Float[Tensor, "prompt text_pos head d_head"]] = {
            part: cache[name] for part, name in zip(parts, names, strict=True)
        }

    def of(
        self, heads: Sequence[str] | None, tokens: Tokens = None, steps: Steps = None
    ) -> list[Intervention]:
        """As interventions.

        Args:
            heads: their names, such as "L2H1"; None for all heads of the model.
            tokens: the role of the words that are read from the source, or a mask of them; None for
                all words.
            steps: as in `Intervention`.
        """
        action = Replace(self.values)
        if heads is None:
            return [Intervention(site, None, tokens, steps, action=action) for site in self.values]
        return [
            Intervention(
                f"blocks.{parse_head(head)[0]}.cross_attn.hook_{part}",
                head,
                tokens,
                steps,
                action=action,
            )
            for head in heads
            for part in "kv"
        ]

    def of_each(
        self, sets: Sequence[Sequence[str]], tokens: Role, steps: Steps = None
    ) -> list[Intervention]:
        """Every prompt's own heads: `sets[i]` are those of prompt i.

        For controls, a random set for each image.
        """
        words = role_mask(self.model, self.texts, tokens)
        found = []
        for head in sorted({head for heads in sets for head in heads}):
            here = torch.tensor([head in heads for heads in sets], device=words.device)
            # a head that is none of a prompt's own has nothing to do in it
            found += [
                replace(one, missing="ignore")
                for one in self.of([head], words & here[:, None], steps)
            ]
        return found

    def hooks(
        self,
        heads: Sequence[str] | None,
        tokens: Tokens = None,
        steps: Steps = None,
        view: StepView | None = None,
    ) -> list[tuple[str, HookFunction]]:
        """As `fwd_hooks` for a run of the model on `texts`, or for a view of one step."""
        return [
            hook
            for one in self.of(heads, tokens, steps)
            for hook in one.hooks(view or self.model, self.texts)
        ]


def matched_sets(
    model: HookedTextToImage,
    heads: Sequence[str],
    draws: int,
    rng: np.random.Generator,
    exclude: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Random sets with as many heads of each layer as `heads`.

    None of them is in `heads` or `exclude`. A layer without enough others lends from the whole rest
    of the model. Controls of one draw have no variance between sets: draw ten at least, and take
    sets, not images, as the unit of their interval.

    Raises:
        ValueError: the rest of the model has too few heads.

    Example:
        >>> drawn = list(matched_sets(model, ["L0H1", "L2H0"], 3, np.random.default_rng(0)))
        >>> [[head[:2] for head in one] for one in drawn]
        [['L0', 'L2'], ['L0', 'L2'], ['L0', 'L2']]
    """
    taken = {parse_head(head) for head in (*heads, *exclude)}
    free = [
        (layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)
    ]
    free = [place for place in free if place not in taken]
    if draws and len(free) < len(heads):
        raise ValueError(
            f"Besides {len(taken)} heads the model has {len(free)}: too few for a set of "
            f"{len(heads)}."
        )
    for _ in range(draws):
        left = [free[i] for i in rng.permutation(len(free))]
        drawn = []
        for layer, _ in map(parse_head, heads):
            place = next((place for place in left if place[0] == layer), left[0])
            left.remove(place)
            drawn.append("L{}H{}".format(*place))
        yield drawn
