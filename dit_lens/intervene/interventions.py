"""An intervention as data: where, which heads, which tokens, which steps, which branch, and what to do there.

    hide = Intervention("blocks.2.cross_attn.hook_pattern", heads="L2H2", tokens="relation", action="knockout")
    images = model.run_with_hooks(prompts, seed=0, fwd_hooks=hide.hooks(model, prompts))

It becomes hooks in two stages. `Intervention.resolve` turns words and head numbers into one `Edit` a tensor, which holds
row-indexed tensors and knows no prompt any more; an `Edit` is a hook function. Since its rows can be taken and repeated
(`Edit.take`) and confined to some rows of a larger batch (`Edit.on`), many interventions can share one batch.

What is selected: the entries of the chosen heads and tokens (all, where None). Heads are the head axis of `q k v z result pattern
attn_scores` and of the forked inputs. Tokens are the axis of text positions (`hook_text`, `hook_caption`, the text encoder,
`cross_attn.hook_{k,v}`) or image positions (all else), for patterns and scores the keys: words in `cross_attn`. What it becomes:

==============  ====================================================================================================
``"zero"``      0. On a pattern the attention is lost, the others' is not raised: see ``"knockout"`` for that.
``"mean"``      The mean over the batch's rows, of this very run, position by position. On text positions, where prompts differ in
                wording, a role (or mask) takes the mean over all selected tokens of all rows instead.
``"resample"``  What another prompt of the batch has there in this very run, the same one at every step. On text positions
                a role's k-th token is taken from that prompt's k-th, so only prompts with equally many are exchanged.
``"knockout"``  Patterns and scores only: the selected keys are masked as PixArt masks a pad, by a score of -10000 before
                the softmax, so the other keys share the attention in their old proportions and every row sums to one.
Replace(value)  A tensor that broadcasts to the activation [batch …] of every site, or a cache or dict of them by name.
Scale(a)        a times what was there.
Add(vector)     what was there plus a tensor that broadcasts to it.
==============  ====================================================================================================

Hooks of one site act in the order they are given. Hooks on scores or patterns make that layer's attention explicit instead
of fused, for all rows of the batch: rows and branches that are not selected then keep their values up to rounding, else exactly.

The original's ablations (Wang, Fan, Pan, arXiv 2601.06338) are knock-outs in the conditional branch at all steps, but of the
first relation word only, and at the position of a word, not of a token; here a role is all of its tokens, by the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.names import BRANCHES, FINAL, Branch, Part, Site
from hooked_models.generation.views import StepView
from hooked_models.hooks import HookFunction, unknown_hook
from hooked_models.hooks_table import POSITIONS, axis_of
from hooked_models.text_encoders.random_tokens import PAD_ID

from ..readout.circuits import parse_head
from ..text.prompts import Role, token_roles
from .edits import Action, Add, Edit, Replace, Scale, along

__all__ = ["Action", "Add", "Edit", "Intervention", "Replace", "Scale"]


@dataclass(frozen=True)
class Intervention:
    """One thing to do to one tensor (or that of every layer, or step); the module says what actions mean.

    Args:
        site: a name within the denoiser ("blocks.2.cross_attn.hook_z"; "blocks.*.…" for every layer), "text_encoder.…" of one
            within the text encoder, or one between denoiser calls ("hook_latent", "hook_out", "hook_x0", …, "hook_image").
        heads: numbers, or one head as "L2H8", whose layer must be the site's; None for all.
        tokens: a role of `dit_lens.prompts` or several (each prompt's own tokens), positions, or a mask [prompt pos] (image
            positions row by row, of the model's own image size); None for all.
        steps: one, several or a slice of the denoising steps, counted from 0; None for all.
        branch: "cond", "uncond" or "both". The unconditional branch reads the empty prompt: an EOS, and pads. Its text encoder
            is "text_encoder.…" with branch="uncond". Sites between denoiser calls belong to no branch and take the default.
        action: what to do.

    Raises:
        ValueError: no such role, branch or action, or a head of another layer than the site's.
    """

    site: str
    heads: Sequence[int] | str | None = None
    tokens: str | Sequence[str] | Sequence[int] | Sequence[Sequence[bool]] | Bool[Tensor, "prompt pos"] | None = None
    # slices are unhashable before Python 3.12; equal interventions still have equal hashes
    steps: int | Sequence[int] | slice | None = field(default=None, hash=False)
    branch: Literal["cond", "uncond", "both"] = "cond"
    action: Action = "zero"

    def __post_init__(self) -> None:
        """Bring every field into one hashable form, so that equal interventions compare equal."""
        for name in ("heads", "tokens"):
            if isinstance(number := getattr(self, name), int):
                raise ValueError(f"{name}={number}: give a sequence of numbers, {name}=[{number}].")
        if isinstance(self.heads, str):
            layer, head = parse_head(self.heads)
            if (found := re.search(r"blocks\.(\d+)\.", self.site)) is None or int(found[1]) != layer:
                raise ValueError(
                    f"{self.heads} is no head of {self.site!r}: write a site with 'blocks.{layer}.', or heads=[{head}]."
                )
            self._set("heads", (head,))
        elif self.heads is not None:
            self._set("heads", tuple(self.heads))
            if named := [head for head in self.heads if isinstance(head, str)]:
                raise ValueError(
                    f"heads={list(self.heads)}: give numbers, the layer is the site's; or one head, heads={named[0]!r}."
                )
        if self.tokens is not None:
            tokens = self.tokens.tolist() if isinstance(self.tokens, Tensor) else self.tokens
            tokens = [tokens] if isinstance(tokens, str) else tokens
            self._set("tokens", tuple(tuple(row) if isinstance(row, list) else row for row in tokens))
        if not isinstance(self.steps, (int, slice)) and self.steps is not None:
            self._set("steps", tuple(self.steps))
        if self.heads == () or self.tokens == ():
            raise ValueError("Nothing is selected: heads and tokens are None for all of them, or name at least one.")
        if any(isinstance(position, bool) for position in self._tokens):
            raise ValueError("A mask of tokens is [prompt pos], one row for each prompt.")
        if unknown := [role for role in self._tokens if isinstance(role, str) and role not in get_args(Role)]:
            raise ValueError(f"{unknown[0]!r} is no role of a token: choose {', '.join(get_args(Role))}.")
        if self.branch not in (*BRANCHES, "both"):
            raise ValueError(f"branch={self.branch!r}: choose 'cond', 'uncond' or 'both'.")
        if not isinstance(self.action, (Replace, Scale, Add)) and self.action not in ("zero", "mean", "resample", "knockout"):
            raise ValueError(
                f"action={self.action!r}: choose 'zero', 'mean', 'resample', 'knockout', Replace(value), Scale(a) or Add(vector)."
            )

        if isinstance(self.action, Replace) and not (isinstance(self.action.value, Tensor) or hasattr(self.action.value, "keys")):
            raise ValueError(f"Replace({self.action.value!r}): give a tensor (torch.tensor(…)), or tensors by hook name.")

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    @property
    def _tokens(self) -> tuple[Any, ...]:
        return self.tokens or ()  # type: ignore[return-value]

    @property
    def _in_order(self) -> bool:
        """Whether the k-th selected token of one prompt corresponds to the k-th of another; else equal positions do."""
        return bool(self._tokens) and isinstance(self._tokens[0], (str, tuple))

    def hooks(
        self, model: HookedTextToImage | StepView, prompts: str | Sequence[str], *, num_steps: int = DEFAULT_STEPS, seed: int = 0
    ) -> list[tuple[str, HookFunction]]:
        """As `fwd_hooks` for a run of `model` on these prompts.

        Args:
            model: or a view of one step (`model.at`), whose names are the denoiser's own; its step and branch must be among
                the intervention's, and `prompts` be those of the rows that it is called with.
            prompts: what the run will be called with, in order.
            num_steps: as in the run.
            seed: of "resample".

        Raises:
            UnknownHookError: no such site; the nearest one is suggested.
            ValueError: site, heads, tokens, steps, branch and action do not go together, or select nothing.
        """
        if not isinstance(model, StepView):
            return [(edit.site.name, edit) for edit in self.resolve(model, prompts, num_steps=num_steps, seed=seed)]
        run: Any = model.run
        edits = self.resolve(run.model, prompts, num_steps=run.inputs.sampler.num_steps, seed=seed)
        here = [e for e in edits if (e.site.part, e.site.step, e.site.branch) == ("dit", model.step, model.branch)]
        if not here:
            raise ValueError(
                f"{self} has no denoiser site at step {model.step}, branch {model.branch!r}: all that this view hooks."
            )
        return [(edit.site.inner, edit) for edit in here]

    def resolve(
        self, model: HookedTextToImage, prompts: str | Sequence[str], *, num_steps: int = DEFAULT_STEPS, seed: int = 0
    ) -> list[Edit]:
        """One edit for every tensor that is touched, in rows of `prompts`; arguments and errors as in `hooks`."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        sites = self._sites(model, num_steps)
        edits = []
        for uncond in (False, True):
            if here := [site for site in sites if (site.branch == "uncond" or site.part == "null_text_encoder") == uncond]:
                edits += self._edits(model, here, texts, uncond, seed)
        if self.steps is None or isinstance(self.steps, slice):  # all, or all from or up to one
            edits = [replace(edit, num_steps=num_steps) if edit.site.step is not None else edit for edit in edits]
        if not edits:
            raise ValueError(f"{self} selects nothing: none of the prompts has such a token in this branch.")
        return edits

    def token_masks(
        self, model: HookedTextToImage, prompts: Sequence[str]
    ) -> tuple[Bool[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
        """Which positions `tokens` selects, and which there are: a prompt's words with EOS, or all of an image.

        In the conditional branch, unless `branch` is "uncond". Raises ValueError for a site without positions.
        """
        site, uncond = replace(self, steps=None)._sites(model, 1)[0], self.branch == "uncond"
        axes = _axes(model, site)
        read, words = _read(model, prompts, uncond)
        selected = self._selected(model, axes, site, read, words.shape[1])
        return selected, words if axes.text else torch.ones_like(selected)

    def _sites(self, model: HookedTextToImage, num_steps: int) -> list[Site]:
        names, site = model.names, self.site
        if site.startswith(("steps.", "null_text_encoder.")):
            raise ValueError(f"{site!r}: a site has no step or branch in its name; say steps=… and branch=… instead.")
        inner = site.removeprefix("text_encoder.")
        module = names.text_encoder if inner != site else names.sampler if inner in names.sampler.hook_dict else names.dit
        inners = [inner.replace("*", str(layer)) for layer in range(module.cfg.n_layers)] if module and "*" in inner else [inner]
        if module is None or not all(one in module.mod_dict for one in inners):
            owners = ((names.dit, ""), (names.sampler, ""), (names.text_encoder, "text_encoder."))
            raise unknown_hook(site, [f"{prefix}{one}" for owner, prefix in owners if owner for one in owner.hook_dict])
        inners = [module.canonical_name(one) for one in inners]
        if self.action == "knockout":
            if not all(one.endswith(("hook_pattern", "hook_attn_scores")) for one in inners):
                raise ValueError(f"Keys are knocked out of a pattern, not of {site!r}: take its hook_pattern, or another action.")
            inners = [one.replace("hook_pattern", "hook_attn_scores") for one in inners]
        if self.action == "zero" and (wrong := [one for one in inners if one.endswith(("hook_attn_scores", "hook_scale"))]):
            raise ValueError(f"A 0 at {wrong[0]} switches nothing off: use 'knockout' for attention, or Replace(value).")

        once = module is names.text_encoder or inner == FINAL
        if once and self.steps is not None:
            raise ValueError(f"{site} is computed once, not at every step: leave steps out.")
        if module is names.sampler and self.branch != "cond":
            raise ValueError(f"{site} belongs to neither branch: leave branch out.")
        steps = [None] if once else _steps(self.steps, num_steps)
        branches: tuple[Branch, ...] = BRANCHES if self.branch == "both" else (self.branch,)
        if module is names.sampler:
            sites = [Site("sampler", inner, step) for step in steps]
        elif module is names.text_encoder:
            parts: dict[Branch, Part] = {"cond": "text_encoder", "uncond": "null_text_encoder"}
            sites = [Site(parts[branch], one) for branch in branches for one in inners]
        else:
            sites = [Site("dit", one, step, branch) for step in steps for branch in branches for one in inners]
        return sites

    def _edits(
        self, model: HookedTextToImage, sites: Sequence[Site], texts: Sequence[str], uncond: bool, seed: int
    ) -> list[Edit]:
        """Of sites that differ in step and layer only, in runs of `texts`."""
        site, n = sites[0], len(texts)
        axes = _axes(model, site)
        read, words = _read(model, texts, uncond)
        selected = None if self.tokens is None else self._selected(model, axes, site, read, words.shape[1])
        if self.action == "knockout":
            exist = words if axes.text else words.new_ones(n, _image_positions(model))
            if selected is None or bool((~exist | selected).all(dim=1).any()):
                raise ValueError(
                    f"{self} would mask every key of {site.name} for some prompt, so that nothing is left to attend to: "
                    "say which tokens=…, or silence the heads by action='zero' on hook_z."
                )
        where = torch.ones(n, *[1] * (axes.ndim - 1), dtype=torch.bool)
        if selected is not None:
            where = where & along(selected, axes.ndim, 0, axes.token)
        if self.heads is not None:
            where = where & along(self._head_mask(model, axes, site), axes.ndim, axes.head)
        if not where.any():
            return []

        pooled, alike = None, torch.zeros(n, dtype=torch.long)
        if axes.text and self.action in ("mean", "resample"):
            if selected is not None and self._in_order:
                pooled, alike = axes.token, self._counts(model, read, selected)
            else:
                alike = words.sum(dim=1)
            if self.action == "mean" and pooled is None and len(alike.unique()) > 1:
                raise ValueError(
                    f"These prompts have different numbers of tokens, so equal positions of {site.name} mean different words: "
                    "take the mean over a role, tokens='relation', or Replace(reference)."
                )
        prompt = torch.tensor([texts.index(text) for text in texts])
        shared = Edit(site, self.action, where.to(model.device), prompt, alike, pooled, seed)
        shared.check()
        n_heads = None if axes.head is None else model.names.module(site.part).cfg.n_heads
        return [replace(shared, site=one, values=self._values(one, axes, n, n_heads)) for one in sites]

    def _selected(
        self, model: HookedTextToImage, axes: _Axes, site: Site, texts: Sequence[str], length: int
    ) -> Bool[Tensor, "prompt pos"]:
        if axes.token is None:
            raise ValueError(f"{site.name} has no positions: leave tokens out.")
        tokens, positions = self._tokens, length if axes.text else _image_positions(model)
        if isinstance(tokens[0], str):
            if not axes.text:
                raise ValueError(f"{site.name} has image positions, but tokens={tokens} are words: give positions.")
            return torch.tensor([[role in tokens for role in token_roles(model, text, length)] for text in texts])
        if isinstance(tokens[0], tuple):
            mask = torch.tensor(tokens)
            if mask.shape != (len(texts), positions):
                raise ValueError(
                    f"tokens is a mask {list(mask.shape)}; {site.name} takes [prompt pos] = {[len(texts), positions]}."
                )
            return mask
        if outside := [position for position in tokens if position not in range(positions)]:
            raise ValueError(f"There is no position {outside[0]} in {site.name}: it has positions 0 to {positions - 1}.")
        return torch.isin(torch.arange(positions), torch.tensor(tokens)).expand(len(texts), -1)

    def _head_mask(self, model: HookedTextToImage, axes: _Axes, site: Site) -> Bool[Tensor, " head"]:
        if axes.head is None:
            raise ValueError(f"{site.name} has no head axis: leave heads out, or take hook_z or hook_result of an attention.")
        n_heads = model.names.module(site.part).cfg.n_heads
        if outside := [head for head in self.heads or () if head not in range(n_heads)]:
            raise ValueError(f"There is no head {outside[0]} in {site.name}: it has heads 0 to {n_heads - 1}.")
        return torch.isin(torch.arange(n_heads), torch.tensor(self.heads))

    def _counts(
        self, model: HookedTextToImage, texts: Sequence[str], selected: Bool[Tensor, "prompt pos"]
    ) -> Int[Tensor, " prompt"]:
        """Equal numbers for prompts with equally many selected tokens, of every role."""
        counts = selected.sum(dim=1, keepdim=True)
        if isinstance(self._tokens[0], str):
            roles = [token_roles(model, text, selected.shape[1]) for text in texts]
            counts = torch.tensor([[found.count(role) for role in self._tokens] for found in roles])
        return counts.unique(dim=0, return_inverse=True)[1]

    def _values(self, site: Site, axes: _Axes, n: int, n_heads: int | None) -> Tensor | None:
        ndim = axes.ndim
        if isinstance(self.action, Add):
            values: Any = self.action.vector
        elif isinstance(self.action, Replace):
            values = self.action.value
            if not isinstance(values, Tensor):
                key = site.name if site.name in values.keys() else site.inner  # noqa: SIM118
                if key not in values.keys():  # noqa: SIM118
                    raise ValueError(
                        f"Replace has no value for {site.name}: cache it (names_filter, steps, branch), or name the site."
                    )
                values = values[key]
                if axes.head is not None and values.ndim >= ndim - axes.head and values.shape[axes.head - ndim] != n_heads:
                    raise ValueError(
                        f"The cache has {values.shape[axes.head - ndim]} of the {n_heads} heads of {site.name}, and does not say "
                        "which: cache all (without heads=…)."
                    )
        else:
            return None
        if values.ndim > ndim or (values.ndim == ndim and len(values) not in (1, n)):
            raise ValueError(
                f"The value for {site.name} has shape {list(values.shape)}, but {site.name} has {ndim} axes and {n} rows: "
                "give a row for each prompt, one for all, or a tensor that broadcasts to the last axes."
            )
        return values


class _Axes(NamedTuple):
    """How a tensor is laid out. Axis 0 is the batch."""

    ndim: int
    head: int | None
    token: int | None
    text: bool
    """Whether its tokens are words; else image positions."""


def _axes(model: HookedTextToImage, site: Site) -> _Axes:
    axes = model.names.module(site.part).axes(site.inner)
    tokens = [i for i, axis in enumerate(axes) if axis in (*POSITIONS["image"], *POSITIONS["text"])]
    token = tokens[-1] if tokens else None  # the keys of a pattern
    return _Axes(len(axes), axis_of(axes, ("head",)), token, token is not None and axes[token] in POSITIONS["text"])


def _read(model: HookedTextToImage, texts: Sequence[str], uncond: bool) -> tuple[Sequence[str], Bool[Tensor, "prompt text_pos"]]:
    """What a branch reads in runs of `texts`, and which of its positions are no pads."""
    read = [""] * len(texts) if uncond else texts
    return read, (model.to_tokens(read, length=model.to_tokens(texts).shape[1]) != PAD_ID).cpu()


def _image_positions(model: HookedTextToImage) -> int:
    return (model.cfg.sample_size // model.cfg.patch_size) ** 2


def _steps(steps: Any, num_steps: int) -> list[int]:
    every = range(num_steps)
    chosen = (
        every if steps is None else every[steps] if isinstance(steps, slice) else [steps] if isinstance(steps, int) else steps
    )
    if not chosen or not set(chosen).issubset(every):
        raise ValueError(f"steps={steps} are not among this run's steps, 0 to {num_steps - 1} (num_steps={num_steps}).")
    return list(chosen)
