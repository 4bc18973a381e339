"""How much of a behaviour a circuit keeps: exact runs of sets of edges, and curves over their size.

    found = attribution.edges(attribution.pair(clean_run, corrupt_run), metric, ig_steps=3)
    edges = candidate_edges(model, clean, found.scores)  # step, sender, receiver, score
    kept = np.arange(len(edges)) < 100  # the circuit: the 100 edges of largest score
    images = run_circuits(model, clean, corrupt, seeds, edges, kept[None])

A circuit is a set of edges of the conditional branch, an edge being a sender, a receiver and a
denoising step. Along edges out of it, the corrupt prompt's own activations are sent; all else
follows from the circuit itself, latents included. So the circuit of all edges is the clean run and
that of none the corrupt run, exactly. The unconditional branch has no edges that differ but by the
latents, which it is given as they become.

Source: Hanna et al. (arXiv 2403.17806) for circuits of edges; faithfulness, CPR and CMD as in MIB
(Mueller et al., arXiv 2504.13151), which has them for language models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.hooks.module import HookFunction

from ..stats import Interval
from ..text.prompts import Role, by_role, token_roles
from .edge_graph import all_receivers, all_senders, edge_flags, input_hook, output_hook

RESAMPLES = 2000


def candidate_edges(
    model: HookedTextToImage, prompts: Sequence[str], scores: xr.DataArray
) -> pd.DataFrame:
    """The edges along which anything differs, the largest first.

    Columns step, sender, receiver, score (mean over prompts). Edges of words are one edge a role
    ("text[relation]"): prompts differ in where it stands.

    Args:
        model: the model that was attributed; its tokenizer finds the roles.
        prompts: of the original run that `scores` belong to, in order.
        scores: of `attribution.edges` on trajectories, conditional branch.

    Example:
        >>> found = attribution.edges(attribution.pair(below, above), red)
        >>> listed = candidate_edges(model, [texts[0]], found.scores)
        >>> listed.columns.tolist()
        ['step', 'sender', 'receiver', 'score']
    """
    of_branch = scores.sel(branch="cond")
    words = of_branch.sel(
        sender=[name for name in of_branch["sender"].values if name.startswith("text[")]
    )
    others = of_branch.drop_sel(sender=words["sender"].values)
    length = words.sizes["sender"]
    roles = by_role([token_roles(model, prompt, length) for prompt in prompts])
    parts = {str(name): others.sel(sender=name, drop=True) for name in others["sender"].values}
    for role, mask in roles.items():
        chosen = xr.DataArray(mask.numpy(), dims=("prompt", "sender"))
        parts[f"text[{role}]"] = (
            words.drop_vars(("sender", "prompt")).where(chosen, 0.0).sum("sender", skipna=False)
        )
    whole = xr.concat(
        [part.drop_vars("prompt", errors="ignore") for part in parts.values()],
        pd.Index(parts, name="sender"),
    )
    differs = (whole != 0).any("prompt") & whole.notnull().all("prompt")
    table = (
        whole.mean("prompt")
        .where(differs)
        .rename("score")
        .to_dataframe()
        .reset_index()
        .dropna(subset="score")
    )
    table = table.sort_values(
        "score", key=np.abs, ascending=False, ignore_index=True, kind="stable"
    )
    return table[["step", "sender", "receiver", "score"]]


@torch.no_grad()
def run_circuits(
    model: HookedTextToImage,
    clean: Sequence[str],
    corrupt: Sequence[str],
    seeds: Sequence[int],
    edges: pd.DataFrame,
    kept: Bool[np.ndarray, "circuit edge"],
    num_steps: int = DEFAULT_STEPS,
    together: int = 4,
) -> Float[Tensor, "circuit prompt 3 height width"]:
    """Images in [0, 1] that circuits draw of the clean prompts.

    All outside of a circuit is as for the corrupt prompts.

    Args:
        model: a PixArt model, whose edges are cut.
        clean: prompts to draw, one row each.
        corrupt: for each clean prompt its counterpart, of as many tokens, with the same noise.
        seeds: seed of each clean prompt's noise.
        edges: columns step, sender and receiver, as `candidate_edges` gives them; edges not listed
            are never cut.
        kept: which edges each circuit has.
        num_steps: denoising steps of the generation.
        together: circuits that go through the model at once.

    Raises:
        ValueError: a prompt and its counterpart have different numbers of tokens.

    Example:
        >>> found = attribution.edges(attribution.pair(below, above), red)
        >>> listed = candidate_edges(model, [texts[0]], found.scores)
        >>> kept = np.stack([np.arange(len(listed)) < size for size in (0, 50)])  # two circuits
        >>> run_circuits(model, [texts[0]], [texts[1]], [0], listed, kept, num_steps=2).shape
        torch.Size([2, 1, 3, 128, 128])
    """
    masks = [(model.to_tokens(texts) != model.tokenizer.pad_token_id) for texts in (clean, corrupt)]
    if masks[0].shape != masks[1].shape or not bool((masks[0] == masks[1]).all()):
        raise ValueError(
            "Clean and corrupt prompts must have as many tokens, pair by pair: exchange words one "
            "for one."
        )
    outside = cut_edges(model, edges, kept, num_steps)
    roles = torch.stack(
        list(by_role([token_roles(model, text, masks[0].shape[1]) for text in clean]).values())
    )
    found = []
    starts = range(0, len(kept), together)
    for start in track(
        starts, "circuits", transient=True, disable=len(starts) < 4, console=Console(stderr=True)
    ):
        run = _Run(model, roles.to(model.device), outside[:, start : start + together])
        copies = outside[:, start : start + together].shape[1]
        with edge_flags(model.dit):
            images = model.run_with_hooks(
                [*corrupt, *list(clean) * copies],
                [*seeds] * (copies + 1),
                num_steps,
                fwd_hooks=run.hooks(),
            )
        found.append(images.unflatten(0, (copies + 1, len(clean)))[1:].cpu())
    return torch.cat(found)


def cut_edges(
    model: HookedTextToImage,
    edges: pd.DataFrame,
    kept: Bool[np.ndarray, "circuit edge"],
    num_steps: int,
) -> Float[Tensor, "step circuit sender receiver"]:
    """1 for every edge that a circuit lacks; senders are those to the residual stream, then roles.

    Example:
        >>> edges = pd.DataFrame(
        ...     {"step": [0, 0], "sender": ["embed"] * 2, "receiver": ["attn.L0H0.q", "mlp.L0"]}
        ... )
        >>> float(cut_edges(model, edges, np.array([[True, False]]), num_steps=1).sum())
        1.0
    """
    senders = {str(node): i for i, node in enumerate(all_senders(model.dit, 0))}
    senders |= {f"text[{role}]": len(senders) + i for i, role in enumerate(get_args(Role))}
    receivers = {str(node): i for i, node in enumerate(all_receivers(model.dit))}
    cut = np.zeros((num_steps, len(kept), len(senders), len(receivers)), dtype=np.float32)
    places = (
        edges["step"].to_numpy(),
        edges["sender"].map(senders).to_numpy(),
        edges["receiver"].map(receivers).to_numpy(),
    )
    for circuit, row in enumerate(kept):
        step, sender, receiver = (place[~row] for place in places)
        cut[step, circuit, sender, receiver] = 1
    return torch.from_numpy(cut).to(model.device)


@dataclass
class _Run:
    """Copies of a batch going through the model: corrupt prompts, then clean ones per circuit."""

    model: HookedTextToImage
    roles: Bool[Tensor, "role prompt text_pos"]
    outside: Float[Tensor, "step circuit sender receiver"]
    changes: Tensor | None = None
    """Corrupt minus current, of every sender: [circuit sender prompt pos d_model]; of the first
    `sent` in this call.
    """
    sent: int = 0
    words: Tensor | None = None
    """The same of the captions: [circuit prompt text_pos d]."""

    def hooks(self) -> list[tuple[str, HookFunction]]:
        dit = self.model.dit
        residual = all_senders(dit, 0)
        written = dict.fromkeys(output_hook(dit, node) for node in residual)
        depths, receivers = [node.depth(dit.cfg) for node in residual], all_receivers(dit)
        read: dict[str, list[int]] = {}
        for j, node in enumerate(receivers):
            read.setdefault(input_hook(dit, node), []).append(j)
        found: list[tuple[str, HookFunction]] = []
        for step, cut_here in enumerate(self.outside):
            prefix = f"steps.{step}.cond."
            if bool(cut_here[:, len(residual) :].any()):
                found.append((prefix + "hook_caption", self.note_words))
            if bool(cut_here[:, : len(residual)].any()):
                found += [(prefix + name, self.note) for name in written]
            for name, columns in read.items():
                cut = self.outside[step][:, :, columns]
                if name.endswith(("cross_attn.hook_k_input", "cross_attn.hook_v_input")):
                    part, change = cut[:, len(residual) :], self.replace_words
                else:
                    part, change = (
                        cut[:, : bisect_left(depths, receivers[columns[0]].depth(dit.cfg))],
                        self.replace,
                    )
                if bool(part.any()):
                    found.append((prefix + name, partial(change, cut=part)))
        return found

    def difference(self, tensor: Tensor) -> Tensor:
        copies = tensor.unflatten(0, (1 + self.outside.shape[1], -1))
        return copies[:1] - copies[1:]

    def note(self, tensor: Tensor, hook: HookPoint) -> None:
        change = self.difference(tensor)
        # [circuit head prompt pos d_model]
        change = change.movedim(-2, 1) if change.ndim == 5 else change[:, None]
        if str(hook.name).endswith("hook_embed"):
            self.sent = 0
        if self.changes is None:
            self.changes = change.new_empty(
                len(change), len(all_senders(self.model.dit, 0)), *change.shape[2:]
            )
        self.changes[:, self.sent : self.sent + change.shape[1]] = change
        self.sent += change.shape[1]

    def note_words(self, tensor: Tensor, hook: HookPoint) -> None:
        self.words = self.difference(tensor)

    def replace(
        self, tensor: Tensor, hook: HookPoint, cut: Float[Tensor, "circuit sender head"]
    ) -> Tensor:
        assert self.changes is not None  # something is written before anything is read
        copies = tensor.clone().unflatten(0, (1 + len(cut), -1))
        lost = cut.mT @ self.changes[:, : cut.shape[1]].flatten(2)
        lost = lost.unflatten(2, self.changes.shape[2:])  # [circuit head prompt pos d_model]
        copies[1:] += lost[:, 0] if copies.ndim == 4 else lost.movedim(1, -2)
        return copies.flatten(0, 1)

    def replace_words(
        self, tensor: Tensor, hook: HookPoint, cut: Float[Tensor, "circuit role head"]
    ) -> Tensor:
        assert self.words is not None  # captions come before keys and values
        copies = tensor.clone().unflatten(0, (1 + len(cut), -1))
        weights = torch.einsum("crh,rbt->cbth", cut, self.roles.to(cut))
        copies[1:] += weights[..., None] * self.words[:, :, :, None]
        return copies.flatten(0, 1)


# Curves


class Areas(NamedTuple):
    """Areas of a curve of faithfulness over the share of edges kept, from 0 to 1.

    Example:
        >>> Areas(cpr=0.75, cmd=0.25).cpr
        0.75
    """

    cpr: float | Float[np.ndarray, " *sample"]
    """Area under the curve: the more the better a circuit performs."""
    cmd: float | Float[np.ndarray, " *sample"]
    """Area between the curve and 1: the less the more a circuit behaves like the model."""


def faithfulness(
    values: Float[np.ndarray, "*circuit prompt"],
    clean: Float[np.ndarray, "*sample prompt"],
    corrupt: Float[np.ndarray, "*sample prompt"],
) -> Float[np.ndarray, "*circuit"]:
    """(m(circuit) − m(corrupt)) / (m(clean) − m(corrupt)), every m being the mean over prompts.

    Samples of prompts are the last axes of circuits.

    Example:
        >>> faithfulness(
        ...     np.array([[3.0, 5.0]]), clean=np.array([5.0, 7.0]), corrupt=np.array([1.0, 3.0])
        ... ).tolist()
        [0.5]
    """
    return (values - corrupt).mean(axis=-1) / (clean - corrupt).mean(axis=-1)


def areas(shares: Float[np.ndarray, " size"], curve: Float[np.ndarray, " size *sample"]) -> Areas:
    """CPR and CMD by the trapezoid rule, with the exact ends.

    The circuit of no edges (0) and of all (1). Several curves have arrays of areas.

    Example:
        >>> areas(np.array([0.5]), np.array([1.0]))
        Areas(cpr=0.75, cmd=0.25)
    """
    x, ends = np.concatenate([[0.0], shares, [1.0]]), np.zeros_like(curve[:1])
    f = np.concatenate([ends, curve, ends + 1])
    found = (np.trapezoid(y, x, axis=0) for y in (f, np.abs(1 - f)))
    return Areas(*(area if np.ndim(area) else float(area) for area in found))


def resampled(
    statistic: Callable[[Int[np.ndarray, "*sample n"]], Any], n: int, rng: int = 0
) -> Interval:
    """A statistic of `n` things with its 95 % bootstrap interval over them.

    Things (prompts, say) are given by their numbers.

    Args:
        statistic: of one sample or of many; each has its numbers along the last axis.
        n: number of things.
        rng: seed of the resampling.

    Example:
        >>> heights = np.array([1.0, 2.0, 3.0, 4.0])
        >>> found = resampled(lambda rows: heights[rows].mean(axis=-1), 4)
        >>> found.low < found.mean == 2.5 < found.high
        True
    """
    drawn = statistic(np.random.default_rng(rng).integers(n, size=(RESAMPLES, n)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(np.arange(n))), float(low), float(high))


def random_circuits(
    edges: pd.DataFrame,
    sizes: Sequence[int],
    rng: np.random.Generator,
    like: Bool[np.ndarray, "size edge"] | None = None,
) -> Bool[np.ndarray, "size edge"]:
    """Nested random circuits of the given sizes.

    `like`: with as many edges at every step as these have.

    Example:
        >>> edges = pd.DataFrame({"step": [0, 0, 1]})
        >>> random_circuits(edges, [1, 2], np.random.default_rng(0)).sum(axis=1).tolist()
        [1, 2]
    """
    order = rng.permutation(len(edges))
    rank = np.empty(len(edges), dtype=int)
    rank[order] = np.arange(len(edges))
    if like is None:
        return np.stack([rank < size for size in sizes])
    step = edges["step"].to_numpy()
    found = np.zeros((len(sizes), len(edges)), dtype=bool)
    for number, example in enumerate(like):
        for here in np.unique(step):
            at = np.flatnonzero(step == here)
            found[number, at[np.argsort(rank[at])[: int(example[at].sum())]]] = True
    return found
