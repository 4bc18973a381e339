"""Turn a pre-training run into a bundled text encoder: bfloat16 weights, tokenizer, and a card with
measured numbers.

`dit-lens pretrain-text-encoder --out runs/t5-scenes`, then `python -m recipes.bundle_text_encoder
--run runs/t5-scenes`
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pandas as pd
import torch
import tyro
import xarray as xr
from rich.console import Console
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from dit_lens.text.probes import (
    SPLITS,
    TARGETS,
    Word,
    cosines,
    place_score,
    probe_captions,
    probe_table,
    word_vectors,
)
from dit_lens.training.history import History, checkpoint_of
from dit_lens.training.pipelines import build_text_encoder
from dit_lens.training.t5 import pretrain as recipe
from hooked_models.pipelines.hub import ZOO

WORDS: tuple[Word, ...] = get_args(Word)


@dataclass(frozen=True)
class Config:
    """Settings of a bundle."""

    run: Path
    """Folder of a finished pre-training run."""
    name: str = "t5-scenes"
    """The encoder's name in the zoo."""


@torch.no_grad()
def main(config: Config) -> None:
    folder = ZOO / config.name
    shutil.rmtree(folder, ignore_errors=True)
    T5EncoderModel.from_pretrained(
        config.run / "text_encoder", dtype=torch.bfloat16
    ).save_pretrained(folder / "text_encoder")
    shutil.copytree(config.run / "tokenizer", folder / "tokenizer")

    encoder, tokenizer = build_text_encoder(config.name)
    by_layer = probe_table(encoder, tokenizer)
    by_split = read(encoder, tokenizer)
    baselines = {name: read(*build_text_encoder(name)) for name in ("rte", "rte-nopos")}
    with safe_open(checkpoint_of(config.run), "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    log = History.read(config.run).rows
    text = card(config.name, facts, log, encoder, tokenizer, by_layer, by_split, baselines)
    (folder / "README.md").write_text(text)
    Console(soft_wrap=True, markup=False).print(f"{text}\nbundled: {folder}")


def read(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> xr.DataArray:
    """Relation and direction at the second shape word of the output, by split."""
    return probe_table(
        encoder, tokenizer, "shape2", ("relation", "direction"), SPLITS, layers=False
    )[0]


def geometry(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Root mean square of a coordinate, and mean cosines, at each word of the output."""
    rows: dict[str, pd.Series] = {}
    for word in WORDS:
        vectors = next(
            iter(word_vectors(encoder, tokenizer, probe_captions(), word, layers=False).values())
        )
        rows[word] = pd.Series(
            {"RMS": (vectors**2).mean() ** 0.5, **cosines(encoder, tokenizer, word)}
        )
    return pd.DataFrame(rows).T.rename_axis("word")


def card(
    name: str,
    facts: dict[str, object],
    log: list[dict[str, float]],
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    by_layer: xr.DataArray,
    by_split: xr.DataArray,
    baselines: dict[str, xr.DataArray],
) -> str:
    """The card, in markdown."""
    size = encoder.config
    layers = (
        by_layer.sel(split="combinations").to_series().unstack("target")[list(TARGETS)].round(3)
    )
    encoders = {name: by_split, **baselines}
    splits = (
        xr.concat(list(encoders.values()), pd.Index(list(encoders), name="encoder"))
        .to_series()
        .unstack("split")
    )
    losses = [entry for entry in log if "loss" in entry]
    minutes = sum(entry["seconds_per_step"] for entry in losses) * recipe.LOG_EVERY / 60
    course = [entry for entry in log if "probe_relation" in entry]
    history = (
        pd.DataFrame(course)
        .set_index("step")[["loss", "probe_relation", "probe_direction", "probe_place"]]
        .round(3)
    )
    return f"""---
license: mit
library_name: transformers
tags: [dit_lens, interpretability, T5]
---
# {name}

A small T5 encoder, pre-trained here on a caption grammar and then frozen, for `dit-lens train --encoder {name}`. **It is not
T5-XXL, nor a distillation of it**: it has read sentences about coloured shapes and nothing else. It shares with T5 the
architecture (v1.1: gated GELU, relative positions), the objective (span corruption), and what matters for the question asked of
it: the vector of a word depends on its sentence. What a diffusion transformer does with such vectors can be studied with it;
what T5-XXL knows cannot.

{size.num_layers} layers × {size.d_model}, {size.num_heads} heads, MLP {size.d_ff}, {encoder.num_parameters():,} parameters,
bfloat16; {len(tokenizer)} tokens: whole words, punctuation and {recipe.SENTINELS} sentinels. Words outside the vocabulary become
`<unk>`.

## Measured

Linear probes on the 264 captions that name both colours (standardised, scikit-learn defaults otherwise). A number is the share of
right answers; for *direction* (the step from the second object to the first) it is R² by ridge regression.

At the second shape word, by layer (0: the word embedding, {size.num_layers}: the output), tested on whole combinations of
shapes, colours and relation that the probe was not fitted on:

{markdown(layers)}

Relation (8 classes) and direction from the second shape word of the output, by what the probe was not fitted on, beside random
token embeddings: *captions* five folds at random; *combinations* as above; *wordings* one phrase of each relation left out;
*never_read* the ten combinations of `scenes.HELD_OUT`, which the encoder has not read either. With positions, a random token
embedding gives away the length of the phrase, from which 7 / 22 of the relations can be guessed; without, 3 / 22; direction 0.

{markdown(splits[list(SPLITS)].round(3))}

*Place*: an object's own direction, seen from the other object, read by one probe from the vectors of both shape words (R², whole
combinations held out); a bag of words scores 0. {name}: {place_score(encoder, tokenizer):.3f}.

Root mean square of the output's coordinates, and the mean cosine between the vectors of one word in two captions that differ in …

{markdown(geometry(encoder, tokenizer).round(3))}

## Pre-training

{facts["steps"]:,} steps of {facts["batch_size"]} texts ({int(str(facts["steps"])) * int(str(facts["batch_size"])):,}, none
repeated on purpose); {minutes:.0f} minutes on a shared CPU core. Muon {facts["muon_lr"]} on the blocks' matrices, AdamW
{facts["adam_lr"]} on the rest, warm-up and linear decay, precision {facts["precision"]}, seed {facts["seed"]}.

Texts: `dit_lens.training.t5.grammar`, one to four true sentences about one to three objects; combinations in
`scenes.HELD_OUT` are never stated. Span corruption with density {recipe.NOISE_DENSITY} and mean span {recipe.MEAN_SPAN:g}
(T5: 0.15 and 3; a caption has eight words). The decoder, thrown away, has {recipe.ARCHITECTURE["num_decoder_layers"]} layer.
Half of the heads' relative position biases start with a standard deviation of {recipe.POSITION_BIAS:g}; the rest is T5's own
initialisation ({size.d_model**-0.5:.2f}).

{markdown(history)}

Made again by `dit-lens pretrain-text-encoder --out runs/{name}` and
`python -m recipes.bundle_text_encoder --run runs/{name}`.
"""


def markdown(table: pd.DataFrame) -> str:
    """A table with its index as the first columns."""
    flat = table.reset_index().astype(object)
    rows = [list(flat.columns), ["---"] * len(flat.columns), *flat.values.tolist()]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
