"""The tensors that a cache keeps, chosen where they arise.

Some heads, and whole patterns or sums of them. At 1024 px a pattern of one layer of PixArt-XL is 16
× 4096² numbers for each prompt and branch. Where heads are chosen, or a summary is enough, patterns
are computed from queries and keys, for the chosen rows and heads alone, in chunks that are never
larger than the queries; the attention itself stays fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..arguments import integer, is_several, one_of, shown
from ..hooks.module import HookFunction, has_hooks
from ..hooks.table import axis_of
from .names import BRANCHES, Site, parse_head

if TYPE_CHECKING:
    from .model import HookedTextToImage

Heads = str | int | tuple[int, int] | Sequence[str | int | tuple[int, int]]
Patterns = Literal["whole", "entropy", "largest", "received"]
PATTERN = ("hook_pattern", "hook_attn_scores")
TEXT_KV = ("cross_attn.hook_k", "cross_attn.hook_v")


def heads_by_layer(heads: Heads | None, n_layers: int, n_heads: int) -> dict[int, list[int]] | None:
    """Layer → its chosen heads, ascending.

    "L2H8" or (2, 8) is one head of one layer, an int that head of every layer.

    Raises:
        ValueError: there is no such head.
    """
    if heads is None:
        return None
    chosen: dict[int, set[int]] = {}
    several = is_several(heads) and not isinstance(heads, tuple)
    for head in list(heads) if several else [heads]:  # type: ignore[arg-type]
        named = isinstance(head, (str, tuple))
        if named:
            pairs = [parse_head(head)]  # type: ignore[arg-type]
        else:
            pairs = [(layer, integer("heads", head)) for layer in range(n_layers)]
        for layer, index in pairs:
            if not (0 <= layer < n_layers and 0 <= index < n_heads):
                raise ValueError(
                    f"There is no head {head}: the model has {n_layers} layers of {n_heads} heads."
                )
            chosen.setdefault(layer, set()).add(index)
    if not chosen:
        raise ValueError(
            f"heads={shown(heads)}: name at least one, such as 'L2H8', or leave heads out for all."
        )
    return {layer: sorted(indices) for layer, indices in sorted(chosen.items())}


def head_axis(site: Site) -> int | None:
    """The axis of a denoiser's tensor that heads can be chosen on."""
    return axis_of(site.row.axes, ("head",)) if site.part == "dit" else None


def entropy(pattern: Tensor) -> Tensor:
    """Entropy of each query's row, in nats."""
    return torch.special.entr(pattern).sum(-1)


@dataclass
class Recorder:
    """Hooks that keep the chosen part of each site's tensor in `tensors`, until it is taken."""

    model: HookedTextToImage
    sites: Sequence[Site]
    heads: Mapping[int, list[int]] | None = None
    patterns: Patterns = "whole"
    device: str | torch.device | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    """Names whose tensor is that of an earlier name: no step changes the text's keys and values."""
    inputs: Any = None
    """To be set before the first step."""
    _text: dict[tuple[str, Any], tuple[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("patterns", self.patterns, get_args(Patterns))
        if self.heads is not None:
            self.sites = [
                site for site in self.sites if head_axis(site) is None or site.layer in self.heads
            ]
        if not self.sites:
            raise ValueError(
                "Nothing would be cached: names_filter and heads have no tensor in common."
            )
        if self.patterns != "whole" and any(
            site.inner.endswith("hook_attn_scores") for site in self.sites
        ):
            raise ValueError(
                "patterns= summarises patterns; scores before the softmax have no such summary: "
                "leave them out."
            )
        self._by_name = {site.name: site for site in self.sites}

    def hooks(self) -> Iterator[tuple[str, HookFunction]]:
        """To be attached for the time of a run."""
        for site in self.sites:
            if self._from_queries(site):
                yield from self._pattern_hooks(site)
            else:
                yield site.name, self._keep

    def take(self) -> dict[str, Tensor]:
        """Take everything that was kept since the last call."""
        taken, self.tensors = self.tensors, {}
        return taken

    def _keep(self, tensor: Tensor, hook: HookPoint) -> None:
        site = self._by_name[str(hook.name)]
        kept = self._chosen(tensor.detach(), site, head_axis(site))
        if site.inner.endswith("hook_pattern") and site.part == "dit" and self.patterns != "whole":
            kept = self._summary(iter([kept]), kept.shape)
        self._store(site, kept)

    def _chosen(self, tensor: Tensor, site: Site, axis: int | None) -> Tensor:
        if self.heads is None or axis is None or site.layer is None:
            return tensor
        return tensor.index_select(axis, torch.tensor(self.heads[site.layer], device=tensor.device))

    def _store(self, site: Site, tensor: Tensor) -> None:
        key = (site.inner, site.branch)
        if site.inner.endswith(TEXT_KV) and key in self._text:
            name, earlier = self._text[key]
            if torch.equal(earlier, tensor.to(earlier.device)):
                self.tensors[site.name], self.same[site.name] = earlier, name
                return
        # copied: a slice would keep the other branch alive, and a later hook may write in place
        self.tensors[site.name] = kept = tensor.to(self.device or tensor.device, copy=True)
        if site.inner.endswith(TEXT_KV):
            self._text[key] = (site.name, kept)

    # Patterns without the explicit attention

    def _from_queries(self, site: Site) -> bool:
        """True if only a part of the pattern is needed, and no hook requires it as a whole."""
        if (
            site.part != "dit"
            or not site.inner.endswith(PATTERN)
            or (self.heads is None and self.patterns == "whole")
        ):
            return False
        pair = [f"{site.inner.rpartition('.')[0]}.{leaf}" for leaf in PATTERN]
        sites = [Site("dit", inner, site.step, branch) for inner in pair for branch in BRANCHES]
        attached = any(
            True for _ in self.model.active_hooks(lambda one: one in sites, lambda: sites)
        )
        return not attached and not any(has_hooks(self.model.dit.hook_dict[name]) for name in pair)

    def _pattern_hooks(self, site: Site) -> Iterator[tuple[str, HookFunction]]:
        stem, held = site.name.rpartition(".")[0], {}
        attention: Any = self.model.dit.get_submodule(site.inner.rpartition(".")[0])

        def read_q(q: Float[Tensor, "batch pos head d_head"], hook: HookPoint) -> None:
            held["q"] = self._chosen(q.detach(), site, 2).transpose(1, 2)

        def read_k(k: Float[Tensor, "batch key_pos head d_head"], hook: HookPoint) -> None:
            q, k = held.pop("q"), self._chosen(k.detach(), site, 2).transpose(1, 2)
            assert self.inputs is not None
            assert site.branch is not None
            bias = self.inputs.bias(site.inner.rpartition(".")[0], site.branch, attention)
            bias = bias if bias is None or bias.shape[1] == 1 else self._chosen(bias, site, 1)
            rows = score_rows(q, k, attention.scale, bias)
            if site.inner.endswith("hook_pattern"):
                rows = (scores.softmax(dim=-1) for scores in rows)
            self._store(site, self._summary(rows, (*q.shape[:3], k.shape[2])))

        yield f"{stem}.hook_q", read_q
        yield f"{stem}.hook_k", read_k

    def _summary(self, rows: Iterator[Tensor], shape: Sequence[int]) -> Tensor:
        """Summary of a pattern [batch head query key] that comes in chunks of queries."""
        if self.patterns == "received":
            return sum((part.float().sum(2) for part in rows), torch.zeros(()))
        per_row: dict[str, Callable[[Tensor], Tensor]] = {
            "whole": lambda part: part,
            "entropy": lambda part: entropy(part.float()),
            "largest": lambda part: part.float().amax(-1),
        }
        reduce, whole, start = per_row[self.patterns], None, 0
        for part in rows:
            found = reduce(part)
            if whole is None:  # filled chunk by chunk, so that there is never a second copy
                whole = found.new_empty(
                    (*shape[:3], *found.shape[3:]), device=self.device or found.device
                )
            whole[:, :, start : start + part.shape[2]] = found
            start += part.shape[2]
        assert whole is not None
        return whole


def score_rows(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    scale: float,
    bias: Float[Tensor, "#batch #head _ key"] | None,
) -> Iterator[Float[Tensor, "batch head row key"]]:
    """Attention scores in chunks of queries, a quarter as large as `q`.

    Scores, softmax and summary are no more than it.
    """
    start = 0
    for rows in q.split(max(1, q.shape[2] * q.shape[3] // (4 * k.shape[2])), dim=2):
        scores = rows @ k.mT * scale
        own = (
            bias
            if bias is None or bias.shape[2] == 1
            else bias[:, :, start : start + rows.shape[2]]
        )
        start += rows.shape[2]
        yield scores if own is None else scores + own
