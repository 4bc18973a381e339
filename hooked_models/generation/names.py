"""The names of a whole generation.

`steps.{s}.{cond|uncond}.{name in the denoiser}` and those around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, SupportsIndex

from transformer_lens.hook_points import HookPoint

from ..arguments import chosen_steps, integer, one_of, shown
from ..hooks.errors import UnknownHookError, unknown_hook
from ..hooks.module import HookedModule, NameFilter, as_names
from ..hooks.table import Hook, hook_row, layer_of

Branch = Literal["cond", "uncond"]
BRANCHES: tuple[Branch, ...] = ("cond", "uncond")
Head = str | tuple[int, int]
"""\"L2H8\" or (2, 8)."""
Part = Literal["dit", "sampler", "text_encoder", "null_text_encoder"]
IMAGE_HOOK = "hook_image"


def parse_head(head: Head) -> tuple[int, int]:
    """(layer, head), both from 0, of "L2H8" or (2, 8).

    Raises:
        ValueError: the text has another form.
    """
    if isinstance(head, tuple) and len(head) == 2:
        return integer("layer", head[0], 0), integer("head", head[1], 0)
    match = re.fullmatch(r"[Ll](\d+)[Hh](\d+)", head) if isinstance(head, str) else None
    if match is None:
        raise ValueError(
            f"{shown(head)} names no head: write a layer and a head from 0, such as 'L2H8' or (2, "
            "8)."
        )
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Site:
    """One hookable tensor of a generation, and where its hook is attached.

    The place is a module, and a name in it.
    """

    part: Part
    inner: str
    """Canonical name within the part."""
    step: int | None = None
    branch: Branch | None = None

    @cached_property
    def name(self) -> str:
        """The full name, as caches use it."""
        prefix = "" if self.step is None else f"steps.{self.step}."
        prefix += "" if self.branch is None else f"{self.branch}."
        return prefix + (
            f"{self.part}.{self.inner}" if self.part.endswith("text_encoder") else self.inner
        )

    @property
    def layer(self) -> int | None:
        """The layer of a tensor inside a block, else None."""
        return layer_of(self.inner)

    @property
    def row(self) -> Hook:
        """The site's row in the table of hooks: axes, flag, and when it fires."""
        return hook_row(self.inner, self.part)

    @property
    def needs_uncond(self) -> bool:
        """True if the tensor exists only where guidance runs a second branch."""
        return (
            self.branch == "uncond"
            or self.inner == "hook_out_uncond"
            or self.part == "null_text_encoder"
        )

    def is_in(self, branch: Branch | Literal["both"]) -> bool:
        """True if the tensor belongs to a branch; one of no branch belongs to each."""
        return branch in ("both", self.branch or ("uncond" if self.needs_uncond else branch))

    def fires(self, guided: bool, forms_x0: bool) -> bool:
        """True if a run with this guidance computes it.

        The solver has a known clean-image prediction, or none.
        """
        return (guided or not self.needs_uncond) and (forms_x0 or self.inner != "hook_x0")


_TEMPLATE_POINT = HookPoint()


class GenerationHookPoint(HookPoint):
    """The `hook` argument of a hook function during a generation.

    The full `name`, `step`, `branch` and a correct `layer()`.
    """

    step: int | None
    branch: Branch | None
    _layer: int | None

    def __init__(self, site: Site) -> None:
        # Thousands are made where all names are hooked: without nn.Module's checks of every
        # attribute that is set.
        self.__dict__.update(vars(_TEMPLATE_POINT), fwd_hooks=[], bwd_hooks=[], ctx={})
        self.__dict__.update(name=site.name, step=site.step, branch=site.branch, _layer=site.layer)

    def layer(self) -> int:
        """The layer of a name that has one.

        Raises:
            ValueError: the tensor belongs to no layer.
        """
        if self._layer is None:
            raise ValueError(f"{self.name} belongs to no layer.")
        return self._layer

    def add_hook(self, *args: Any, **kwargs: Any) -> None:
        """Raise TypeError: a `hook_dict` holds names, of tensors that only a run has."""
        raise TypeError(
            f"Attach it to the model, where runs find it: model.add_hook({self.name!r}, hook), or "
            "run_with_hooks."
        )


class GenerationNames(Mapping[str, HookPoint]):
    """Every name of a generation of `num_steps` steps, as a virtual `hook_dict`.

    `site(name)` also takes later steps.
    """

    def __init__(
        self,
        dit: HookedModule,
        sampler: HookedModule,
        text_encoder: HookedModule | None,
        count_steps: Callable[[], int],
    ) -> None:
        """Names of the model's parts.

        `count_steps`: the steps of a generation of the default length, which depends on the
        scheduler.
        """
        self.dit, self.sampler, self.text_encoder, self.count_steps = (
            dit,
            sampler,
            text_encoder,
            count_steps,
        )
        self._known: tuple[object, Sequence[Site]] = None, ()

    @property
    def num_steps(self) -> int:
        """Number of steps of a generation of the default length."""
        return self.count_steps()

    def site(self, name: str) -> Site:
        """Where a full name leads; aliases are resolved.

        Raises:
            UnknownHookError: no such name; the message has the nearest one.
            ValueError: the name is held back by a flag, which the message names.
        """
        head, _, rest = name.partition(".")
        if head in ("text_encoder", "null_text_encoder") and self.text_encoder is not None:
            return self._inside(Site(head, rest), self.text_encoder, f"{head}.")  # type: ignore[arg-type]
        if head == "steps":
            step, _, rest = rest.partition(".")
            if step.isdigit():
                branch, _, inner = rest.partition(".")
                for known in BRANCHES:
                    if branch == known:
                        return self._inside(
                            Site("dit", inner, int(step), known),
                            self.dit,
                            f"steps.{step}.{branch}.",
                        )
                if rest in self.sampler.hook_dict and rest != IMAGE_HOOK:
                    return Site("sampler", rest, int(step))
        if name == IMAGE_HOOK:
            return Site("sampler", IMAGE_HOOK)
        if name in self.dit.mod_dict and name.rpartition(".")[2].startswith("hook_"):
            raise UnknownHookError(
                f"{name!r} is computed at every step and in each branch: name one, "
                f"'steps.0.cond.{name}'"
            )
        if name in self.sampler.hook_dict:
            raise UnknownHookError(
                f"{name!r} is computed at every step: name one, 'steps.0.{name}'"
            )
        raise unknown_hook(name, list(self))

    def _inside(self, site: Site, module: HookedModule, prefix: str) -> Site:
        try:
            return replace(site, inner=module.canonical_name(site.inner))
        except UnknownHookError:
            raise unknown_hook(
                prefix + site.inner,
                [prefix + known for known in module.mod_dict if "hook_" in known],
            ) from None
        except ValueError as error:  # held back by a flag, which is set on the part
            raise ValueError(str(error).replace("call set_", "call model.dit.set_")) from None

    def module(self, part: str) -> HookedModule:
        """The hooked module of a part."""
        modules = {
            "dit": self.dit,
            "sampler": self.sampler,
            "text_encoder": self.text_encoder,
            "null_text_encoder": self.text_encoder,
        }
        found = modules[part]
        assert found is not None  # no site leads to an encoder without hooks
        return found

    def sites(
        self,
        num_steps: int | None = None,
        steps: Iterable[int] | None = None,
        branches: Sequence[Branch] = BRANCHES,
    ) -> Iterator[Site]:
        """Every site that fires, in the order of a run (of the given steps).

        Hooks held back by a flag are left out.
        """
        parts: tuple[Part, ...] = (
            ("text_encoder", "null_text_encoder") if self.text_encoder is not None else ()
        )
        for part in parts:
            assert self.text_encoder is not None
            yield from (Site(part, inner) for inner in self.text_encoder.names(None))
        inners = self.dit.names(None)
        for step in (
            range(self.num_steps if num_steps is None else num_steps) if steps is None else steps
        ):
            yield Site("sampler", "hook_latent", step)
            for branch in branches:
                yield from (Site("dit", inner, step, branch) for inner in inners)
            yield from (
                Site("sampler", inner, step)
                for inner in self.sampler.hook_dict
                if inner not in ("hook_latent", IMAGE_HOOK)
            )
        yield Site("sampler", IMAGE_HOOK)

    def _sites(self, steps: tuple[int, ...], branch: Branch | Literal["both"]) -> Sequence[Site]:
        """Every site; kept for the next time, for as long as no flag lets other hooks fire."""
        branches = BRANCHES if branch == "both" else (branch,)
        modules = [self.dit] if self.text_encoder is None else [self.dit, self.text_encoder]
        firing = [module.names(None) for module in modules], steps, branches
        known = self._known  # read once: another thread may replace it
        if known[0] != firing:
            self._known = known = firing, list(self.sites(steps=steps, branches=branches))
        return known[1]

    def select(
        self,
        names_filter: NameFilter = None,
        steps: SupportsIndex | Iterable[SupportsIndex] | slice | None = None,
        branch: Branch | Literal["both"] = "cond",
        num_steps: int | None = None,
        guided: bool = True,
        forms_x0: bool = True,
    ) -> list[Site]:
        """The sites that a run fires at and a caller wants.

        Arguments as in `HookedTextToImage.run_with_cache`.

        Raises:
            UnknownHookError: a name does not exist.
            ValueError: nothing is selected, or a step lies outside of the run.
        """
        chosen = chosen_steps(steps, num_steps or self.num_steps)
        one_of("branch", branch, (*BRANCHES, "both"))

        at_steps = (None, *chosen) if steps is None else tuple(chosen)

        def is_chosen(site: Site) -> bool:
            return site.step in at_steps and site.is_in(branch) and site.fires(guided, forms_x0)

        if names_filter is None or callable(names_filter):
            every_site = self._sites(tuple(chosen), branch)
            keeps = names_filter or (lambda name: True)
            sites = [site for site in every_site if is_chosen(site) and keeps(site.name)]
        else:
            sites = [
                site
                for name in as_names(names_filter)
                for site in self._named(name, chosen, is_chosen)
            ]
        if not sites:
            raise ValueError(
                "Nothing would be cached: names_filter, steps and branch select no tensor that "
                "this run computes."
            )
        return sites

    def _named(
        self, name: str, steps: Sequence[int], is_chosen: Callable[[Site], bool]
    ) -> list[Site]:
        """The site of a full name, or those of a denoiser's name at chosen steps and branches."""
        if name in self.dit.mod_dict:
            inner = self.dit.canonical_name(name)
            every = (Site("dit", inner, step, branch) for step in steps for branch in BRANCHES)
            return [site for site in every if is_chosen(site)]
        site = self.site(name)
        if site.step is not None and site.step not in steps:
            raise ValueError(
                f"{name!r} lies outside of the steps that are to be cached, {list(steps)}."
            )
        return [site]

    def __iter__(self) -> Iterator[str]:
        return (site.name for site in self.sites())

    def __len__(self) -> int:
        around = 0 if self.text_encoder is None else 2 * len(self.text_encoder.names(None))
        final = 1
        per_step = len(BRANCHES) * len(self.dit.names(None)) + len(self.sampler.hook_dict) - final
        return around + self.num_steps * per_step + final

    def __getitem__(self, name: str) -> HookPoint:
        return GenerationHookPoint(self.site(name))
