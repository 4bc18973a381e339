"""Write every bundled model's card, and docs/models.md, from the files beside the weights.

`python -m recipes.zoo_cards`.

Nothing in a card is typed: numbers come from evaluation.parquet, dynamics.parquet and training.json
(`recipes.bundle_model`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dit_lens import evaluation, scenes
from dit_lens.stats import Interval
from dit_lens.task.captions import TRAINED
from dit_lens.training import PRESETS, dynamics
from hooked_models import list_models
from hooked_models.pipelines.hub import ZOO

PAGE = Path(__file__).parents[1] / "docs/models.md"
BLOCK = re.compile(r"(<!-- models: recipes.zoo_cards -->\n).*?(<!-- end -->)", flags=re.S)
SHOWN = ("color", "shape", "unique_binding", "relation_loose", "relation_strict")
BAG_OF_WORDS = """
Without word order, a sentence that names both colours fits four equally frequent scenes, two ways to bind colours to shapes times
two to say which object is meant to be where, so no model can bind more than .50 or relate more than .25."""
ENCODERS = {
    "rte": "random token embeddings with positions",
    "rte-nopos": "random token embeddings without positions: a bag of words",
    "t5-scenes": "[`t5-scenes`](../t5-scenes/README.md), a small T5 pre-trained on captions",
}


def main() -> None:
    for name in list_models():
        (ZOO / name / "README.md").write_text(card(ZOO / name))
    PAGE.write_text(page(PAGE.read_text()))


def page(text: str) -> str:
    """The page of models with its table made anew."""
    lines = [
        "| model | size | text encoder | " + " | ".join(SHOWN) + " |",
        "|" + "---|" * (3 + len(SHOWN)),
    ]
    for name in list_models():
        facts, rows = training(ZOO / name), held_out(ZOO / name)
        size = PRESETS[facts["size"]]
        cells = [str(Interval(*row)) for row in rows.loc[list(SHOWN)].itertuples(index=False)]
        encoder = re.sub(
            r"\]\(\.\./(.*?)\)", r"](../hooked_models/zoo/\1)", ENCODERS[facts["encoder"]]
        )
        shape = f"{size.layers} layers × {size.width}, {size.heads} heads"
        lines.append(
            f"| [`{name}`](../hooked_models/zoo/{name}/README.md) | {shape} | {encoder} | "
            f"{' | '.join(cells)} |"
        )
    if not BLOCK.search(text):
        raise ValueError("docs/models.md has no block for the table of models.")
    return BLOCK.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)


def training(folder: Path) -> dict[str, Any]:
    """How a model was trained."""
    return json.loads((folder / "training.json").read_text())


def held_out(folder: Path) -> pd.DataFrame:
    """Index metric; mean, low, high on combinations that were never trained."""
    rows = pd.read_parquet(folder / "evaluation.parquet")
    rows = rows[(rows["split"] == "held_out") & (rows["template"] == TRAINED)]
    return evaluation.accuracies(rows, ["template"]).set_index("metric")[["mean", "low", "high"]]


def card(folder: Path) -> str:
    """The model card, in markdown."""
    facts, rows = training(folder), pd.read_parquet(folder / "evaluation.parquet")
    per_split = (rows["template"] == TRAINED).sum() // 2
    parts = [
        f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
tags: [dit_lens, interpretability, PixArt]
---
# {folder.name}

A small PixArt diffusion transformer that draws coloured shapes in a named relation, trained by `dit-lens train` for
interpretability research. It opens with `HookedTextToImage.from_pretrained("{folder.name}")`, or, after `import hooked_models`,
with plain `PixArtSigmaPipeline.from_pretrained`.

![16 held-out captions, one seed each, not selected](samples.webp)

## Measured

`dit-lens evaluate {folder.name} --n {per_split}`: one image a scene, EMA weights in bfloat16 loaded as float32, DPM-Solver++ 14
steps, guidance 4.5; mean [95 % Wilson interval]. Perfect images score 1 in every column (docs/scenes.md).

{evaluation.to_markdown(rows)}""",
        *three_objects(folder),
        *(
            [f"Aims, on held-out combinations:\n{aims(folder, facts['targets'])}"]
            if facts["targets"]
            else []
        ),
        *(
            [f"{about_the_course(facts)}\n\n{learning(folder, 'learning.png')}"]
            if (folder / "dynamics.parquet").exists()
            else []
        ),
        f"## Training\n\n{how_trained(facts)}",
        *other_seeds(folder),
        f"""## Limits

{limits(facts)}
""",
    ]
    return "\n\n".join(parts)


def three_objects(folder: Path) -> list[str]:
    """Accuracies on scenes of three objects, of a model that was trained on some."""
    if not (folder / "trios.parquet").exists():
        return []
    rows = pd.read_parquet(folder / "trios.parquet")
    table = evaluation.wide(evaluation.accuracies(rows, ["split"], list(rows.columns[2:])), "split")
    return [
        "Three objects and two relations (`scenes.sample_trios`, seed 100; a verdict holds if it "
        "does for both pairs of objects, "
        f"`relation1` and `relation2` are those of each pair):\n\n{table}"
    ]


def aims(folder: Path, targets: list[str]) -> str:
    """Which targets were reached."""
    lines, rows = [], held_out(folder)
    for target in targets:
        metric, value = target.split()
        found = Interval(*rows.loc[metric])
        verdict = "reached" if found.mean >= float(value) else "**not reached**"
        lines.append(f"- {metric} ≥ {value}: {verdict}, {found}")
    return "\n".join(lines)


def learning(folder: Path, figure: str) -> str:
    """When abilities and heads came, and the whole course."""
    table = pd.read_parquet(folder / "dynamics.parquet")
    heads = [
        (source, *head)
        for source in dynamics.SOURCES
        for head in dynamics.strongest_heads(table, source, 1)
    ]
    metrics = [*SHOWN[:-1], "dipole"]
    columns = [*metrics, *(f"L{layer}H{head} ({source})" for source, layer, head in heads)]
    lines = [f"| samples | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for samples, part in table.groupby("samples"):
        of_metric = part[part["layer"].isna()].set_index("quantity")["value"]
        values = [of_metric[metric] for metric in metrics]
        for source, layer, head in heads:
            of_head = (part["source"] == source) & (part["layer"] == layer) & (part["head"] == head)
            # NaN if not screened then
            values.append(part[of_head & (part["quantity"] == "cosine")]["value"].sum(min_count=1))
        lines.append(
            f"| {samples:,} | "
            f"{' | '.join('–' if np.isnan(value) else f'{value:.2f}' for value in values)} |"
        )
    came = [
        f"- {what}: "
        f"{'never' if pd.isna(samples) else f'between {before:,} and {samples:,} samples'}"
        + ("" if pd.isna(stays) or stays == samples else f", to stay by {stays:,}")
        for what, samples, before, stays in dynamics.emergence(table).itertuples(index=False)
    ]
    first = {
        source: table.loc[table["source"] == source, "samples"].min() for source in dynamics.SOURCES
    }
    late = [
        f"{source} "
        f"({'not in this run' if np.isnan(since) else f'in this run from {since:,.0f} samples on'})"
        for source, since in first.items()
        if since != table["samples"].min()
    ]
    return "\n".join(
        [
            *([f"Added to the screening later: {', '.join(late)}.", ""] if late else []),
            "![Accuracies, the layout dipole and screening of heads against samples "
            f"seen]({figure})",
            "",
            "First at least one half (heads: |cosine|, of each screening the four strongest at the "
            "end with p ≤ .05):",
            *came,
            "",
            *lines,
        ]
    )


def about_the_course(facts: dict[str, Any]) -> str:
    """Measurements during a model's training; of its first run, if there were several."""
    noises = "scene i from noise i"
    if not facts.get("earlier", [facts])[0].get("noises"):
        noises = """all from the same noise at every
point: the course is comparable, the level is that of one noise (*Measured* has many)"""
    first = " The course is that of run 1; see *Training*." if facts.get("earlier") else ""
    return f"""## Learning

EMA weights at log-spaced points of one run, on 96 held-out scenes, one image each, {noises}.
*Dipole*: cosine between where the caption
puts the first object and where one look at pure noise puts it (`dit_lens.training.dynamics`). Heads: mean cosine of their
position maps with the ramps, screened with the relation words ("words"), or with the relation's effect on a shape word
("shape1", "shape2"). `dynamics.parquet` has all heads and all intervals.{first}"""


def how_trained(facts: dict[str, Any]) -> str:
    """Architecture, data, and settings and history of every run."""
    runs = [*facts.get("earlier", []), facts]
    common = [
        f"- Architecture: size `{facts['size']}`, text encoder {ENCODERS[facts['encoder']]} "
        "(frozen),",
        f"  objective `{facts['objective']}`.",
    ]
    data = [
        "- Data: `dit_lens.scenes` (procedural, balanced relations, no overlap, 10 of 96 "
        "combinations held out); no image is",
        "  seen twice.",
    ]
    if len(runs) == 1:
        return "\n".join([*common, *one_run(facts, data)])
    total = (
        f"- {sum(run['samples'] for run in runs):,} samples in {len(runs)} runs, each from the "
        "weights of the one before."
    )
    parts = ["\n".join([*common, total, *data])]
    for number, run in enumerate(runs, start=1):
        parts.append(
            "\n".join(
                [
                    f"### Run {number}",
                    "",
                    *one_run(run if number == 1 else run | {"init_from": None}, []),
                ]
            )
        )
    return "\n\n".join(parts)


def one_run(facts: dict[str, Any], data: list[str]) -> list[str]:
    """Settings and history of a run, and `data`, the lines on its data."""
    curriculum = [
        facts.get(name, 0) for name in ("biased_steps", "anchored_steps", "spreading_steps")
    ]
    precision = {"no": "float32"}.get(facts["precision"], facts["precision"])
    lines = [
        f"- {facts['samples']:,} samples in {facts['steps']:,} steps; Muon {facts['muon_lr']} on "
        f"the blocks' matrices, AdamW {facts['adam_lr']} on the rest,",
        f"  caption dropout {facts['caption_dropout']}, EMA, precision {precision}, seed "
        f"{facts['seed']}.",
        *data,
    ]
    if facts.get("init_from"):
        lines.append(
            f"- From the weights of [`{facts['init_from']}`](../{facts['init_from']}/README.md), "
            "with a fresh optimiser."
        )
    if facts.get("trios"):
        lines.append(
            f"- {facts['trios']:.0%} of the scenes hold three objects and two relations "
            "(`scenes.Trio`)."
        )
    if any(curriculum) and not facts["history"]:
        biased, anchored, spreading = curriculum
        lines += [
            f"- Curriculum: eight fixed layouts and both colours named for {anchored:,} steps, "
            "then layouts spread to the whole",
            f"  distribution over {spreading:,}; red named first with probability .9, falling to "
            f"one half over {biased:,} steps;",
            f"  learning rate falling linearly from {facts['decay_from']:.0%} of the run on.",
        ]
    elif not facts["history"]:
        lines.append(
            f"- Learning rate falling linearly from {facts['decay_from']:.0%} of the run on."
        )
    history = [f"{i}. {phase}" for i, phase in enumerate(facts["history"], start=1)]
    return [*lines, *(["", *history] if history else [])]


def other_seeds(folder: Path) -> list[str]:
    """Runs whose weights are not bundled."""
    found = []
    for run in sorted(folder.glob("seed-*")):
        facts, rows = training(run), pd.read_parquet(run / "evaluation.parquet")
        by_split = evaluation.wide(
            evaluation.accuracies(rows[rows["template"] == TRAINED], ["split"]), "split"
        )
        found.append(
            f"## Seed {facts['seed']}\n\nAnother run, whose weights are not "
            f"bundled.\n\n{how_trained(facts)}\n\n{by_split}\n\n"
            + (
                f"#{about_the_course(facts)}\n\n"
                if not (folder / "dynamics.parquet").exists()
                else ""
            )
            + learning(run, f"{run.name}/learning.png")
        )
    return found


def limits(facts: dict[str, Any]) -> str:
    """Limits of the model."""
    words = f"It knows {len(scenes.WORDS)} words and one kind of sentence, and nothing else."
    if facts["encoder"] == "t5-scenes":
        words = (
            "Its text encoder was pre-trained on sentences about coloured shapes and knows nothing "
            "else; it is not T5-XXL."
        )
    if facts["encoder"] == "rte-nopos":
        words += BAG_OF_WORDS
    return (
        f"{words} One training run, one seed: a circuit found here is a fact about this model. The "
        "curriculum is not the "
        "original's recipe, so how fast it\nlearnt cannot be compared with the paper."
    )


if __name__ == "__main__":
    main()
