"""An intervention as data: where, which heads, tokens, steps and branch, and the action there.

    pattern = "blocks.2.cross_attn.hook_pattern"
    hide = Intervention(pattern, heads="L2H2", tokens="relation", action="knockout")
    images = model.run_with_hooks(prompts, seed=0, fwd_hooks=hide.hooks(model, prompts))

It becomes hooks in two stages. `Intervention.resolve` turns words and head numbers into one `Edit`
a tensor, which holds row-indexed tensors and knows no prompt any more; an `Edit` is a hook
function. Since its rows can be taken and repeated (`Edit.take`) and confined to some rows of a
larger batch (`Edit.on`), many interventions can share one batch.

It selects the entries of the chosen heads and tokens (all, where None). docs/hooks.md has the axes
of every hook: heads are its head axis, tokens its axis of text positions or of image positions; in
patterns and scores the keys, which are words in `cross_attn`. A prompt in which nothing is selected
is an error, unless `missing="ignore"`. The actions:

- ``"zero"``: 0. On a pattern the attention is lost, the others' is not raised: see ``"knockout"``
  for that.
- ``"mean"``: the mean over the batch's rows, of this very run, position by position. On text
  positions, where prompts differ in wording, a role (or mask) takes the mean over all selected
  tokens of all rows instead.
- ``"resample"``: the activation of another prompt in the batch (the same donor at every step). On
  text positions a role's k-th token is taken from that prompt's k-th, so only prompts with equally
  many are exchanged.
- ``"knockout"``: patterns and scores only: the selected keys are masked as PixArt masks a pad, by a
  score of -10000 before the softmax, so the other keys share the attention in their old proportions
  and every row sums to one.
- ``Replace(value)``: a tensor that broadcasts to the activation [batch …] of every site, or a cache
  or dict of them by name.
- ``Scale(a)``: a times the activation.
- ``Add(vector)``: the activation plus a tensor that broadcasts to it.

Hooks of one site act in the order they are given. Hooks on scores or patterns make that layer's
attention explicit instead of fused, for all rows of the batch: rows and branches that are not
selected then keep their values up to rounding, else exactly.

The original's ablations (Wang, Fan, Pan, arXiv 2601.06338) are knock-outs in the conditional branch
at all steps, but of the first relation word only, and at the position of a word, not of a token;
here a role is all of its tokens, by the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, SupportsIndex, TypeAlias

from jaxtyping import Bool
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import chosen_steps, integer, integers, is_several, one_of, shown
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.names import BRANCHES, Branch, Part, Site
from hooked_models.generation.views import StepView
from hooked_models.hooks.module import HookFunction
from hooked_models.hooks.table import Hook, hook_row, layer_of

from ..readout.circuits import parse_head
from ..text.prompts import (
    TokenChoice,
    Tokens,
    Word,
    as_choice,
)
from .edits import Action, Add, Edit, Replace, Scale
from .resolution import Resolution
from .targets import counts_from_the_end, find_hooks

__all__ = ["Action", "Add", "Edit", "Intervention", "Replace", "Scale"]

PATTERNS = ("hook_pattern", "hook_attn_scores")
Steps: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | slice | None
ACTIONS = ("zero", "mean", "resample", "knockout")


@dataclass(frozen=True)
class Intervention:
    """One action on one tensor (or that of every layer, or step); the module describes the actions.

    Args:
        site: a name within the denoiser ("blocks.2.cross_attn.hook_z"; "blocks.*.…" for every
            layer), "text_encoder.…" of one within the text encoder, or one between denoiser calls
            ("hook_latent", "hook_out", "hook_x0", …, "hook_image").
        heads: numbers, or one head as "L2H8", whose layer must be the site's; None for all.
        tokens: a role ("relation"), a word (`prompts.word("cat", nth=2)`), several of these,
            positions, or a mask [prompt pos]; `dit_lens.prompts` describes them. On image positions
            (row by row, of the model's own image size) positions or a mask. None for all.
        steps: one, several or a slice of the denoising steps, from 0 or (negative) from the end;
            None for all.
        branch: "cond", "uncond" or "both". The unconditional branch reads the empty prompt: an EOS,
            and pads; with "both" roles and words act in the conditional branch. Its text encoder is
            "text_encoder.…" with branch="uncond". Sites between denoiser calls belong to no branch
            and take the default.
        action: see the module.
        missing: "ignore" leaves prompts alone in which nothing is selected; by default they are an
            error.

    Raises:
        ValueError: an argument has no meaning; the message names it and the fix.

    Example:
        >>> hide = Intervention(
        ...     "blocks.2.cross_attn.hook_pattern",
        ...     heads="L2H2",
        ...     tokens="relation",
        ...     action="knockout",
        ... )
        >>> hide.heads, hide.tokens
        ((2,), ('relation',))
    """

    site: str
    heads: str | Iterable[SupportsIndex] | None = None
    tokens: Tokens | None = None
    # slices are unhashable before Python 3.12; equal interventions still have equal hashes
    steps: Steps = field(default=None, hash=False)
    branch: Literal["cond", "uncond", "both"] = "cond"
    action: Action = "zero"
    missing: Literal["error", "ignore"] = "error"

    def __post_init__(self) -> None:
        """Bring every field into one hashable form, so that equal interventions compare equal."""
        if not isinstance(self.site, str):
            raise ValueError(
                f"site={shown(self.site)}: give the name of a hook, such as "
                "'blocks.2.cross_attn.hook_z'."
            )
        self._set("heads", _as_heads(self.site, self.heads))
        self._set("tokens", None if self.tokens is None else as_choice(self.tokens))
        self._set("steps", _as_steps(self.steps))
        one_of("branch", self.branch, (*BRANCHES, "both"))
        one_of("missing", self.missing, ("error", "ignore"))
        _check_action(self.action)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def choice(self) -> TokenChoice:
        """Tokens, in one form; empty for all."""
        return self.tokens or ()  # type: ignore[return-value]

    @property
    def names_words(self) -> bool:
        """True if tokens are chosen by role or word, in each prompt its own."""
        return bool(self.choice) and isinstance(self.choice[0], (str, Word))

    @property
    def in_order(self) -> bool:
        """True if the k-th selected tokens of two prompts correspond; else equal positions do."""
        return bool(self.choice) and isinstance(self.choice[0], (str, Word, tuple))

    def hooks(
        self,
        model: HookedTextToImage | StepView,
        prompts: str | Sequence[str],
        *,
        num_steps: int = DEFAULT_STEPS,
        seed: int = 0,
    ) -> list[tuple[str, HookFunction]]:
        """The intervention as `fwd_hooks` for a run of `model` on these prompts.

        Args:
            model: or a view of one step (`model.at`), whose names are the denoiser's own; its step
                and branch must be among the intervention's, and `prompts` be those of the rows that
                it is called with.
            prompts: the prompts of the run, in order.
            num_steps: as in the run.
            seed: of "resample".

        Raises:
            UnknownHookError: no such site; the nearest one is suggested.
            ValueError: site, heads, tokens, steps, branch and action do not go together, or nothing
                is selected in a prompt.

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> hide = Intervention("blocks.1.cross_attn.hook_z", heads=[2], steps=0)
            >>> [name for name, _ in hide.hooks(model, "red circle is above blue square")]
            ['steps.0.cond.blocks.1.cross_attn.hook_z']
        """
        if not isinstance(model, StepView):
            return [
                (edit.site.name, edit)
                for edit in self.resolve(model, prompts, num_steps=num_steps, seed=seed)
            ]
        run: Any = model.run
        edits = self.resolve(run.model, prompts, num_steps=run.inputs.num_steps, seed=seed)
        here = [
            e
            for e in edits
            if (e.site.part, e.site.step, e.site.branch) == ("dit", model.step, model.branch)
        ]
        if not here:
            raise ValueError(
                f"{self} has no denoiser site at step {model.step}, branch {model.branch!r}: all "
                "that this view hooks."
            )
        return [(edit.site.inner, edit) for edit in here]

    def resolve(
        self,
        model: HookedTextToImage,
        prompts: str | Sequence[str],
        *,
        num_steps: int = DEFAULT_STEPS,
        seed: int = 0,
    ) -> list[Edit]:
        """One edit for every tensor that is touched, in rows of `prompts`.

        Arguments and errors as in `hooks`.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        sites = self._sites(model, model.count_steps(num_steps))
        edits = []
        for uncond in (False, True):
            if here := [
                site
                for site in sites
                if (site.branch == "uncond" or site.part == "null_text_encoder") == uncond
            ]:
                edits += Resolution(self, model, texts, here[0], uncond).edits(here, seed)
        if counts_from_the_end(self.steps):
            edits = [
                replace(edit, num_steps=num_steps) if edit.site.step is not None else edit
                for edit in edits
            ]
        if not edits:
            raise ValueError(
                f"{self} selects nothing: none of the prompts has such a token in this branch."
            )
        return edits

    def token_masks(
        self, model: HookedTextToImage, prompts: Sequence[str]
    ) -> tuple[Bool[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
        """The positions that `tokens` selects, and those that there are.

        A prompt's words with EOS, or all of an image. In the conditional branch, unless `branch` is
        "uncond". Raises ValueError for a site without positions.
        """
        site = replace(self, steps=None)._sites(model, 1)[0]
        here = Resolution(self, model, prompts, site, self.branch == "uncond")
        return here.selected, here.there

    def _sites(self, model: HookedTextToImage, num_steps: int) -> list[Site]:
        part, inners = find_hooks(model, self.site)
        row = hook_row(inners[0], part)
        if wrong := [message for broken, message in MEANINGLESS if broken(self, row)]:
            raise ValueError(wrong[0].format(site=self.site))
        if self.action == "knockout":
            inners = [inner.replace("hook_pattern", "hook_attn_scores") for inner in inners]
        steps: list[Any] = (
            [None] if row.fires == "once" else list(chosen_steps(self.steps, num_steps))
        )
        if part == "sampler":
            return [Site("sampler", inners[0], step) for step in steps]
        branches: tuple[Branch, ...] = BRANCHES if self.branch == "both" else (self.branch,)
        if part == "text_encoder":
            parts: dict[Branch, Part] = {"cond": "text_encoder", "uncond": "null_text_encoder"}
            return [Site(parts[branch], inner) for branch, inner in product(branches, inners)]
        return [
            Site("dit", inner, step, branch)
            for step, branch, inner in product(steps, branches, inners)
        ]


# Fields, each in one form


def _as_heads(site: str, heads: Any) -> tuple[int, ...] | None:
    if heads is None:
        return None
    if isinstance(heads, str):
        layer, head = parse_head(heads)
        if layer_of(site) != layer:
            raise ValueError(
                f"{heads} is no head of {site!r}: write a site with 'blocks.{layer}.', or "
                f"heads=[{head}]."
            )
        return (head,)
    if not is_several(heads):
        raise ValueError(
            f"heads={shown(heads)}: give a sequence of numbers, heads=[{shown(heads)}]."
        )
    if named := [head for head in heads if isinstance(head, str)]:
        raise ValueError(
            f"heads={list(heads)}: give numbers, the layer is the site's; or one head, "
            f"heads={named[0]!r}."
        )
    if not (found := integers("heads", heads)):
        raise ValueError(
            "heads is empty, so that nothing is selected: leave it out for all heads, or name at "
            "least one."
        )
    return found


def _as_steps(steps: Any) -> int | tuple[int, ...] | slice | None:
    if steps is None or isinstance(steps, slice):
        return steps
    return integers("steps", steps) if is_several(steps) else integer("steps", steps)


def _check_action(action: Any) -> None:
    if not isinstance(action, (Replace, Scale, Add)) and not (
        isinstance(action, str) and action in ACTIONS
    ):
        raise ValueError(
            f"action={shown(action)}: choose 'zero', 'mean', 'resample', 'knockout', "
            "Replace(value), Scale(a) or Add(vector)."
        )


MEANINGLESS: tuple[tuple[Callable[[Intervention, Hook], bool], str], ...] = (
    (
        lambda i, row: i.action == "knockout" and not row.name.endswith(PATTERNS),
        "Keys are knocked out of a pattern, not of {site!r}: take its hook_pattern, or another "
        "action.",
    ),
    (
        lambda i, row: i.action == "zero" and row.name.endswith(("hook_attn_scores", "hook_scale")),
        "A 0 at {site!r} switches nothing off: use 'knockout' for attention, or Replace(value).",
    ),
    (
        lambda i, row: row.fires == "once" and i.steps is not None,
        "{site!r} is computed once, not at every step: leave steps out.",
    ),
    (
        lambda i, row: row.part == "sampler" and i.branch != "cond",
        "{site!r} belongs to neither branch: leave branch out.",
    ),
)
"""Combinations of an intervention and a hook without meaning, and their message."""
