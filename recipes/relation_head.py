"""Find a model's relation head from its weights, watch it at work, and knock it out. `python -m recipes.relation_head`

Source: Wang, Fan, Pan, *Circuit Mechanisms for Spatial Relation Generation in Diffusion Transformers* (arXiv 2601.06338),
sections 4.1 and 4.2, figures 3B and 4. What differs: the screening has a null and takes heads of either sign (a head that looks
away from where the word points tells the other object's side); the knock-out masks every relation word (the original: the first
only), is compared with random heads and random words on the same noise, and has intervals; all heads found are also knocked out
together, because a model may have several.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
import xarray as xr
from rich.console import Console
from rich.table import Table

from dit_lens import ablation, circuits, prompts, scenes, screening, stats, viz
from dit_lens.store import write_json
from hooked_models import HookedTextToImage

PROMPTS = (
    "red circle is above blue square",
    "blue triangle is below red circle",
    "red square is to the left of blue triangle",
    "blue circle is to the lower right of red square",
)
WORDS = ("above", "below", "left", "right", "upper", "lower", "higher")
CHANGE = "change in relation"
METRICS = ("color", "shape", "unique_binding", "relation_loose", "relation_given_both")
DIRECTION_WORDS = ("above", "below", "left", "right")
FIGURE_STEPS = (0, 1, 2, 4, 8, 13)
FOUND_COSINE, FOUND_P = 0.5, 0.01  # a head is a relation head if its maps are ramps, and more so than random vectors'


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    model: str = "rte-micro"
    """Bundled model, pipeline folder or hub id."""
    pairs: int = 64
    """Images a condition; all conditions share prompts and noise."""
    controls: int = 1
    """Draws of random heads, and of random words, that are knocked out for comparison with every condition."""
    seed: int = 0
    out: Path = Path("results/relation_head")


@torch.no_grad()
def main(config: Config) -> None:
    console = Console()
    model = HookedTextToImage.from_pretrained(config.model)
    console.print(f"[bold]{config.model}[/bold]: {model.cfg.n_layers} layers × {model.cfg.n_heads} heads")

    with console.status("generating, caching cross-attention over all layers, heads and steps"):
        images, cache = model.run_with_cache(
            PROMPTS, seed=config.seed, names_filter=lambda name: name.endswith("cross_attn.hook_pattern")
        )
    console.print(cache)

    with console.status("screening heads in weight space"):
        ranking, found = screened(model)
    show(console, "Heads by alignment of position × word maps with the words' ramps", ranking.head(6).round(3))
    console.print(f"relation heads (|cosine| ≥ {FOUND_COSINE}, p ≤ {FOUND_P}): {', '.join(found) or 'none'}")
    if not found:
        return

    conditions = {head: ablation.knockout_role("relation", head) for head in found[:2]}
    conditions[f"all {len(found)}"] = ablation.knockout_role("relation", found)
    wanted = scenes.sample(config.pairs, seed=config.seed + 1, split="all", color_words="both")
    noise = config.seed + np.arange(config.pairs)[:, None]
    effects = ablation.ablation_effects(
        model, wanted, conditions, noise, controls=config.controls, exclude=found, rng=config.seed
    )
    table = compare(effects)
    title = f"Relation words masked in some heads ({config.pairs} images, same prompts and noise), mean [95 % interval]"
    show(console, title, as_text(table))

    config.out.mkdir(parents=True, exist_ok=True)
    ranking.to_csv(config.out / "screening.csv", index=False)
    table.to_csv(config.out / "knockout.csv", index=False)
    facts = {"model": config.model, "heads": found, "pairs": config.pairs, "controls": config.controls, "seed": config.seed}
    write_json(config.out / "result.json", {**facts, "results": table.to_dict("records")})
    for head in found[:2]:
        maps = {word: circuits.position_word_map(model.dit, head, screening.word_vector(model, word)) for word in DIRECTION_WORDS}
        figure = viz.relation_head_figure(head, PROMPTS, images, attention_to_relation(model, cache, head), maps)
        figure.savefig(config.out / f"{head}.png", dpi=150)
    viz.attention_page(cache, list(PROMPTS), images, config.out / "attention.html")
    console.print(f"figures, tables and a page to walk through: {config.out}/")


def relation_heads(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows of `screening.screen_heads` whose maps are ramps, and more so than random vectors'."""
    return ranking[(ranking["cosine"].abs() >= FOUND_COSINE) & (ranking["p"] <= FOUND_P)]


def found_heads(ranking: pd.DataFrame) -> list[str]:
    """Their names ("L2H2"), strongest first."""
    return [f"L{row.layer}H{row.head}" for row in relation_heads(ranking).itertuples()]


def screened(model: HookedTextToImage) -> tuple[pd.DataFrame, list[str]]:
    """`screening.screen_heads` with the relation words, and the heads that it names ("L2H2"), strongest first."""
    ranking = screening.screen_heads(model.dit, {word: screening.word_vector(model, word) for word in WORDS})
    return ranking, found_heads(ranking)


def attention_to_relation(model: HookedTextToImage, cache: object, head: str) -> xr.DataArray:
    """Attention mass of one head on the relation words: dims (prompt, step, y, x)."""
    layer, index = circuits.parse_head(head)
    side = model.cfg.sample_size // model.cfg.patch_size
    words = prompts.role_mask(model, PROMPTS, "relation")
    maps = []
    for step in FIGURE_STEPS:
        pattern = cache["pattern", layer, "cross_attn", step][:, index]  # type: ignore[index]  # [prompt query text_pos]
        maps.append(torch.einsum("pqt,pt->pq", pattern, words.to(pattern)).reshape(len(PROMPTS), side, side))
    stacked = torch.stack(maps, dim=1).cpu().numpy()
    return xr.DataArray(stacked, dims=("prompt", "step", "y", "x"), coords={"step": list(FIGURE_STEPS)})


def compare(effects: xr.Dataset) -> pd.DataFrame:
    """Mean and 95 % interval of every condition's accuracies, and of its paired change of the loose relation.

    Returns:
        Columns knocked_out, metric, mean, low, high; a row for each condition and metric.
    """
    rows = []
    for condition in effects["condition"].values:
        one = effects.sel(condition=condition)
        found = {metric: stats.clustered_mean(one[metric].values.astype(float)) for metric in METRICS}
        if condition != "none":
            found[CHANGE] = stats.Interval(*one["relation_loose_effect"].values)
        rows += [{"knocked_out": condition, "metric": metric, **value._asdict()} for metric, value in found.items()]
    return pd.DataFrame(rows)


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `compare` as one text for each condition and metric."""
    texts = [str(stats.Interval(*row)) for row in table[list(stats.Interval._fields)].itertuples(index=False)]
    wide = table.assign(text=texts).pivot(index="knocked_out", columns="metric", values="text").fillna("")
    return wide.loc[table["knocked_out"].unique(), table["metric"].unique()].rename_axis("knocked out").rename_axis(None, axis=1)


def show(console: Console, title: str, frame: pd.DataFrame) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    indexed = frame.reset_index() if frame.index.name else frame
    for column in indexed.columns:
        table.add_column(str(column), overflow="fold")
    for row in indexed.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
