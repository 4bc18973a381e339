"""Turn a training run into a bundled model: bfloat16 weights, samples to look at, and a card with measured numbers.

`python -m recipes.bundle_model --run runs/rte-micro --name rte-micro --history "…" "…"`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro
from rich.console import Console
from safetensors import safe_open

from dit_lens import scenes
from dit_lens.scenes import Scene, Split
from dit_lens.training import load_pipeline, score, summarise
from dit_lens.viz import bare
from hooked_models import HookedTextToImage
from hooked_models.hub import ZOO

MAX_SHARD = "15MB"
METRICS = ("color", "shape", "unique_binding", "relation_strict", "relation_loose", "relation_given_both")


@dataclass(frozen=True)
class Config:
    """What to bundle."""

    run: Path
    """Folder of a finished training run."""
    name: str
    """The model's name in the zoo."""
    history: tuple[str, ...]
    """How it was trained, phase by phase, one sentence each; goes into the card."""
    targets: tuple[str, ...] = ("unique_binding .90", "relation_loose .85")
    """Metric and aimed value on held-out scenes, for the card to compare with."""
    scenes: int = 64
    seeds: int = 8
    scene_seed: int = 100


@torch.no_grad()
def main(config: Config) -> None:
    console = Console()
    folder = ZOO / config.name
    with safe_open(config.run / "checkpoint.safetensors", "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["facts"])
    samples = int(metadata["step"]) * facts["batch_size"] * facts["processes"]

    pipe = load_pipeline(str(config.run / "pipeline"))
    pipe.transformer.to(torch.bfloat16)  # the codec and the word table are a few kB, and stay exact
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder, max_shard_size=MAX_SHARD)

    pipe = load_pipeline(config.name)
    pipe.set_progress_bar_config(disable=True)
    tables = {}
    for split in ("held_out", "train"):
        console.print(f"scoring {config.scenes} scenes ({split}) × {config.seeds} seeds")
        tables[split] = measure(pipe, config, split)
        console.print(tables[split].round(3).to_string())
    draw_samples(
        HookedTextToImage.from_pipeline(pipe),
        folder / "samples.png",
        scenes.sample(16, seed=7, split="held_out", color_words="both"),
    )
    (folder / "README.md").write_text(card(config, facts, samples, tables))
    console.print(f"bundled: {folder}")


def measure(pipe: object, config: Config, split: Split) -> pd.DataFrame:
    """Mean, 95 % interval and ceiling of every metric."""
    wanted = scenes.sample(config.scenes, seed=config.scene_seed, split=split, color_words="both")
    table = summarise(score(pipe, wanted, range(config.seeds)))
    truth = scenes.evaluate(scenes.render(wanted), wanted)
    return table.assign(ceiling=[float(truth[metric].mean()) for metric in table.index])


def draw_samples(model: HookedTextToImage, path: Path, wanted: Sequence[Scene]) -> None:
    """Images of captions, one seed each, in a grid."""
    captions = [scenes.caption(scene) for scene in wanted]
    images = model(captions, seed=list(range(len(captions))))
    figure, axes = plt.subplots(2, len(captions) // 2, figsize=(len(captions), 4.4), layout="constrained")
    for ax, caption, image in zip(axes.ravel(), captions, images, strict=True):
        bare(ax).imshow(image.permute(1, 2, 0).cpu().numpy())
        first, second = caption.split(" is ")
        ax.set_title(f"{first} is\n{second}", fontsize=6.5)
    figure.savefig(path, dpi=80)


def card(config: Config, facts: dict[str, object], samples: int, tables: dict[str, pd.DataFrame]) -> str:
    """The model card, in markdown."""
    held_out = tables["held_out"]
    shortfalls = []
    for target in config.targets:
        metric, value = target.split()
        row = held_out.loc[metric]
        verdict = "reached" if row["mean"] >= float(value) else "**not reached**"
        shortfalls.append(f"- {metric} ≥ {value}: {verdict}, {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    history = "\n".join(f"{i}. {phase}" for i, phase in enumerate(config.history, start=1))
    aims = "\n".join(shortfalls)
    steps = samples // (int(str(facts["batch_size"])) * int(str(facts["processes"])))
    return f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
tags: [dit_lens, interpretability, PixArt]
---
# {config.name}

A small PixArt diffusion transformer that draws two coloured shapes in a named relation, trained by `dit-lens train` for
interpretability research. It opens with `HookedTextToImage.from_pretrained("{config.name}")`, or, after `import hooked_models`,
with plain `PixArtSigmaPipeline.from_pretrained`.

![16 held-out captions, one seed each, not selected](samples.png)

## Measured

{config.scenes} scenes × {config.seeds} seeds a split, EMA weights in bfloat16 loaded as float32, DPM-Solver++ 14 steps,
guidance 4.5; mean [95 % interval, whole scenes resampled]. *Ceiling*: what the evaluator gives the scenes' own images.

Held-out combinations (`scenes.HELD_OUT`: never trained):

{markdown(held_out)}

Trained combinations:

{markdown(tables["train"])}

Aims, on held-out combinations:
{aims}

## Training

- Architecture: size `{facts["size"]}`, text encoder `{facts["encoder"]}` (frozen), objective `{facts["objective"]}`.
- {samples:,} samples in {steps:,} steps; Muon {facts["muon_lr"]} on the blocks' matrices, AdamW {facts["adam_lr"]} on the rest,
  caption dropout {facts["caption_dropout"]}, EMA, precision {facts["precision"]}, seed {facts["seed"]}.
- Data: `dit_lens.scenes` (procedural, balanced relations, no overlap, 10 of 96 combinations held out); no image is seen twice.

{history}

## Limits

It knows {len(scenes.WORDS)} words and one kind of sentence, and nothing else. One training run, one seed: a circuit found here is
a fact about this model. The curriculum is not the original's recipe, so how fast it learnt cannot be compared with the paper.
"""


def markdown(table: pd.DataFrame) -> str:
    """The metrics table."""
    lines = ["| metric | mean | 95 % interval | ceiling |", "|---|---|---|---|"]
    for metric in METRICS:
        row = table.loc[metric]
        lines.append(f"| {metric} | {row['mean']:.3f} | {row['low']:.3f} – {row['high']:.3f} | {row['ceiling']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
