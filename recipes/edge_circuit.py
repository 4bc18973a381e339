"""The smallest circuit of edges that still draws the relation. `python -m recipes.edge_circuit`

Beyond the paper, which names a relation head and an object head and knocks them out: here a circuit
is a set of edges (sender, receiver, denoising step) over the whole generation, found by EAP-IG and
then run exactly, everything else being as for another prompt (resample ablation). A small circuit is
falsified by this: the edges that EAP-IG ranks first keep no more of the relation than random
ones, or the model without them still has it (another route).

Two graphs: all edges; and, added once the first had shown that no small set of all edges suffices,
those alone that lead from words to heads' keys and values, the rest of the model being free: by
which doors does the relation come in?

Faithfulness is the share kept of the difference between a prompt and another, drawn at random among
those with as many words, the relation words in the same places, on the same noise; read from the
final image: how far red stands from blue in the caption's direction (`layout_readout`). CPR and CMD
are MIB's (arXiv 2504.13151), over the share of edges kept, edges ranked by |score|. Sizes are
chosen on one set of prompts, one a relation, and reported on another. Controls: random circuits of
equal size; of words, also with as many edges at every step. An earlier form took the opposite
relation's prompt for the other one: .841 of all edges and .026 of those from words were needed.
Predictions: `recipes/PREDICTIONS.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Bool, Float
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from torch import Tensor

from dit_lens import attribution, scenes
from dit_lens.graph.faithfulness import (
    areas,
    candidate_edges,
    faithfulness,
    random_circuits,
    resampled,
    run_circuits,
)
from dit_lens.graph.nodes import Node
from dit_lens.task import DIRECTIONS, RELATIONS, Scene
from dit_lens.task.scene import RADIUS
from dit_lens.text.prompts import RELATION_WORDS
from dit_lens.training import dynamics
from dit_lens.viz import name_rows, style
from hooked_models import HookedT5Encoder, HookedTextToImage

from .claims import Claim, report, stage
from .knockouts import found_heads

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of edges kept; MIB's, from .5 % on."""
KEEPS = 0.9
HALVINGS = 2
"""Allowed gap, in the logarithm, between the largest share that keeps less and the smallest that
keeps enough.
"""
EARLY = 4
"""Denoising steps in which the paper's relation head works."""
KINDS = {
    "circuit": "EAP-IG circuit",
    "without": "the model without it",
    "random": "random edges",
    "random, same steps": "random, as many at every step",
    "without random": "the model without random edges",
}
GRAPHS = {"all": "edges", "words": "edges from words"}
SPARSE = {"edges": (0.1, 1.0), "edges from words": (0.0, 0.1)}
"""Predicted share of the edges in the smallest circuit."""


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-micro"
    repeats: int = 1
    """Prompts a relation, in each of the two sets."""
    ig_steps: int = 3
    """Points of integrated gradients between the two prompts."""
    full: bool = False
    """Four prompts a relation, five points and three draws of random circuits."""
    seed: int = 0
    out: Path = Path("results/edge_circuit")


def main(config: Config) -> None:
    repeats, ig_steps, draws = (4, 5, 3) if config.full else (config.repeats, config.ig_steps, 1)
    settings = (repeats, ig_steps, config.seed)
    model, out = HookedTextToImage.from_pretrained(config.model), config.out
    found, chosen = (pairs(repeats, config.seed + part) for part in (1, 2))
    edges = stage(out, "edges", model, lambda m, *_: scored(m, found, ig_steps), *settings)
    ends = stage(out, "ends", model, lambda m, *_: clean_and_corrupt(m, chosen), *settings)
    claims, results = [], {}
    for graph in GRAPHS:
        one = Graph(graph, of_graph(edges, graph))
        search = stage(
            out,
            f"search-{graph}",
            model,
            lambda m, *_, one=one: searched(m, found, one.edges),
            *settings,
        )
        smallest = smallest_size(search)
        sizes = sorted({*(round(share * len(one.edges)) for share in SHARES), smallest})
        parts = []
        for kind, kept in circuits(one, sizes, smallest, draws, config.seed).items():

            def run(
                model: HookedTextToImage, *_: object, one: Graph = one, kept: np.ndarray = kept
            ) -> pd.DataFrame:
                return exact(model, chosen, one.edges, kept, ends)

            parts.append(
                stage(out, f"{graph}-{kind}", model, run, *settings, draws, smallest).assign(
                    kind=kind
                )
            )
        results[graph] = (pd.concat(parts, ignore_index=True), len(one.edges), smallest)
        claims += curve_claims(*results[graph], search, GRAPHS[graph])
    circuit = of_graph(edges, "words")[: results["words"][2]]
    claims += content_claims(model, edges, circuit)
    claims = [
        replace(claim, basis=f"{len(chosen.clean)} prompts, a noise each, 1 run")
        for claim in claims
    ]
    pd.concat(
        {graph: values for graph, (values, *_) in results.items()}, names=["graph"]
    ).to_parquet(out / "values.parquet")
    edges.to_parquet(out / "edges.parquet", index=False)
    sizes_of = {
        graph: {"edges": total, "smallest": smallest}
        for graph, (_, total, smallest) in results.items()
    }
    report(
        f"The relation's circuit: {config.model}",
        claims,
        out,
        "",
        False,
        model=config.model,
        **sizes_of,
        full=config.full,
    )
    style.save(curves_figure(results), out / "faithfulness.png")
    style.save(content_figure(edges, circuit), out / "circuit.png")


@dataclass(frozen=True)
class Graph:
    """Edges that may be cut; all others stay as they are."""

    name: str
    edges: pd.DataFrame


def of_graph(edges: pd.DataFrame, graph: str) -> pd.DataFrame:
    """The edges of one of `GRAPHS`, the largest first."""
    return (
        edges
        if graph == "all"
        else edges[edges["sender"].str.startswith("text[")].reset_index(drop=True)
    )


# Prompts and readings of images


@dataclass(frozen=True)
class Pairs:
    """Scenes, and for each another whose caption has its relation words in the same places."""

    clean: Sequence[Scene]
    corrupt: Sequence[Scene]
    seeds: Sequence[int]

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        clean, corrupt = (
            [scenes.caption(scene) for scene in wanted] for wanted in (self.clean, self.corrupt)
        )
        return clean, corrupt

    @property
    def readout(self) -> Callable[[Tensor], Tensor]:
        return layout_readout(self.clean)


def pairs(repeats: int, seed: int) -> Pairs:
    """`repeats` scenes of every relation, each with its own noise and a random other scene."""
    pool = scenes.sample(128 * repeats, seed=seed, split="all", color_words="both")
    wanted = [
        scene
        for relation in RELATIONS
        for scene in [s for s in pool if s.relation == relation][:repeats]
    ]
    rng = np.random.default_rng(seed)
    others = []
    for scene in wanted:
        alike = [
            o
            for o in pool
            if pattern(o) == pattern(scene) and scenes.caption(o) != scenes.caption(scene)
        ]
        others.append(alike[int(rng.integers(len(alike)))])
    return Pairs(wanted, others, [1000 * seed + i for i in range(len(wanted))])


def pattern(scene: Scene) -> tuple[bool, ...]:
    """Places of the relation words in a scene's phrase."""
    return tuple(word in RELATION_WORDS for word in scene.phrase.split())


def layout_readout(
    wanted: Sequence[Scene],
) -> Callable[[Float[Tensor, "scene 3 height width"]], Float[Tensor, " scene"]]:
    """How far object 1 stands from object 2 in its caption's direction, in px: red minus blue's
    moment over a square's area.

    Differentiable; the projection of `dynamics.color_moment`, whose sign is object 1's colour.
    """
    direction = torch.tensor([DIRECTIONS[scene.relation] for scene in wanted], dtype=torch.float32)
    direction = direction / direction.norm(dim=1, keepdim=True)
    direction = (
        direction
        * torch.tensor([1.0 if scene.color1 == "red" else -1.0 for scene in wanted])[:, None]
    )

    def readout(images: Tensor) -> Tensor:
        redness = images[:, 0] - images[:, 2]
        x, y = (
            torch.arange(size, dtype=images.dtype) - (size - 1) / 2
            for size in (redness.shape[2], redness.shape[1])
        )
        moment = torch.stack(
            [(redness * x).sum(dim=(1, 2)), (redness * y[:, None]).sum(dim=(1, 2))], dim=1
        )
        return (moment * direction.to(moment)).sum(dim=1) / (2 * RADIUS) ** 2

    return readout


# Finding and running circuits


def scored(model: HookedTextToImage, of: Pairs, ig_steps: int) -> pd.DataFrame:
    """Every edge with its EAP-IG score, the largest first."""
    with torch.no_grad():
        clean, corrupt = (model.trajectory(texts, of.seeds) for texts in of.texts)
    scores = attribution.edges(
        attribution.pair(clean, corrupt), of.readout, ig_steps=ig_steps
    ).scores
    return candidate_edges(model, of.texts[0], scores)


@torch.no_grad()
def clean_and_corrupt(model: HookedTextToImage, of: Pairs) -> pd.DataFrame:
    """Read-outs of the two runs that circuits lie between: columns prompt, clean, corrupt."""
    clean, corrupt = (
        of.readout(model(texts, list(of.seeds))).double().numpy() for texts in of.texts
    )
    return pd.DataFrame({"prompt": np.arange(len(clean)), "clean": clean, "corrupt": corrupt})


def exact(
    model: HookedTextToImage,
    of: Pairs,
    edges: pd.DataFrame,
    kept: Bool[np.ndarray, "circuit edge"],
    ends: pd.DataFrame,
) -> pd.DataFrame:
    """Images of circuits: columns circuit, edges, prompt, value, clean, corrupt (read-outs),
    relation_loose (as prompted).
    """
    rows = []
    for circuit, images in enumerate(run_circuits(model, *of.texts, of.seeds, edges, kept)):
        verdict = scenes.evaluate(images, of.clean)["relation_loose"].values.astype(float)
        value = of.readout(images).double().numpy()
        rows.append(
            ends.assign(
                circuit=circuit, edges=int(kept[circuit].sum()), value=value, relation_loose=verdict
            )
        )
    return pd.concat(rows, ignore_index=True)


def searched(model: HookedTextToImage, of: Pairs, edges: pd.DataFrame) -> pd.DataFrame:
    """`exact` of growing circuits on the prompts that scored the edges, finer where `KEEPS` is
    first reached.
    """
    ends = clean_and_corrupt(model, of)

    def run(sizes: Sequence[int]) -> pd.DataFrame:
        return exact(
            model, of, edges, np.stack([np.arange(len(edges)) < size for size in sizes]), ends
        )

    table = run([round(share * len(edges)) for share in SHARES])
    for _ in range(HALVINGS):
        high = smallest_size(table, otherwise=len(edges))
        low = max((size for size in table["edges"] if size < high), default=1)
        if high - low > 1:
            table = pd.concat([table, run([round(np.sqrt(low * high))])], ignore_index=True)
    return table


def smallest_size(table: pd.DataFrame, otherwise: int | None = None) -> int:
    """The fewest edges that keep `KEEPS`, as all larger circuits do; `otherwise`, or the largest,
    if none does.
    """
    sizes, kept = by_size(table)
    return int(enough(sizes, kept(np.arange(table["prompt"].nunique())), otherwise))


def by_size(table: pd.DataFrame) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Numbers of edges of a table's circuits, and their faithfulness on some of its prompts: on one
    sample or on many, [size, *sample].
    """
    wide = table.pivot_table(index="edges", columns="prompt", values="value")
    values, (clean, corrupt) = (
        wide.to_numpy(),
        table.groupby("prompt")[["clean", "corrupt"]].first().to_numpy().T,
    )
    return wide.index.to_numpy(), lambda rows: faithfulness(
        values[:, rows], clean[rows], corrupt[rows]
    )


def enough(sizes: np.ndarray, kept: np.ndarray, otherwise: int | None = None) -> Any:
    """The smallest of ascending sizes that keeps `KEEPS`, as all larger ones do; of curves [size,
    *sample], one each.
    """
    holds = np.logical_and.accumulate(kept[::-1] >= KEEPS)[::-1]
    none = sizes[-1] if otherwise is None else otherwise
    return np.where(holds.any(axis=0), sizes[holds.argmax(axis=0)], none)[()]


def circuits(
    graph: Graph, sizes: Sequence[int], smallest: int, draws: int, seed: int
) -> dict[str, Bool[np.ndarray, "circuit edge"]]:
    """By kind; draws of random circuits one after the other."""
    edges, rng = graph.edges, np.random.default_rng(seed)
    first = np.stack([np.arange(len(edges)) < size for size in sizes])
    random = np.concatenate([random_circuits(edges, sizes, rng) for _ in range(draws)])
    found = {
        "circuit": first,
        "without": ~(np.arange(len(edges)) < smallest)[None],
        "random": random,
    }
    if graph.name == "words":
        found["random, same steps"] = np.concatenate(
            [random_circuits(edges, sizes, rng, like=first) for _ in range(draws)]
        )
    found["without random"] = ~np.concatenate(
        [random_circuits(edges, [smallest], rng) for _ in range(draws)]
    )
    return found


# Claims


@dataclass(frozen=True)
class Curve:
    """Faithfulness of one kind of circuits over their sizes, draws averaged."""

    sizes: np.ndarray
    """Edges of the circuit, or those left out."""
    kept: Callable[[np.ndarray], np.ndarray]
    """Pairs of some prompts, by their numbers."""

    @classmethod
    def of(cls, values: pd.DataFrame, kind: str, total: int) -> Curve:
        rows = values[values["kind"] == kind]
        return cls(
            *by_size(
                rows.assign(edges=total - rows["edges"]) if kind.startswith("without") else rows
            )
        )

    def at(self, size: int) -> Callable[[np.ndarray], np.ndarray]:
        place = int(np.flatnonzero(self.sizes == size)[0])
        return lambda rows: self.kept(rows)[place]


def curve_claims(
    values: pd.DataFrame, total: int, smallest: int, search: pd.DataFrame, what: str
) -> list[Claim]:
    """Size, faithfulness on new prompts, completeness, and distance from random circuits."""
    curves = {kind: Curve.of(values, kind, total) for kind in values["kind"].unique()}
    prompts, randoms = (
        values["prompt"].nunique(),
        [kind for kind in curves if kind.startswith("random")],
    )
    tried, kept_of = by_size(search)

    def area(kind: str, which: int) -> Callable[[np.ndarray], Any]:
        return lambda rows: areas(curves[kind].sizes / total, curves[kind].kept(rows))[which]

    def gained(which: int, control: str) -> Callable[[np.ndarray], Any]:
        sign = 1 if which == 0 else -1
        return lambda rows: sign * (area("circuit", which)(rows) - area(control, which)(rows))

    at_size = {kind: resampled(curve.at(smallest), prompts) for kind, curve in curves.items()}
    accuracy = values[values["edges"] == smallest].groupby("kind")["relation_loose"].mean()
    claims = [
        Claim(
            f"Share of {total} {what} in the smallest circuit that keeps {KEEPS:.0%} of the "
            "relation",
            "–",
            resampled(
                lambda rows: enough(tried, kept_of(rows), total) / total, search["prompt"].nunique()
            ),
            SPARSE[what],
            f"{smallest} edges; chosen, and its interval, on the prompts that ranked them",
        ),
        Claim(
            f"Faithfulness of the smallest circuit of {what} on new prompts",
            "–",
            at_size["circuit"],
            (0.75, 1.25),
            "; ".join([f"{kind} {at_size[kind]}" for kind in randoms])
            + f"; relation accuracy {accuracy['circuit']:.2f}, random {accuracy['random']:.2f}",
        ),
        Claim(
            f"Completeness: faithfulness of the model without that circuit of {what}",
            "–",
            at_size["without"],
            (-0.25, 0.25),
            f"without as many random ones {at_size['without random']}",
        ),
    ]
    for which, name in enumerate(("CPR, circuit minus random", "CMD, random minus circuit")):
        for control in randoms:
            own, others = (resampled(area(kind, which), prompts) for kind in ("circuit", control))
            claims.append(
                Claim(
                    f"{name} {what}{control.removeprefix('random')}",
                    "–",
                    resampled(gained(which, control), prompts),
                    (0.05, 2.0),
                    f"circuit {own}; random {others}",
                )
            )
    return claims


def content_claims(
    model: HookedTextToImage, edges: pd.DataFrame, circuit: pd.DataFrame
) -> list[Claim]:
    """Words are read early, and by the heads whose weights are ramps (intervals over edges, and
    over heads).
    """
    words = of_graph(edges, "words")
    early, before = ((table["step"] < EARLY).to_numpy(float) for table in (circuit, words))
    by_head = (
        words.assign(head=words["receiver"].str[:-2], score=words["score"].abs())
        .groupby("head")["score"]
        .sum()
    )
    screened = dynamics.screen(model)[
        "shape2" if isinstance(model.text_encoder, HookedT5Encoder) else "words"
    ]
    ramps = [f"cross_attn.{head}" for head in found_heads(screened)]
    strength, is_ramp = by_head.to_numpy(), by_head.index.isin(ramps)
    mass = words.loc[words["step"] < EARLY, "score"].abs().sum() / words["score"].abs().sum()
    return [
        Claim(
            f"Share of the words' circuit at steps 0 to {EARLY - 1}",
            "–",
            resampled(lambda rows: early[rows].mean(axis=-1), len(early)),
            (0.5, 1.0),
            f"of all edges from words {before.mean():.3f}; of their |score| {mass:.3f}",
        ),
        Claim(
            "Share of the words' |score| that goes to heads with ramps in their weights",
            "–",
            resampled(
                lambda rows: (strength * is_ramp)[rows].sum(axis=-1) / strength[rows].sum(axis=-1),
                len(strength),
            ),
            (0.5, 1.0),
            f"{int(is_ramp.sum())} of {len(is_ramp)} heads: "
            f"{', '.join(name.partition('.')[2] for name in ramps)}",
        ),
    ]


# Figures


@style.styled
def curves_figure(results: Mapping[str, tuple[pd.DataFrame, int, int]]) -> Figure:
    """Faithfulness over the share of edges, a panel a graph, by kind of circuit, with intervals
    over prompts.
    """
    figure, axes = plt.subplots(
        1, len(results), figsize=(9.6, 4.4), sharey=True, layout="constrained", squeeze=False
    )
    looks = (("C0", "-"), ("C3", "-"), (style.INK, "-"), (style.INK, ":"))
    looks_of = dict(zip(KINDS, looks, strict=False))
    for ax, (graph, (values, total, smallest)) in zip(axes[0], results.items(), strict=True):
        everyone = np.arange(values["prompt"].nunique())
        for kind in values["kind"].unique():
            curve = Curve.of(values, kind, total)
            if len(curve.sizes) == 1:
                continue
            found = np.array([resampled(curve.at(size), len(everyone)) for size in curve.sizes])
            (mean, low, high), x = found.T, 100 * curve.sizes / total
            color, line = looks_of[kind]
            ax.plot(x, mean, line, marker="o", color=color, markersize=4, label=KINDS[kind])
            ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        kept = Curve.of(values, "circuit", total).at(smallest)(everyone)
        ax.axvline(100 * smallest / total, color="C0", linewidth=0.8, linestyle=":")
        for level in (0, KEEPS, 1):
            dashed = "--" if level == KEEPS else "-"
            ax.axhline(level, color=style.INK, linewidth=0.6, linestyle=dashed)
        ax.set(
            xscale="log",
            title=f"{smallest:,} of {total:,} {GRAPHS[graph]} keep {kept:.2f} of the relation",
            xlabel="edges kept, or left out, % (dotted: smallest circuit)",
        )
        ax.set_xticks([100 * share for share in SHARES], [f"{100 * share:g}" for share in SHARES])
        ax.minorticks_off()
    axes[0][0].set_ylabel("relation kept (faithfulness)")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@style.styled
def content_figure(edges: pd.DataFrame, circuit: pd.DataFrame) -> Figure:
    """By step: the share of |score| that each component sends, and the words' edges with the
    circuit's framed.
    """
    words = by_step(of_graph(edges, "words"), "receiver", "mean")
    sent = by_step(edges.assign(score=edges["score"].abs()), "sender", "sum")
    tall = 1.2 + 0.16 * max(len(sent), len(words))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, tall), layout="constrained")
    mesh = left.imshow(
        100 * sent / np.nansum(sent), aspect="auto", cmap=style.SEQUENTIAL, norm="log"
    )
    name_rows(left, list(sent.index))
    left.set(xlabel="denoising step", title="all edges, by sender")
    figure.colorbar(mesh, ax=left, label="% of |score|")
    reach = float(np.nanmax(np.abs(words)))
    norm = SymLogNorm(reach / 1000, vmin=-reach, vmax=reach)
    mesh = right.imshow(words, aspect="auto", cmap=style.DIVERGING, norm=norm)
    name_rows(right, list(words.index.str.removeprefix("cross_attn.")))
    right.set(
        xlabel="denoising step",
        title=f"edges from words, by reader;\ndots: the {len(circuit)} of the circuit",
    )
    row, column = (
        words.index.get_indexer(pd.Index(circuit["receiver"])),
        words.columns.get_indexer(pd.Index(circuit["step"])),
    )
    right.plot(column, row, "o", color="black", markeredgecolor="white", markersize=4)
    ticks = [0, *(sign * reach * part for sign in (1, -1) for part in (1, 0.1, 0.01))]
    label = "score: px gained with the opposite word"
    figure.colorbar(mesh, ax=right, label=label, ticks=ticks, format="{x:.1g}")
    return figure


def by_step(edges: pd.DataFrame, end: str, aggregate: Literal["mean", "sum"]) -> pd.DataFrame:
    """Scores by one end of the edges and step, in the model's order."""
    table = edges.pivot_table(index=end, columns="step", values="score", aggfunc=aggregate)
    return table.loc[sorted(table.index, key=_order)]


def _order(name: str) -> tuple[int, str]:
    """Words and the embedding first, then layer by layer."""
    node = Node.parse(name)
    return (-1 if node.layer is None else node.layer, name)


if __name__ == "__main__":
    main(tyro.cli(Config))
