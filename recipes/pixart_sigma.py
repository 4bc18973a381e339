"""PixArt-Σ: does it know left from right, where is that said, and which heads carry it?

`python -m recipes.pixart_sigma`

Paper: figure 30 and its notebook on `PixArt-Sigma-XL-2-512-MS` ("A X is on the left of a Y."): both
objects on 23 % of images, the relation right on 55 % of those (chance: 50 %); the relation's share
of the variance of the relation word .275, after the caption projection .379, of the objects' words
.002; few heads whose maps are ramps (L2H13, L6H1 among them). It made no causal test. Falsified
by this: a relation drawn well above chance, or a share in the objects' words as large as in the
relation's.

The causal test, beyond the paper: of what exchanging "left" for "right" does to the first
clean-image prediction, the share that the screened heads bring about, against as many random heads
of the same layers; and, with a detector, relation accuracy with the relation word hidden from them.

Objects are found by an open-vocabulary detector (`--detector`, a transformers model), or in boxes
that you bring (`--boxes`, CSV or Parquet, for the pictures in `out/images`); without either, rows
that need them say "not run here". Every stage resumes. `--model FOLDER --smoke` runs all of it in a
minute on a small folder of the same layout.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track

from dit_lens import Intervention, ablation, detection, prompts, screening, sweep, variance
from dit_lens.intervene.edits import Replace
from dit_lens.stats import Interval, clustered_mean, paired_difference
from dit_lens.store import Store, digest, fingerprint
from dit_lens.viz import style
from hooked_models import HookedTextToImage

from .claims import Claim, kept_table, report, stage

OBJECTS = (
    *(
        ("cat", "dog"),
        ("horse", "cow"),
        ("sheep", "goat"),
        ("duck", "rabbit"),
        ("bird", "fish"),
        ("man", "woman"),
        ("boy", "girl"),
    ),
    *(
        ("car", "bus"),
        ("truck", "bicycle"),
        ("train", "boat"),
        ("airplane", "balloon"),
        ("chair", "table"),
        ("sofa", "lamp"),
    ),
    *(
        ("bed", "desk"),
        ("cup", "bowl"),
        ("bottle", "vase"),
        ("knife", "fork"),
        ("book", "clock"),
        ("phone", "laptop"),
    ),
    *(
        ("apple", "banana"),
        ("orange", "pear"),
        ("cake", "pizza"),
        ("tree", "flower"),
        ("house", "church"),
        ("tower", "bridge"),
    ),
    *(
        ("bag", "hat"),
        ("shoe", "umbrella"),
        ("guitar", "piano"),
        ("drum", "violin"),
        ("candle", "mirror"),
    ),
)
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
PAPER_HEADS = ("L2H13", "L6H1")
NOT_RUN = Interval(np.nan, np.nan, np.nan)
ALL, NONE = "all heads", "none"


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the defaults are the paper's."""

    model: str = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    """Hub id or pipeline folder."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    detector: str | None = None
    """Zero-shot object detector, such as "google/owlv2-base-patch16-ensemble"."""
    boxes: Path | None = None
    """Boxes found otherwise, for the pictures in `out/images`; see `dit_lens.detection.COLUMNS`."""
    pairs: int = 30
    """Pairs of objects, four prompts each."""
    seeds: int = 20
    """Images a prompt."""
    num_steps: int = 20
    guidance: float = 4.5
    heads: int = 4
    """How many of the screened heads are tested."""
    batch: int = 4
    """Images at once."""
    smoke: bool = False
    """Two pairs, one image each, three steps."""
    out: Path = Path("results/pixart_sigma")

    def sized(self) -> Config:
        """With the settings of a smoke run, if it is one."""
        return replace(self, pairs=2, seeds=1, num_steps=3, heads=2) if self.smoke else self


@dataclass(frozen=True)
class Prompt:
    """One sentence, and its meaning."""

    first: str
    side: Literal["left", "right"]
    second: str

    def __str__(self) -> str:
        return f"A {self.first} is on the {self.side} of a {self.second}."


@torch.no_grad()
def main(config: Config) -> None:
    config = config.sized()
    console = Console()
    model = HookedTextToImage.from_pretrained(config.model).to(config.device)
    wanted = asked(config.pairs)
    announce(console, model, config, len(wanted))

    shared = stage(config.out, "shares", model, relation_shares, config.pairs)
    ranking = stage(config.out, "screening", model, screened, config.pairs)
    heads = [f"L{row.layer}H{row.head}" for row in ranking.head(config.heads).itertuples()]
    carried = stage(config.out, "exchange", model, exchange_shares, heads, config)
    screened_heads = ablation.knockout_role("relation", heads)
    conditions = {
        NONE: [],
        "screened heads": screened_heads,
        "random heads": ablation.random_heads(model, screened_heads, np.random.default_rng(0)),
        ALL: ablation.knockout_role("relation"),
    }
    made_from = {
        "model": model.digest(),
        "prompts": digest(*map(str, wanted)),
        "conditions": fingerprint(conditions),
        "num_steps": config.num_steps,
        "guidance": config.guidance,
    }
    with Store(config.out / "images", made_from) as pictures:
        drawn = {
            condition: draw(model, config, wanted, condition, hidden, pictures)
            for condition, hidden in conditions.items()
        }
        found = located(config, wanted, drawn, pictures)
    claims = [
        *image_claims(found),
        *share_claims(shared),
        *screening_claims(ranking),
        *causal_claims(carried, found, heads),
    ]
    report(
        f"Left and right: {config.model}",
        claims,
        config.out,
        model=config.model,
        heads=heads,
        smoke=config.smoke,
    )
    style.save(screening_figure(ranking, heads), config.out / "screening.png")


def asked(pairs: int) -> list[Prompt]:
    """Four prompts a pair of objects: either first, on either side."""
    return [
        Prompt(first, side, second)
        for pair in OBJECTS[:pairs]
        for first, second in itertools.permutations(pair)
        for side in SIDES
    ]


def announce(console: Console, model: HookedTextToImage, config: Config, n: int) -> None:
    """Expected duration and output, from one denoising step that is run for the
    purpose.
    """
    text = str(asked(1)[0])
    model(text, 0, 1, config.guidance)  # the first call pays for the set-up
    start = time.perf_counter()
    size = model([text] * config.batch, 0, 1, config.guidance).shape
    a_step = (time.perf_counter() - start) / config.batch
    images = 4 * n * config.seeds
    hours = (images * config.num_steps + (config.heads * 3 + 2) * n) * a_step / 3600
    # a PNG of a photograph takes about half of its pixels' bytes
    gigabytes = images * size[-1] * size[-2] * 3 / 2 / 1e9
    console.print(
        f"{config.model} on {config.device}: {n} prompts × {config.seeds} seeds × 4 conditions = "
        f"{images:,} images of {size[-1]} px, at most {hours:.2g} h, {gigabytes:.2g} GB in "
        f"{config.out}; what is there already is not made again."
    )


def word_vectors(
    model: HookedTextToImage, pairs: int, word: str, at: variance.Space
) -> tuple[torch.Tensor, pd.DataFrame]:
    """Vectors of the side's, the first or the second object's word, [prompt d], and what each
    prompt says.
    """
    wanted = asked(pairs)
    texts = [str(prompt) for prompt in wanted]
    encoded = variance.encode(model, model.to_tokens(texts), at)
    said = [str(getattr(prompt, word)) for prompt in wanted]
    places = [
        prompts.phrase_mask(model, [text], phrase)[0].nonzero().flatten()
        for text, phrase in zip(texts, said, strict=True)
    ]
    last = [int(of[-1]) for of in places]
    factors = pd.DataFrame(
        {"relation": [p.side for p in wanted], "objects": [f"{p.first} {p.second}" for p in wanted]}
    )
    return encoded[torch.arange(len(texts)), last], factors


def relation_shares(model: HookedTextToImage, pairs: int) -> pd.DataFrame:
    """The relation's partial share of the variance of three words, before and after the caption
    projection.
    """
    rows = []
    spaces: tuple[variance.Space, ...] = ("text", "caption")
    for word, at in itertools.product(("side", "first", "second"), spaces):
        vectors, factors = word_vectors(model, pairs, word, at)
        table = variance.partition(vectors.float(), factors, permutations=199)
        rng = np.random.default_rng(0)
        resampled = []
        names = factors["objects"].unique()
        # pairs of objects are resampled whole, so that every one has both sides
        for _ in range(200):
            picks = [
                np.flatnonzero(factors["objects"] == name) for name in rng.choice(names, len(names))
            ]
            rows_of = np.concatenate(picks)
            again = factors.iloc[rows_of].assign(
                objects=np.repeat(np.arange(len(picks)), [len(p) for p in picks])
            )
            table_of = variance.partition(vectors[rows_of].float(), again, permutations=0)
            resampled.append(float(table_of["r2_partial"]["relation"]))
        low, high = np.quantile(resampled, [0.025, 0.975])
        of_relation = {
            "mean": table["r2_partial"]["relation"],
            "low": low,
            "high": high,
            "p": table["p"]["relation"],
        }
        rows.append({"word": word, "at": at, **of_relation})
    return pd.DataFrame(rows)


def screened(model: HookedTextToImage, pairs: int) -> pd.DataFrame:
    """Heads ranked by the ramps of what the side adds to the caption vector of its own word."""
    vectors, factors = word_vectors(model, pairs, "side", "caption")
    effects = variance.effect_vectors(vectors.float(), factors)["relation"]
    return screening.screen_heads(
        model.dit,
        {side: torch.tensor(effects.sel(relation=side).values) for side in SIDES},
        at="caption",
    )


def exchange_shares(model: HookedTextToImage, heads: Sequence[str], config: Config) -> pd.DataFrame:
    """Shares of the effect of "right" for "left" on x0 at step 0: of the heads together, and of as
    many random ones.

    Columns condition, prompt, share.
    """
    texts = [str(prompt) for prompt in asked(config.pairs) if prompt.side == "left"]
    steps, guidance = config.num_steps, config.guidance
    keep = [
        "steps.0.hook_x0",
        *(f"steps.0.cond.blocks.{layer}.cross_attn.hook_z" for layer in range(model.cfg.n_layers)),
    ]
    tables = []
    for start in track(
        range(0, len(texts), config.batch),
        "exchanging",
        transient=True,
        console=Console(stderr=True),
    ):
        batch = texts[start : start + config.batch]
        others = [text.replace("on the left of", "on the right of") for text in batch]
        before, after = (
            model.run_with_cache(of, 0, steps, guidance, names_filter=keep, steps=[0])[1]
            for of in (batch, others)
        )
        screened = ablation.ablate_heads(heads, Replace(after), steps=0)
        groups = {
            "screened heads": screened,
            "random heads": ablation.random_heads(model, screened, np.random.default_rng(0)),
        }
        share = sweep.Metric(
            sweep.ShareOf(after[keep[0]] - before[keep[0]]), "x0", ("baseline", "prompt")
        )
        found = sweep.run(
            model,
            batch,
            [0],
            groups,
            {"share": share},
            num_steps=steps,
            guidance=guidance,
            batch=config.batch,
        )
        tables.append(
            found["share"]
            .isel(seed=0)
            .assign_coords(prompt=batch)
            .to_series()
            .rename("share")
            .reset_index()
        )
    return pd.concat(tables, ignore_index=True).rename(columns={"intervention": "condition"})[
        ["condition", "prompt", "share"]
    ]


def draw(
    model: HookedTextToImage,
    config: Config,
    wanted: Sequence[Prompt],
    condition: str,
    interventions: Sequence[Intervention],
    pictures: Store,
) -> dict[str, tuple[int, int]]:
    """The pictures of one condition as files, those that are there not again: file name → (prompt,
    seed).
    """
    names = {
        f"{condition.replace(' ', '_')}-{prompt:03d}-{seed:03d}.png": (prompt, seed)
        for prompt in range(len(wanted))
        for seed in range(config.seeds)
    }
    missing = [name for name in names if name not in pictures]
    for start in track(
        range(0, len(missing), config.batch),
        condition,
        transient=True,
        console=Console(stderr=True),
    ):
        batch = missing[start : start + config.batch]
        texts = [str(wanted[names[name][0]]) for name in batch]
        seeds = [names[name][1] for name in batch]
        hooks = [
            hook
            for one in interventions
            for hook in one.hooks(model, texts, num_steps=config.num_steps)
        ]
        images = model.run_with_hooks(
            texts, seeds, config.num_steps, config.guidance, fwd_hooks=hooks
        )
        for name, image in zip(batch, images.float().cpu(), strict=True):
            pictures.put(
                name, Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save
            )
    for name in names:
        pictures.path(name)  # raises if one that was there is damaged
    return names


def located(
    config: Config,
    wanted: Sequence[Prompt],
    drawn: Mapping[str, Mapping[str, tuple[int, int]]],
    pictures: Store,
) -> pd.DataFrame:
    """Where objects are on each picture: columns condition, prompt, seed, both, right (NaN unless
    both); empty without boxes.
    """
    pairs = {
        name: (wanted[i].first, wanted[i].second)
        for names in drawn.values()
        for name, (i, _) in names.items()
    }
    if config.boxes is not None:
        boxes = detection.read_boxes(config.boxes)
    elif config.detector is not None:
        found = []
        for condition, names in drawn.items():
            files = [pictures.path(name) for name in names]
            made_from = {
                "detector": config.detector,
                "pictures": fingerprint({name: pictures.files[name] for name in names}),
            }
            detected = partial(
                detection.detect, files, pairs, config.detector, device=config.device
            )
            found.append(
                kept_table(config.out / "boxes", condition.replace(" ", "_"), made_from, detected)
            )
        boxes = pd.concat(found, ignore_index=True)
    else:
        return pd.DataFrame(columns=["condition", "prompt", "seed", "both", "right"])
    rows = [
        (condition, i, seed) for condition, names in drawn.items() for i, seed in names.values()
    ]
    places = detection.pair_positions(boxes, pairs)
    both, dx = places["both"].to_numpy(bool), places["dx"].to_numpy(float)
    sign = np.array([-1 if wanted[i].side == "left" else 1 for _, i, _ in rows])
    found_at = {
        "both": both.astype(float),
        "right": np.where(both, (dx * sign > 0).astype(float), np.nan),
    }
    return pd.DataFrame(rows, columns=["condition", "prompt", "seed"]).assign(**found_at)


def by_prompt(found: pd.DataFrame, condition: str, what: str) -> np.ndarray:
    """One measurement of one condition, [prompt seed]."""
    return (
        found[found["condition"] == condition]
        .pivot(index="prompt", columns="seed", values=what)
        .to_numpy(float)
    )


def image_claims(found: pd.DataFrame) -> list[Claim]:
    """Do both objects appear, and on the right sides?"""
    told = "no detector and no boxes: --detector google/owlv2-base-patch16-ensemble"
    both, right = (
        clustered_mean(by_prompt(found, NONE, what)) if len(found) else NOT_RUN
        for what in ("both", "right")
    )
    return [
        Claim("Both objects found", ".228", both, (0.13, 0.33), "" if len(found) else told),
        Claim(
            "On the right sides, if both are found",
            ".550",
            right,
            (0.45, 0.65),
            "chance .5" if len(found) else told,
        ),
    ]


def share_claims(shares: pd.DataFrame) -> list[Claim]:
    """The relation's share in each word."""
    of_word = {
        "side": ("the relation's word", (0.1, 1.0)),
        "first": ("object 1", (0.0, 0.05)),
        "second": ("object 2", (0.0, 0.05)),
    }
    paper = {
        ("side", "text"): ".275",
        ("side", "caption"): ".379",
        ("first", "text"): ".002",
        ("first", "caption"): ".0004",
    }
    return [
        Claim(
            f"Relation's partial R² at {of_word[row['word']][0]}, "
            f"{'after' if row['at'] == 'caption' else 'before'} projection",
            paper.get((row["word"], row["at"]), paper["first", row["at"]]),
            Interval(row["mean"], row["low"], row["high"]),
            of_word[row["word"]][1],
            f"permutations p = {row['p']:.3f}",
        )
        for row in shares.to_dict("records")
    ]


def screening_claims(ranking: pd.DataFrame) -> list[Claim]:
    """Are the paper's heads among the first of as many as there are?"""
    rank = {
        f"L{row.layer}H{row.head}": number for number, row in enumerate(ranking.itertuples(), 1)
    }
    first = ", ".join(
        f"{head} ({row.cosine:+.2f})"
        for head, row in zip(rank, ranking.head(6).itertuples(), strict=False)
    )
    return [
        Claim(
            f"{head}: rank among {len(rank)} heads, as a fraction",
            "one of nine shown",
            Interval(*[rank[head] / len(rank)] * 3) if head in rank else NOT_RUN,
            (0.0, 9 / len(rank)),
            f"first: {first}",
        )
        for head in PAPER_HEADS
    ]


def causal_claims(carried: pd.DataFrame, found: pd.DataFrame, heads: Sequence[str]) -> list[Claim]:
    """Do the screened heads carry the relation?"""
    shares = {
        str(name): clustered_mean(part["share"].to_numpy()[:, None])
        for name, part in carried.groupby("condition")
    }
    names = ", ".join(heads)
    claims = [
        Claim(
            f'Share of what exchanging "left" for "right" does to x0 at step 0 that {names} bring about',
            "–",
            shares["screened heads"],
            (0.1, 1.0),
            f"random heads of these layers {shares['random heads']}",
        )
    ]
    changes = {}
    for condition in ("screened heads", "random heads", ALL):
        changes[condition] = NOT_RUN
        if len(found):
            changes[condition] = paired_difference(
                by_prompt(found, NONE, "right"), by_prompt(found, condition, "right")
            )
    claims.append(
        Claim(
            f"The relation's word hidden from {names}: change of the relation, of images with both "
            "objects in either",
            "–",
            changes["screened heads"],
            (-1.0, -0.05),
            f"random heads {changes['random heads']}; all heads {changes[ALL]}",
        )
    )
    return claims


@style.styled
def screening_figure(ranking: pd.DataFrame, heads: Sequence[str]) -> Figure:
    """Cosine and energy of every head's maps; the heads chosen in their colours."""
    drawn, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    ax.scatter(ranking["cosine"], ranking["energy"], s=12, color=style.INK, alpha=0.5)
    named = ranking.set_index(
        "L" + ranking["layer"].astype(str) + "H" + ranking["head"].astype(str)
    )
    for head in heads:
        row = named.loc[head]
        ax.plot(row["cosine"], row["energy"], "o", color=style.head_color(head), label=head)
    ax.set(xlabel="mean cosine of map and ramp", ylabel="energy", xlim=(-1.05, 1.05))
    ax.set_title(f"Maps of {len(ranking)} heads; in colour, the {len(heads)} chosen")
    drawn.legend(loc="outside right upper")
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
