"""Resolution of an intervention in the runs of some prompts.

Masks of the entries that it selects, and the values that it puts there, as edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.names import BRANCHES, Site

from ..text.prompts import check_found, position_mask, token_counts, token_mask
from .edits import Add, Edit, Replace, along
from .targets import Layout, Positions, layout_of, positions_there

if TYPE_CHECKING:
    from .interventions import Intervention


@dataclass(frozen=True)
class Resolution:
    """An intervention at a tensor of one guidance branch, in runs of some prompts.

    Example:
        >>> from dit_lens import Intervention
        >>> from hooked_models.generation.names import Site
        >>> inner, texts = "blocks.1.cross_attn.hook_z", ["red circle is above blue square"]
        >>> here = Resolution(Intervention(inner, heads=[2]), model, texts, Site("dit", inner, 0))
        >>> [edit.where.shape for edit in here.edits([here.site])]
        [torch.Size([1, 1, 3, 1])]
    """

    intervention: Intervention
    model: HookedTextToImage
    texts: Sequence[str]
    site: Site
    uncond: bool = False

    @cached_property
    def layout(self) -> Layout:
        """Axes of the tensor."""
        return layout_of(self.model, self.site)

    @cached_property
    def read(self) -> list[str]:
        """The texts that this branch reads."""
        return self.model.texts_read(self.texts, BRANCHES[self.uncond])

    @cached_property
    def positions(self) -> Positions:
        """Positions of the runs."""
        return self.model.layout(self.texts, BRANCHES[self.uncond])

    @property
    def words(self) -> Bool[Tensor, "prompt text_pos"]:
        """Which text positions hold a token."""
        return self.positions.text_mask.cpu()

    @property
    def there(self) -> Bool[Tensor, "prompt pos"]:
        """Which of the tensor's positions there are.

        A prompt's words with EOS, or all of an image.
        """
        return positions_there(self.positions, self.layout, self.words)

    @property
    def n_heads(self) -> int:
        """Number of heads of the tensor's part of the model."""
        return int(self.model.names.module(self.site.part).cfg.n_heads)

    def edits(self, sites: Sequence[Site], seed: int = 0) -> list[Edit]:
        """Edits for sites that differ from this one in step and layer only.

        None where nothing is selected.
        """
        one, layout, n = self.intervention, self.layout, len(self.texts)
        selected = None if one.tokens is None else self.selected
        if (
            selected is not None
            and one.missing == "error"
            and not (self.uncond and one.branch == "both")
        ):
            fix = ", or say missing='ignore' to leave such prompts as they are"
            check_found(self.model, self.read, one.choice, selected, fix)
        if one.action == "knockout":
            self._check_some_key_is_left(selected)
        where = torch.ones(n, *[1] * (layout.ndim - 1), dtype=torch.bool)
        if selected is not None:
            where = where & along(selected, layout.ndim, 0, layout.token)
        if one.heads is not None:
            where = where & along(self._head_mask(), layout.ndim, layout.head)
        if not where.any():
            return []
        ordered_axis, exchange_group = self._exchangeable(selected)
        prompt = torch.tensor([self.texts.index(text) for text in self.texts])
        shared = Edit(
            self.site,
            one.action,
            where.to(self.model.device),
            prompt,
            exchange_group,
            ordered_axis,
            seed,
        )
        shared.check()
        return [replace(shared, site=site, values=self._values(site)) for site in sites]

    @cached_property
    def selected(self) -> Bool[Tensor, "prompt pos"]:
        """The positions that the intervention's tokens are at.

        Raises:
            ValueError: the tensor has no positions, or not of words.
        """
        site, layout, choice = self.site, self.layout, self.intervention.choice
        if layout.token is None:
            raise ValueError(f"{site.name} has no positions: leave tokens out.")
        length, width = self.words.shape[1], self.there.shape[1]
        mask = position_mask(choice, len(self.texts), width, site.name)
        if mask is not None:
            return mask
        if layout.kind == "image":
            named = ", ".join(map(str, choice))
            raise ValueError(
                f"{site.name} has image positions, but tokens={named} names words: give positions."
            )
        of_text = token_mask(self.model, self.read, choice, length=length, missing="ignore")
        image = self.positions.n_image if layout.kind == "joint" else 0  # before the words
        return torch.nn.functional.pad(of_text, (image, width - image - length))

    def _check_some_key_is_left(self, selected: Bool[Tensor, "prompt pos"] | None) -> None:
        if selected is None or bool((~self.there | selected).all(dim=1).any()):
            raise ValueError(
                f"{self.intervention} would mask every key of {self.site.name} for some prompt, so "
                "that nothing is left to attend to: say which tokens=…, or silence the heads by "
                "action='zero' on hook_z."
            )

    def _exchangeable(
        self, selected: Bool[Tensor, "prompt pos"] | None
    ) -> tuple[int | None, Int[Tensor, " prompt"]]:
        """For "mean" and "resample".

        The axis along which tokens correspond in order (or None), and groups of like prompts.
        """
        one = self.intervention
        if self.layout.kind not in ("text", "joint") or one.action not in ("mean", "resample"):
            return None, torch.zeros(len(self.texts), dtype=torch.long)
        if selected is not None and one.in_order:
            # equal numbers for prompts with equally many selected tokens, of every role and word
            counts = selected.sum(dim=1, keepdim=True)
            if one.names_words:
                found = token_counts(self.model, self.read, one.choice, selected.shape[1])
                counts = torch.tensor(found)
            return self.layout.token, counts.unique(dim=0, return_inverse=True)[1]
        exchange_group = self.words.sum(dim=1)
        if one.action == "mean" and len(exchange_group.unique()) > 1:
            raise ValueError(
                "These prompts have different numbers of tokens, so equal positions of "
                f"{self.site.name} mean different words: "
                "take the mean over a role, tokens='relation', or Replace(reference)."
            )
        return None, exchange_group

    def _head_mask(self) -> Bool[Tensor, " head"]:
        if self.layout.head is None:
            raise ValueError(
                f"{self.site.name} has no head axis: leave heads out, or take hook_z or "
                "hook_result of an attention."
            )
        heads, n = self.intervention.heads, self.n_heads
        if outside := [head for head in heads or () if head not in range(n)]:
            raise ValueError(
                f"There is no head {outside[0]} in {self.site.name}: it has heads 0 to {n - 1}."
            )
        return torch.isin(torch.arange(n), torch.tensor(heads))

    def _values(self, site: Site) -> Tensor | None:
        """Values that the action puts at a site; None for an action without."""
        action, ndim, n = self.intervention.action, self.layout.ndim, len(self.texts)
        if isinstance(action, Add):
            values: Any = action.vector
        elif isinstance(action, Replace):
            values = action.value
            values = values if isinstance(values, Tensor) else self._entry(values, site)
        else:
            return None
        if values.ndim > ndim or (values.ndim == ndim and len(values) not in (1, n)):
            raise ValueError(
                f"The value for {site.name} has shape {list(values.shape)}, but {site.name} has "
                f"{ndim} axes and {n} rows: give a row for each prompt, one for all, or a tensor "
                "that broadcasts to the last axes."
            )
        return values

    def _entry(self, values: Any, site: Site) -> Tensor:
        """The tensor of a site in a cache or dict."""
        key = site.name if site.name in values.keys() else site.inner  # noqa: SIM118
        if key not in values.keys():  # noqa: SIM118
            raise ValueError(
                f"Replace has no value for {site.name}: cache it (names_filter, steps, branch), or "
                "name the site."
            )
        value, ndim, head = values[key], self.layout.ndim, self.layout.head
        if head is None or value.ndim < ndim - head:
            return value
        if (count := value.shape[head - ndim]) != self.n_heads:
            raise ValueError(
                f"The cache has {count} of the {self.n_heads} heads of {site.name}, and does not "
                "say which: cache all (without heads=…)."
            )
        return value
