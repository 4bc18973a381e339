"""Embedding arithmetic: add vectors to a prompt's words, and judge the images.

    images = steering.swap_relation(model, ["red circle is left of blue square"], from_="left",
    to="right", k=1.0) doses = steering.dose_response(model, scenes.sample(32, seed=0), ks=(0, 0.5,
    1, 1.5, 2)) steering.summarise(doses)

Vectors are added in the conditional branch, at every step, before ("text") or after ("caption") the
caption projection. Text is encoded once; hooks on its copies in the denoiser make the projection
run again, so this works with any text encoder.

Source: Wang, Fan, Pan (arXiv 2601.06338), section on T5: e − V_from + k·V_to on the second object's
word. Here both vectors are multiplied by k, so k = 0 is no change. The doses and the controls are
additions to the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import integer, number
from hooked_models.generation.model import DEFAULT_GUIDANCE, DEFAULT_STEPS
from hooked_models.generation.sampling import Seeds, seed_of_each

from ..stats import clustered_mean
from ..task import DIRECTIONS, OPPOSITE, PHRASES, Scene, caption, evaluate
from ..task.scene import Relation
from ..text.prompts import RELATION_WORDS, Role, Tokens, role_mask, token_mask
from ..text.variance import Space, effect_vectors, encode, factorial_prompts, factors_of, phrase_span, word_vectors
from .interventions import Add, Intervention

SITES: dict[Space, str] = {"text": "hook_text", "caption": "hook_caption"}
JUDGED = {f"{goal}_{how}": (goal, f"relation_{how}") for goal in ("target", "original") for how in ("strict", "loose")}
METRICS = (*JUDGED, "offset", "color", "shape", "unique_binding")
QUIET_BATCHES = 4
"""Largest number of batches without a progress bar."""

Target = Literal["phrase"] | Role


@torch.no_grad()
def steer(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    vector: Float[Tensor, " d"] | Float[Tensor, "prompt text_pos d"],
    tokens: Tokens | None = None,
    at: Space = "text",
    k: int | float = 1.0,
    seed: Seeds = 0,
    num_steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    batch_size: int = 32,
) -> Float[Tensor, "prompt 3 height width"]:
    """Images in [0, 1] of prompts with k · vector added to their words, in batches of `batch_size`.

    Args:
        vector: one for the chosen tokens of all prompts, or one for every token of
            `model.to_tokens(prompts)`.
        tokens: roles, words (`prompts.word`), positions or a mask that the vector is added to; None
            only if every token has its own vector.
        at: the space of the vector: before or after the caption projection.
        k: dose.
        seed: as in the model's own call.

    Raises:
        ValueError: a prompt has no such token, or vector and tokens do not go together.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> prompt, vector = "red circle is above blue square", torch.ones(256)
        >>> steer(model, prompt, vector, "relation", k=0.5, num_steps=2).shape
        torch.Size([1, 3, 128, 128])
    """
    k, batch_size = number("k", k), integer("batch_size", batch_size, 1)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if vector.ndim == 3:
        if tokens is not None or len(vector) != len(texts):
            raise ValueError("A vector for every token is [prompt text_pos d], with no tokens= beside it.")
        added = vector
    elif tokens is None:
        raise ValueError("Say which tokens the vector is added to: a role such as tokens='shape2', or positions.")
    else:
        added = token_mask(model, texts, tokens).to(vector)[..., None] * vector
    seeds = seed_of_each(seed, len(texts))
    images = []
    for start in _batches(len(texts), batch_size, "steering"):
        rows = slice(start, start + batch_size)
        images.append(_generate(model, texts[rows], k * added[rows], at, seeds[rows], num_steps, guidance))
    return torch.cat(images)


def _generate(
    model: HookedTextToImage,
    texts: Sequence[str],
    added: Float[Tensor, "prompt text_pos d"],
    at: Space,
    seeds: Sequence[int],
    num_steps: int,
    guidance: float,
) -> Float[Tensor, "prompt 3 height width"]:
    """Images of one batch. `added` may extend beyond the longest of these prompts, with zeros."""
    length = model.to_tokens(texts).shape[1]
    hooks = Intervention(SITES[at], action=Add(added[:, :length])).hooks(model, texts, num_steps=num_steps)
    return model.run_with_hooks(texts, seed=seeds, num_steps=num_steps, guidance=guidance, fwd_hooks=hooks)


def _batches(n: int, batch_size: int, what: str) -> Iterable[int]:
    starts = range(0, n, batch_size)
    quiet = len(starts) <= QUIET_BATCHES
    return track(starts, what, transient=True, disable=quiet, console=Console(stderr=True))


# From one relation to another


@torch.no_grad()
def swap_relation(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    from_: str = "left",
    to: str = "above",
    k: int | float = 1.0,
    seed: Seeds = 0,
    tokens: Target = "phrase",
    at: Space = "text",
    num_steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    batch_size: int = 32,
) -> Float[Tensor, "prompt 3 height width"]:
    """Images in [0, 1] of prompts whose relation is moved by k · (V_to − V_from); see
    `swap_vectors`.

    Args:
        from_: relation of the prompts ("upper_left"), or one phrase of it.
        to: relation or phrase to draw instead.
        k: dose.

    Raises:
        ValueError: a prompt has another relation, or the two cannot be swapped in this way (the
            message has the alternative).

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> prompt = "red circle is left of blue square"
        >>> swap_relation(model, prompt, "left", "right", num_steps=2).shape
        torch.Size([1, 3, 128, 128])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        said = factors_of(model, text)
        if from_ not in (said["relation"], said["phrase"]):
            raise ValueError(f"{text!r} says {said['phrase']!r} ({said['relation']}), not {from_!r}.")
    vectors = swap_vectors(model, texts, [to] * len(texts), tokens, at)
    return steer(model, texts, vectors, None, at, k, seed, num_steps, guidance, batch_size)


@torch.no_grad()
def swap_vectors(
    model: HookedTextToImage, prompts: Sequence[str], to: Sequence[str], tokens: Target = "phrase", at: Space = "text"
) -> Float[Tensor, "prompt text_pos d"]:
    """V_to − V_from for every token of `model.to_tokens(prompts)`; zero for tokens that do not
    change.

    Args:
        to: relation or phrase to go to, for each prompt.
        tokens: words that carry the change:

            - "phrase": every word of the relation phrase, token by token. The phrase of `to` is the
              one with equally many tokens that keeps most of the prompt's (above ↔ below, left ↔
              right, diagonals among themselves, "left of" → "directly above").
            - "relation": only the words that have a direction; the rest of the phrase stays ("to
              the left of" → "to the above of").
            - another role, such as "shape2": effect vectors of the relation at that word
              (`variance.effect_vectors` over the 264 prompts, with shapes and colors as the other
              factors). This is the paper's method, for encoders that mix words.

        The first two are means of the words' differences over the 12 pairs of objects, so they are
        the difference of two sum-to-zero effects, with equal position codes.

    Raises:
        ValueError: there is no such phrase, or nothing to change.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-nano")
        >>> vectors = swap_vectors(model, ["red circle is left of blue square"], ["right"])
        >>> vectors.shape, vectors[0].norm(dim=-1).bool().int().tolist()
        (torch.Size([1, 8, 256]), [0, 0, 0, 1, 0, 0, 0, 0])
    """
    said = [factors_of(model, prompt) for prompt in prompts]
    width = encode(model, model.to_tokens(prompts[:1]), at).shape[-1]
    vectors = torch.zeros(*model.to_tokens(prompts).shape, width, device=model.device, dtype=model.dit.dtype)
    if tokens != "phrase" and tokens != "relation":
        samples, factors = word_vectors(model, factorial_prompts(), tokens, at)
        effects = effect_vectors(samples, factors[["shape1", "color1", "shape2", "relation"]])["relation"]
        for row, mask, own, target in zip(vectors, token_mask(model, prompts, tokens), said, to, strict=True):
            if unknown := [name for name in (own["relation"], target) if name not in PHRASES]:
                raise ValueError(f"{unknown[0]!r} has no effect vector: choose a relation of {', '.join(PHRASES)}.")
            difference = effects.sel(relation=target) - effects.sel(relation=own["relation"])
            row[mask.to(row.device)] = torch.from_numpy(difference.values).to(row)
        return vectors

    @cache
    def word_difference(phrase: str, target: str) -> Float[Tensor, "phrase_pos d"]:
        return _word_difference(model, phrase, _counterpart(model, phrase, target, tokens == "phrase"), at)

    for row, prompt, own, target in zip(vectors, prompts, said, to, strict=True):
        row[phrase_span(model, prompt)] = word_difference(own["phrase"], target)
    return vectors


def _counterpart(model: HookedTextToImage, phrase: str, to: str, whole: bool) -> str:
    """Phrase of `to` that replaces `phrase` token by token: the one with most tokens in common."""

    def pieces(wording: str) -> list[str]:
        return model.to_str_tokens(wording)[:-1]

    def common(other: str) -> int:
        return sum(a == b for a, b in zip(pieces(phrase), pieces(other), strict=False))

    others = sorted(PHRASES.get(to, (to,)), key=common, reverse=True)  # type: ignore[call-overload]
    for wording in others if whole else [_substituted(phrase, other) for other in others]:
        if wording is not None and len(pieces(wording)) == len(pieces(phrase)):
            return wording
    if whole:
        raise ValueError(
            f"No phrase for {to!r} has as many tokens as {phrase!r} ({len(pieces(phrase))}): take prompts with another phrase, "
            "or tokens='relation', which changes the direction words only."
        )
    raise ValueError(f"{phrase!r} and {to!r} have different numbers of direction words, so that none can take another's place.")


def _substituted(phrase: str, other: str) -> str | None:
    """`phrase` with the direction words of `other` in place of its own."""
    words, new = phrase.split(), [word for word in other.split() if word in RELATION_WORDS]
    places = [place for place, word in enumerate(words) if word in RELATION_WORDS]
    if not places or len(places) != len(new):
        return None
    for place, word in zip(places, new, strict=True):
        words[place] = word
    return " ".join(words)


def _word_difference(model: HookedTextToImage, phrase: str, target: str, at: Space) -> Float[Tensor, "phrase_pos d"]:
    """Mean change of the phrase's own tokens, over the pairs of objects, if `target` replaces
    `phrase`.
    """
    means = []
    for wording in (phrase, target):
        sentences = factorial_prompts([wording])
        encoded = encode(model, model.to_tokens(sentences), at)
        spans = [phrase_span(model, sentence) for sentence in sentences]
        means.append(torch.stack([row[span] for row, span in zip(encoded, spans, strict=True)]).mean(dim=0))
    return means[1] - means[0]


# Dose and response


@torch.no_grad()
def dose_response(
    model: HookedTextToImage,
    wanted: Sequence[Scene],
    to: Relation | Mapping[Relation, Relation] | None = None,
    ks: Sequence[int | float] = (0, 0.5, 1, 1.5, 2),
    seeds: Sequence[int] = (0,),
    tokens: Target = "phrase",
    at: Space = "text",
    draws: int = 2,
    control_seed: int = 0,
    num_steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    batch_size: int = 32,
) -> xr.Dataset:
    """Dose–response of adding k · (V_to − V_from) to the relation of scenes' captions, with
    controls.

    All conditions of a scene and seed start from the same noise. Controls are drawn `draws` times,
    anew for every scene:

    - "random_vector": at the same tokens, vectors of random direction and the same norm;
    - "wrong_token": the same vectors at as many other tokens of the prompt (EOS included).

    Args:
        wanted: scenes to draw.
        to: a relation, a relation for each of the scenes' relations, or None for each one's
            opposite.
        ks: doses.
        tokens, at: as in `swap_vectors`.

    Returns:
        Dims (condition, k, scene, seed), with `kind` as a coordinate of conditions: "steered" or a
        control's name. Variables: `{target,original}_{strict,loose}` (`evaluate`'s relation, for
        the target relation and for the caption's own; a diagonal layout loosely satisfies two
        cardinal relations, so use the strict ones unless `to` is the opposite), `offset` (px from
        object 2 to object 1 along the target direction; NaN without unique binding), `color`,
        `shape`, `unique_binding`.

    Raises:
        ValueError: as in `swap_vectors`; or a scene already has the target relation.

    Example:
        >>> from dit_lens import scenes
        >>> model, drawn = HookedTextToImage.from_pretrained("rte-nano"), scenes.sample(2, seed=0)
        >>> found = dose_response(model, drawn, ks=(0, 1), draws=1, num_steps=1)
        >>> found["condition"].values.tolist(), found["k"].values.tolist()
        (['steered', 'random_vector 0', 'wrong_token 0'], [0, 1])
    """
    of_relation = OPPOSITE if to is None else dict.fromkeys(DIRECTIONS, to) if isinstance(to, str) else to
    goals = [of_relation[scene.relation] for scene in wanted]
    if still := [scene.relation for scene, goal in zip(wanted, goals, strict=True) if scene.relation == goal]:
        raise ValueError(f"A scene is {still[0]!r} already: leave out the scenes whose relation is the one to go to.")
    texts = [caption(scene) for scene in wanted]
    steered = swap_vectors(model, texts, goals, tokens, at)
    conditions = {"steered": steered, **_controls(steered, role_mask(model, texts, "pad"), draws, control_seed)}

    # a dose of 0 is the same for all
    doses = [(name, k) for name in conditions for k in ks if k != 0] + [("steered", 0.0)] * (0 in ks)
    jobs = list(itertools.product(doses, range(len(texts)), seeds))
    judged: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for start in _batches(len(jobs), batch_size, "dose and response"):
        batch = jobs[start : start + batch_size]
        rows = [row for _, row, _ in batch]
        added = torch.stack([k * conditions[name][row] for (name, k), row, _ in batch])
        images = _generate(model, [texts[r] for r in rows], added, at, [seed for *_, seed in batch], num_steps, guidance)
        for name, values in _judge(images, [wanted[r] for r in rows], [goals[r] for r in rows]).items():
            judged[name].append(values)

    shape = (len(doses), len(texts), len(seeds))
    of_dose = {dose: place for place, dose in enumerate(doses)}
    places = [[of_dose[("steered", 0.0) if k == 0 else (name, k)] for k in ks] for name in conditions]
    dims = ("condition", "k", "scene", "seed")
    coords = {
        "condition": list(conditions),
        "kind": ("condition", [name.rpartition(" ")[0] or name for name in conditions]),
        "k": list(ks),
        "seed": list(seeds),
        "relation": ("scene", [str(scene.relation) for scene in wanted]),
        "to": ("scene", [str(goal) for goal in goals]),
        "caption": ("scene", texts),
    }
    return xr.Dataset({n: (dims, np.concatenate(v).reshape(shape)[places]) for n, v in judged.items()}, coords)


def _controls(
    steered: Float[Tensor, "prompt text_pos d"], pads: Tensor, draws: int, seed: int
) -> dict[str, Float[Tensor, "prompt text_pos d"]]:
    norm = steered.norm(dim=-1, keepdim=True).cpu()
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    controls = {}
    for draw in range(draws):
        noise = torch.randn(steered.shape, generator=generator)
        controls[f"random_vector {draw}"] = (norm * noise / noise.norm(dim=-1, keepdim=True)).to(steered)
    for draw in range(draws):
        moved = torch.zeros_like(steered)
        for row, vectors, size, pad in zip(moved, steered, norm[..., 0], pads, strict=True):
            here = size.nonzero().flatten()
            others = ((size == 0) & ~pad).nonzero().flatten()
            chosen = rng.choice(others.numpy(), len(here), replace=len(here) > len(others))
            row.index_add_(0, torch.from_numpy(chosen).to(row.device), vectors[here.to(row.device)])
        controls[f"wrong_token {draw}"] = moved
    return controls


def _judge(
    images: Float[Tensor, "image 3 height width"], drawn: Sequence[Scene], goals: Sequence[Relation]
) -> dict[str, np.ndarray]:
    own = evaluate(images, drawn)
    gone_to = evaluate(images, [replace(scene, relation=goal) for scene, goal in zip(drawn, goals, strict=True)])
    verdicts = {"target": gone_to, "original": own}
    direction = np.array([DIRECTIONS[goal] for goal in goals])
    direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    offset = np.stack([own.x1 - own.x2, own.y1 - own.y2], axis=1)
    return {
        **{name: verdicts[goal][metric].values for name, (goal, metric) in JUDGED.items()},
        "offset": (offset * direction).sum(axis=1),
        **{name: own[name].values for name in ("color", "shape", "unique_binding")},
    }


def summarise(doses: xr.Dataset) -> pd.DataFrame:
    """Means of `dose_response` and their 95 % intervals: columns kind, k, metric, mean, low, high.

    Rows "steered − random_vector" and "steered − wrong_token" are paired differences: same scene,
    same noise, control averaged over its draws. Intervals treat scenes as clusters.

    Example:
        >>> from dit_lens import scenes
        >>> model, drawn = HookedTextToImage.from_pretrained("rte-nano"), scenes.sample(2, seed=0)
        >>> table = summarise(dose_response(model, drawn, ks=(0, 1), draws=1, num_steps=1))
        >>> table["kind"].unique().tolist()[:3]
        ['steered', 'random_vector', 'wrong_token']
    """
    rows = []
    for metric, k in itertools.product(METRICS, range(doses.sizes["k"])):
        values = doses[metric].isel(k=k).astype(float)
        of_kind = {kind: values.sel(condition=doses.kind == kind) for kind in dict.fromkeys(doses.kind.values.tolist())}
        own = of_kind["steered"].isel(condition=0)
        differences = {f"steered − {n}": own - c.mean("condition") for n, c in of_kind.items() if n != "steered"}
        for kind, part in {**of_kind, **differences}.items():
            table = part.transpose("scene", ...).values.reshape(doses.sizes["scene"], -1)
            rows.append({"kind": kind, "k": float(doses.k[k]), "metric": metric, **clustered_mean(table)._asdict()})
    return pd.DataFrame(rows)
