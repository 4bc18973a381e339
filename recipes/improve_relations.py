"""Can the relation circuit be used to draw relations better? `python -m recipes.improve_relations`

Beyond the paper, which finds the circuit and leaves open what it is good for. Four ways to
strengthen it, in the conditional branch and in the first five of 14 steps, in which places are
decided:

- scale: a × the relation heads' values (`hook_z`);
- sharpen: b × their attention scores (a temperature of 1 / b);
- steer: + k × the relation's own effect vector on the words that carry it, after the caption
  projection;
- guide: guidance through the heads alone, z + w (z − z without those words), which is P + w (P − P
  without) on their patterns.

`rte-nano` draws relations worst of the models that can know them; its heads are those of
`knockouts.screened`, its carriers the relation words. `t5-micro` loses a quarter of its relations
where a "the" precedes the second object. Its carrier is the paper's, the second shape word, for
which it has no ramps, so its heads are those whose loss of that word harms the layout of the first
clean-image prediction most; and, in a task of its own, the first shape word, for which it has
(found by `recurrence`, after the other tasks had been run). With `--full` also `rte-nopos-micro`, a
bag of words, which cannot know what is meant.

Doses are chosen by the relation accuracy (loose) of prompts of the training split, and reported on
held-out prompts and fresh noise, paired with no intervention; the control has the same dose on as
many random heads of nearby layers (steer: on random vectors of equal norm). The prediction: all
four raise the RTE model's relations by .02 or more, and steering the T5 model's, at a cost of less
than .1 in binding; the T5 model's heads carry too much else to be of use. For the first shape word,
predicted when the others were known: steering and guidance raise, scaling and sharpening do not.
Falsified by this: intervals below that, or controls that do as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from dit_lens import Intervention, ablation, prompts, scenes, screening
from dit_lens.intervene.edits import Add, Scale, along
from dit_lens.readout.circuits import parse_head
from dit_lens.stats import Interval, paired_difference
from dit_lens.task import Scene, Split, render_caption
from dit_lens.task.captions import TRAINED
from dit_lens.text.prompts import Role
from dit_lens.training.dynamics import layout, relation_vectors
from dit_lens.viz import style
from hooked_models import HookedTextToImage
from hooked_models.hooks.module import HookFunction

from .claims import Claim, report, stage
from .dose_figure import dose_figure
from .knockouts import WORDS, found_heads

Method = Literal["scale", "sharpen", "steer", "guide"]
METHODS: tuple[Method, ...] = get_args(Method)
VERDICTS = ("relation_loose", "unique_binding", "color", "shape")
EARLY = range(5)
"""Denoising steps in which the circuit is strengthened."""
MOST_HEADS = 4
BATCH = 32
RAISED, NO_USE, NO_COST = (0.02, 1.0), (-1.0, 0.05), (-0.1, 1.0)
NEUTRAL: dict[str, float] = {"scale": 1.0, "sharpen": 1.0, "steer": 0.0, "guide": 0.0}
DOSES: dict[Method, tuple[float, ...]] = {
    "scale": (1.5, 2.0, 3.0),
    "sharpen": (1.5, 2.0, 3.0),
    "steer": (0.5, 1.0, 2.0),
    "guide": (0.5, 1.0, 2.0),
}


@dataclass(frozen=True)
class Task:
    """The relations to be improved."""

    model: str
    template: str
    carrier: Role
    """The words that tell the denoiser the relation."""
    raised: tuple[Method, ...]
    """Methods that are predicted to help."""


TASKS = {
    "rte-nano": Task("rte-nano", TRAINED, "relation", METHODS),
    "t5-micro": Task("t5-micro", "the second", "shape2", ("steer",)),
    "t5-micro, first shape word": Task("t5-micro", "the second", "shape1", ("steer", "guide")),
    "rte-nopos-micro": Task("rte-nopos-micro", TRAINED, "relation", ()),
}


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    tasks: tuple[str, ...] = ("rte-nano", "t5-micro", "t5-micro, first shape word")
    """Names of `TASKS`."""
    choosing: int = 24
    """Scenes of the training split by which the dose is chosen."""
    reporting: int = 64
    """Held-out scenes on which it is reported."""
    full: bool = False
    """Also the model that cannot know; eight times the scenes, and controls at every dose."""
    seed: int = 0
    out: Path = Path("results/improve_relations")


@torch.no_grad()
def main(config: Config) -> None:
    scale = 8 if config.full else 1
    names = tuple(TASKS) if config.full else config.tasks
    claims: list[Claim] = []
    effects: list[pd.DataFrame] = []
    heads: dict[str, list[str]] = {}
    for name in names:
        task = TASKS[name]
        model = HookedTextToImage.from_pretrained(task.model)
        acting = stage(
            config.out, f"{name}-heads", model, heads_and_others, task.carrier, config.seed
        )
        heads[name] = acting["head"].tolist()
        judge = partial(effects_of, config, name, model, acting)
        tried = judge("train", config.choosing * scale, DOSES, controls=config.full)
        chosen = {method: best_dose(tried, method) for method in METHODS}
        told = judge(
            "held_out",
            config.reporting * scale,
            {method: (dose,) for method, dose in chosen.items()},
            controls=True,
        )
        claims += relation_claims(name, told, chosen)
        effects += [
            tried.assign(model=name, phase="choosing"),
            told.assign(model=name, phase="reporting"),
        ]
    table = pd.concat(effects, ignore_index=True)
    basis = (
        f"{config.reporting * scale} images, a noise each, dose chosen on "
        f"{config.choosing * scale} others, 1 run"
    )
    report(
        "Relations, with the circuit strengthened",
        claims,
        config.out,
        basis,
        True,
        full=config.full,
        heads=heads,
    )
    table.to_parquet(config.out / "effects.parquet", index=False)
    templates = {name: TASKS[name].template for name in names}
    style.save(dose_figure(table, templates, NEUTRAL), config.out / "dose_response.png")


def effects_of(
    config: Config,
    name: str,
    model: HookedTextToImage,
    acting: pd.DataFrame,
    split: Split,
    n: int,
    doses: Mapping[Method, Sequence[float]],
    *,
    controls: bool,
) -> pd.DataFrame:
    """`paired` of every method at its doses, with or without controls; a stage each, so that a
    stopped run goes on.
    """
    task = TASKS[name]
    drawn_of = (task.template, split, n, config.seed)
    parts = [stage(config.out, f"{task.model}, {task.template}-none", model, judged, *drawn_of)]
    for method, of_method in doses.items():
        for kind in ("circuit", "control") if controls else ("circuit",):
            heads = tuple(acting["head" if kind == "circuit" else "other"])
            how = (method, tuple(of_method), task.carrier, heads, kind)
            parts.append(
                stage(config.out, f"{name}-{method}-{kind}", model, judged, *drawn_of, *how)
            )
    return paired(pd.concat(parts, ignore_index=True))


# Strengthened heads


def heads_and_others(model: HookedTextToImage, carrier: Role, seed: int) -> pd.DataFrame:
    """The heads that are acted on, strongest first, and as many others to compare with: columns
    head, other.

    At most `MOST_HEADS`, and fewer where the model has not as many others. Heads whose maps are
    ramps, of the relation words or of what the relation adds to another carrier; or, where there
    are none, those of `layout_loss`.
    """
    most = min(MOST_HEADS, (model.cfg.n_layers * model.cfg.n_heads - 1) // 2)
    if carrier == "relation":
        ranking = screening.screen_heads(
            model.dit, {word: screening.word_vector(model, word) for word in WORDS}
        )
    else:
        ranking = screening.screen_heads(model.dit, relation_vectors(model, carrier), at="caption")
    ramps = found_heads(ranking)
    found = (ramps or list(layout_loss(model, carrier, seed)))[:most]
    drawn = ablation.random_heads(
        model, ablation.ablate_heads(found), np.random.default_rng(seed), exclude=ramps
    )
    others = [f"L{one.site.split('.')[1]}H{head}" for one in drawn for head in one.heads or ()]
    return pd.DataFrame({"head": found, "other": others})


@torch.no_grad()
def layout_loss(
    model: HookedTextToImage, carrier: Role, seed: int, n: int = 32
) -> dict[str, float]:
    """How far each head's loss of the carrier's words turns the layout at step 0 away from the
    caption's, most harmful first.

    The layout is the cosine of `dynamics.layout` of the first clean-image prediction, without
    guidance; means over `n` scenes of the training split.
    """
    wanted = scenes.sample(n, seed=seed + 3, color_words="both")
    texts = [scenes.caption(scene) for scene in wanted]
    noise = (seed + np.arange(n)).tolist()
    view, tokens = model.at(step=0, prompts=texts, seed=noise, guidance=1.0, returns="x0")
    whole = layout(model.decode(view(tokens)), wanted).mean()
    lost = {}
    for layer in range(model.cfg.n_layers):
        for number in range(model.cfg.n_heads):
            (hide,) = ablation.knockout_role(carrier, f"L{layer}H{number}", steps=0)
            hidden = view.run_with_hooks(tokens, fwd_hooks=hide.hooks(view, texts))
            lost[f"L{layer}H{number}"] = float(whole - layout(model.decode(hidden), wanted).mean())
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def random_vectors(
    like: Mapping[str, Float[Tensor, " d"]], seed: int
) -> dict[str, Float[Tensor, " d"]]:
    """Vectors of equal norms in random directions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: vector.norm() * F.normalize(torch.randn(vector.shape, generator=generator), dim=0)
        for name, vector in like.items()
    }


# How


def strengthened(
    model: HookedTextToImage,
    texts: Sequence[str],
    method: Method,
    dose: float,
    carrier: Role,
    heads: Sequence[str] = (),
    vectors: Float[Tensor, "prompt d_model"] | None = None,
) -> list[tuple[str, HookFunction]]:
    """The hooks of one method and dose, for a run of these prompts.

    Args:
        carrier: the words that are steered, or hidden by guidance.
        heads: the heads that are acted on, unless by steering.
        vectors: of steering, one a prompt.
    """
    if method == "steer":
        assert vectors is not None
        added = dose * prompts.role_mask(model, texts, carrier)[..., None] * vectors[:, None]
        return Intervention("hook_caption", steps=EARLY, action=Add(added)).hooks(model, texts)
    if method == "guide":
        hidden = prompts.role_mask(model, texts, carrier).to(model.device)
        numbers: dict[int, list[int]] = {}
        for layer, head in map(parse_head, heads):
            numbers.setdefault(layer, []).append(head)
        return [
            (
                f"steps.{step}.cond.blocks.{layer}.cross_attn.hook_pattern",
                partial(guided, hidden=hidden, heads=of_layer, weight=dose),
            )
            for step in EARLY
            for layer, of_layer in numbers.items()
        ]
    scaled = ablation.ablate_heads(heads, Scale(dose), steps=EARLY)
    if method == "sharpen":
        scaled = [
            replace(one, site=one.site.replace("hook_z", "hook_attn_scores")) for one in scaled
        ]
    return [hook for one in scaled for hook in one.hooks(model, texts)]


def guided(
    pattern: Float[Tensor, "prompt head query_pos text_pos"],
    hook: HookPoint | None = None,
    *,
    hidden: Bool[Tensor, "prompt text_pos"],
    heads: Sequence[int],
    weight: float,
) -> Float[Tensor, "prompt head query_pos text_pos"]:
    """P + weight · (P − P without the hidden words) in the given heads; P without them is what a
    knock-out makes of it.

    z is linear in P, so this is z + weight · (z − z without the hidden words). Rows still sum to
    one; entries can be negative.
    """
    kept = pattern.masked_fill(hidden[:, None, None], 0.0)
    without = kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)
    chosen = along(torch.isin(torch.arange(pattern.shape[1]), torch.tensor(heads)), 4, 1).to(
        pattern.device
    )
    return torch.where(chosen, pattern + weight * (pattern - without), pattern)


@torch.no_grad()
def judged(
    model: HookedTextToImage,
    template: str,
    split: Split,
    n: int,
    seed: int,
    method: Method | Literal["none"] = "none",
    doses: Sequence[float] = (0.0,),
    carrier: Role = "relation",
    heads: Sequence[str] = (),
    kind: str = "none",
) -> pd.DataFrame:
    """Verdicts of scenes drawn with one method, a row an image: method, dose, kind, scene, then
    `VERDICTS`.

    The same `n` scenes of a split, and the same noise, at every dose. `kind` "control" steers along
    random vectors.
    """
    wanted, noise = drawn(split, n, seed)
    vectors = relation_vectors(model, carrier) if method == "steer" else {}
    if kind == "control":
        vectors = random_vectors(vectors, seed)
    rows = []
    for dose in doses:
        for start in range(0, n, BATCH):
            part = wanted[start : start + BATCH]
            texts = [render_caption(scene, template) for scene in part]
            of_scenes = (
                torch.stack([vectors[scene.relation] for scene in part]) if vectors else None
            )
            hooks = (
                []
                if method == "none"
                else strengthened(model, texts, method, dose, carrier, heads, of_scenes)
            )
            found = scenes.evaluate(
                model.run_with_hooks(texts, noise[start : start + BATCH], fwd_hooks=hooks), part
            )
            rows.append(
                pd.DataFrame(
                    {verdict: found[verdict].values.astype(float) for verdict in VERDICTS}
                ).assign(
                    method=method, dose=dose, kind=kind, scene=np.arange(start, start + len(part))
                )
            )
    return pd.concat(rows, ignore_index=True)


def drawn(split: Split, n: int, seed: int) -> tuple[list[Scene], list[int]]:
    """Scenes of a split and the seed of each one's noise; no two splits share noise."""
    offset = 100_000 if split == "held_out" else 0
    return scenes.sample(n, seed=seed + 11, split=split, color_words="both"), (
        offset + seed + np.arange(n)
    ).tolist()


# Results


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """The change of every verdict against no intervention: a row for each method, dose, kind and
    verdict.

    Columns method, dose, kind, verdict, accuracy, mean, low, high. Kind "difference" is circuit −
    control on the same images.
    """
    by_scene = {
        key: part.set_index("scene").sort_index()
        for key, part in rows.groupby(["method", "dose", "kind"], sort=False)
    }
    none = next(part for key, part in by_scene.items() if key[0] == "none")
    found = []
    for (method, dose, kind), part in by_scene.items():
        versus = {kind: none}
        if kind == "circuit" and (method, dose, "control") in by_scene:
            versus["difference"] = by_scene[method, dose, "control"]
        for name, before in versus.items():
            for verdict in VERDICTS:
                change = paired_difference(
                    before[verdict].to_numpy()[:, None], part[verdict].to_numpy()[:, None]
                )
                found.append(
                    {"method": method, "dose": dose, "kind": name, "verdict": verdict}
                    | {"accuracy": part[verdict].mean(), **change._asdict()}
                )
    return pd.DataFrame(found)


def best_dose(tried: pd.DataFrame, method: Method) -> float:
    """The dose with the highest relation accuracy (loose) of those tried, no dose not being one;
    the smallest of equals.
    """
    rows = tried[
        (tried["method"] == method)
        & (tried["kind"] == "circuit")
        & (tried["verdict"] == "relation_loose")
    ]
    return float(
        rows.sort_values("dose").iloc[rows.sort_values("dose")["accuracy"].to_numpy().argmax()][
            "dose"
        ]
    )


def change(effects: pd.DataFrame, method: str, kind: str, verdict: str) -> Interval:
    """One cell of `paired`, of a table with one dose a method."""
    rows = effects[
        (effects["method"] == method) & (effects["kind"] == kind) & (effects["verdict"] == verdict)
    ]
    return Interval(*rows[list(Interval._fields)].iloc[0])


def relation_claims(name: str, told: pd.DataFrame, chosen: Mapping[Method, float]) -> list[Claim]:
    """Effect of each method at its chosen dose on relations, and its cost.

    A relation is only judged right where both objects are bound, so the circuit can only
    win those that are bound and wrong.
    """
    right, bound = (
        told[(told["method"] == "none") & (told["verdict"] == verdict)]["accuracy"].item()
        for verdict in ("relation_loose", "unique_binding")
    )
    before = f"{right:.3f} without, of {bound:.3f} bound"
    claims = []
    for method, dose in chosen.items():
        what = f"{name}, {method} {dose:g}"
        control = "random vectors" if method == "steer" else "random heads"
        of = {
            kind: change(told, method, kind, "relation_loose")
            for kind in ("circuit", "control", "difference")
        }
        claims.append(
            Claim(
                f"{what}: change of relation (loose), {before}",
                "–",
                of["circuit"],
                RAISED if method in TASKS[name].raised else NO_USE,
                f"{control} {of['control']}; beyond them {of['difference']}",
            )
        )
        others = {
            verdict: change(told, method, "circuit", verdict)
            for verdict in ("unique_binding", "color", "shape")
        }
        claims.append(
            Claim(
                f"{what}: change of unique binding",
                "–",
                others["unique_binding"],
                NO_COST,
                f"color {others['color']}; shape {others['shape']}; "
                f"{control}: {change(told, method, 'control', 'unique_binding')}",
            )
        )
    return claims


if __name__ == "__main__":
    main(tyro.cli(Config))
