"""Turn a training run into a bundled model: bfloat16 weights, samples to look at, and files of what
was measured.

`python -m recipes.bundle_model --run runs/t5-micro --name t5-micro --targets "unique_binding .92"
"relation_loose .90"`

Cards and README are then made from those files by `python -m recipes.zoo_cards`. A run that was
stopped goes on. A run started from the bundled model of the same name (`dit-lens train --init-from
t5-micro --encoder t5-scenes …`) replaces it: the card then tells of both runs, and keeps the first
one's course.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import Tensor
from transformers import T5EncoderModel

from dit_lens import evaluation, scenes
from dit_lens.store import write_json
from dit_lens.task import Scene, Trio
from dit_lens.training import dynamics, load_pipeline
from dit_lens.training.history import COURSE, History, checkpoint_of
from dit_lens.viz import bare, learning_curves, style
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import ZOO

from .run_all import shrink

MAX_SHARD = "15MB"
TRIO_METRICS = (
    "color",
    "shape",
    "unique_binding",
    "relation1_loose",
    "relation2_loose",
    "relation_loose",
    "relation_strict",
)


@dataclass(frozen=True)
class Config:
    """Settings of a bundle."""

    run: Path
    """Folder of a finished training run."""
    name: str
    """The model's name in the zoo; "rte-micro/seed-1" for another seed of a bundled model, whose
    weights stay out.
    """
    history: tuple[str, ...] = ()
    """Facts of the training beyond the run's settings, one sentence each; goes into the
    card.
    """
    targets: tuple[str, ...] = ()
    """Metric and aimed value on held-out scenes, such as "relation_loose .90", for the card to
    compare with.
    """
    scenes: int = 512
    """A split; see `dit_lens.evaluation.evaluate_model`."""


@torch.no_grad()
def main(config: Config) -> None:
    console = Console()
    folder = ZOO / config.name
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(str(config.run / "pipeline"))
    pipe.transformer.to(torch.bfloat16)  # the codec and the word table are a few kB, and stay exact
    if isinstance(pipe.text_encoder, T5EncoderModel):
        pipe.text_encoder.to(torch.bfloat16)
    if "/" not in config.name:
        pipe.save_pretrained(folder, max_shard_size=MAX_SHARD)
    model = HookedTextToImage.from_pipeline(pipe.to(dtype=torch.float32))  # as it will be loaded

    facts = training_facts(config)
    replaced = ["trios.parquet"]
    if facts["init_from"] == config.name:
        facts["earlier"] = earlier_runs(config)
    else:
        replaced += ["dynamics.parquet", "learning.png"]
    for name in replaced:  # of the model that was there before, which the card would tell of
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "training.json", facts)
    rows = evaluation.evaluate_model(model, config.scenes, out=config.run / "evaluation")
    compact(rows).to_parquet(folder / "evaluation.parquet", index=False, compression="zstd")
    console.print(evaluation.to_markdown(rows))
    if facts.get("trios"):
        trio_verdicts(model, config.scenes).to_parquet(
            folder / "trios.parquet", index=False, compression="zstd"
        )
    table = History.read(config.run).course
    if table is not None and "earlier" not in facts:
        table.to_parquet(folder / COURSE, index=False)
        heads = {source: dynamics.strongest_heads(table, source) for source in dynamics.SOURCES}
        figure = learning_curves(table, {what: found for what, found in heads.items() if found})
        at_page_width(figure, folder / "learning.png")
    shown: list[Scene | Trio] = [*scenes.sample(16, seed=7, split="held_out", color_words="both")]
    if facts.get("trios"):
        shown = [*shown[:8], *scenes.sample_trios(8, seed=7, split="held_out")]
    draw_samples(model, folder / "samples.webp", shown)
    console.print(f"bundled: {folder}; now python -m recipes.zoo_cards")


def training_facts(config: Config) -> dict[str, object]:
    """The run's settings, how far it got and how fast, and the card's facts of it."""
    with safe_open(checkpoint_of(config.run), "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["facts"])
    if int(metadata["step"]) < facts["steps"]:
        sys.exit(
            f"{config.run} has come to step {metadata['step']} of {facts['steps']}: its pipeline/ "
            "is from before. Let it end."
        )
    del facts["out"]
    log = History.read(config.run).rows
    speeds = pd.Series(
        [entry["samples_per_second"] for entry in log if "samples_per_second" in entry]
    )
    samples = int(metadata["step"]) * facts["batch_size"] * facts["processes"]
    told = {"history": list(config.history), "targets": list(config.targets)}
    return (
        facts
        | {
            "steps": int(metadata["step"]),
            "samples": samples,
            "samples_per_second": speeds.median(),
        }
        | told
    )


def earlier_runs(config: Config) -> list[dict[str, object]]:
    """Training facts of the runs before one that went on from the bundled model it replaces, the
    first run first.
    """
    kept = config.run / "before.json"
    if not kept.exists():  # a second call must not find the facts that the first has written
        shutil.copy(ZOO / config.name / "training.json", kept)
    before = json.loads(kept.read_text())
    return [*before.pop("earlier", []), before]


def trio_verdicts(model: HookedTextToImage, n: int) -> pd.DataFrame:
    """Verdicts on `n` held-out and `n` trained scenes of three objects: a row an image, scene i
    from noise i.
    """
    tables = []
    for split in evaluation.SPLITS:
        wanted = scenes.sample_trios(n, seed=100, split=split)
        for start in track(
            range(0, n, evaluation.BATCH), f"three objects, {split}", transient=True
        ):
            batch = wanted[start : start + evaluation.BATCH]
            images = model(
                [scenes.caption(trio) for trio in batch],
                seed=list(range(start, start + len(batch))),
            )
            verdict = scenes.evaluate(images, batch)
            found = {name: verdict[name].values.astype("float32") for name in TRIO_METRICS}
            tables.append(
                pd.DataFrame(
                    {"split": split, "scene": np.arange(start, start + len(batch)), **found}
                )
            )
    return pd.concat(tables, ignore_index=True)


def compact(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows in fewer bytes: text as categories, numbers in single precision (0, 1, pixels:
    exact).
    """
    kinds = {name: "category" if rows[name].dtype == "str" else "float32" for name in rows.columns}
    return rows.astype(kinds | {"scene": "int16", "seed": "int16"})


def draw_samples(model: HookedTextToImage, path: Path, wanted: Sequence[Scene | Trio]) -> None:
    """Images of captions, one seed each, in a grid."""
    captions = [scenes.caption(scene) for scene in wanted]
    images = model(captions, seed=list(range(len(captions))))
    at_page_width(sample_grid(captions, images), path)


def at_page_width(figure: Figure, path: Path) -> None:
    """Write a figure as large as a card shows it."""
    shrink(style.save(figure, path), path)


@style.styled
def sample_grid(captions: Sequence[str], images: Float[Tensor, "image 3 height width"]) -> Figure:
    """Images below their captions, eight a row."""
    titles = [textwrap.fill(caption, 16) for caption in captions]
    rows, lines = -(-len(titles) // 8), 1 + max(title.count("\n") for title in titles)
    size = (10, rows * (1.4 + 0.17 * lines))
    figure, axes = plt.subplots(rows, 8, figsize=size, layout="constrained", squeeze=False)
    for ax, title, image in zip(axes.ravel(), titles, images, strict=False):
        bare(ax).imshow(image.permute(1, 2, 0).cpu().numpy())
        ax.set_title(title, fontsize=9)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Config))
